"""Questions put to a model that was trained on prompts, and its answers as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmrec.data.interactions import Bool, Cases, Int32, Int64, Interactions
from llmrec.encoders.text import out_of_memory
from llmrec.errors import UsageError
from llmrec.evaluation.metrics import MEASURES, Float64, Ranking
from llmrec.evaluation.pools import Pools
from llmrec.evaluation.ratings import area_under_curve, rating_values
from llmrec.prompting.decoding import choice_log_probs, constrained_beams, free_beams
from llmrec.prompting.families import P5Template
from llmrec.prompting.language_model import LanguageModel
from llmrec.prompting.p5 import Example, PromptGenerator
from llmrec.prompting.tokens import Tokenized
from llmrec.prompting.trie import Trie

LARGEST_CUTOFF = max(measure.cutoff for measure in MEASURES)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class DecodingConfig:
    """How a trained model is asked."""

    template: str = "2-3"
    """The sequential prompt whose answers are ranked in tables: its id. A held-out one, such as
    2-13, tells how well the model follows words that it has never seen."""
    others: str = "auto"
    """Further prompts asked once after training, reported apart: ids such as 2-13,1-10; auto: of
    every trained family each held-out one, and the first seen one that asks for the same; none."""
    other_cases: int | Literal["all"] = 1000
    """Test cases of those further prompts, drawn from run.seed. Prompts that ask for the next item
    are asked of all cases."""
    valid_cases: int | Literal["all"] = 2000
    """Validation cases that select the epoch, drawn from run.seed."""
    beams: int = 20
    """Answers that are followed at once: the length of the list that is ranked."""
    constrained: bool = True
    """true: answers are built along the catalogue's own names, seen items left out, so each is an
    item that may be recommended; false: anything may be written, and what is no item's name, token
    for token, or the name of one that may not be recommended is counted and dropped."""
    batch_prompts: int = 64
    """Prompts that are answered together."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.beams < LARGEST_CUTOFF:
            raise UsageError(
                f"decoding.beams={self.beams} lists fewer items than HR@{LARGEST_CUTOFF} looks at. "
                f"Use {LARGEST_CUTOFF} or more."
            )
        if self.batch_prompts < 1:
            raise UsageError(f"decoding.batch_prompts={self.batch_prompts} must be at least 1.")
        for name in ("other_cases", "valid_cases"):
            value = getattr(self, name)
            if value != "all" and value < 1:
                raise UsageError(f"decoding.{name}={value} must be at least 1, or all.")


@dataclass(frozen=True)
class Listed:
    """The lists that a model answered with."""

    items: Int32
    """(C, K), best first, padded with 0."""
    counts: dict[str, int]
    """answers; of these, invalid (no item) and barred (seen, or no candidate); and prompts_cut, of
    the C those that were too long."""


@dataclass(frozen=True)
class Asker:
    """A trained model with the catalogue it may answer from."""

    model: LanguageModel
    trie: Trie
    """Over the items' names as the model writes them."""
    config: DecodingConfig
    autocast: Callable[[], Any]
    """Makes the context in which the model computes."""

    def items(self, examples: Sequence[Example], shut: Callable[[int], Int32]) -> Listed:
        """Lists of items, best first.

        Args:
            examples: C questions.
            shut: the items that one of them may not be answered with, ascending.
        """
        found = np.zeros((len(examples), self.config.beams), dtype=np.int32)
        counts: Counter[str] = Counter(answers=0, invalid=0, barred=0)
        cut = self.model.prompts.cut_prompts

        def ask(questions: list[Tokenized], rows: Int64) -> None:
            steps, closed = self.model.ask(questions), [shut(row) for row in rows.tolist()]
            if self.config.constrained:
                beams = constrained_beams(steps, self.trie, self.config.beams, closed)
            else:
                tokens = self.model.prompts
                beams = free_beams(
                    steps, self.trie, self.config.beams, tokens.end, tokens.max_target_tokens,
                    closed,
                )  # fmt: skip
            found[rows, : beams.items.shape[1]] = beams.items
            invalid, barred = int(beams.invalid.sum()), int(beams.seen.sum())
            counts["answers"] += int((beams.items > 0).sum()) + invalid + barred
            counts["invalid"] += invalid
            counts["barred"] += barred

        self._in_batches(examples, ask)
        return Listed(found, counts | {"prompts_cut": self.model.prompts.cut_prompts - cut})

    def choices(self, examples: Sequence[Example], choices: Sequence[str]) -> Float64:
        """How likely each of some answers is, given that it is one of them, (C, n)."""
        found = np.zeros((len(examples), len(choices)))
        answers = self.model.prompts.answers(choices)

        def ask(questions: list[Tokenized], rows: Int64) -> None:
            chances = choice_log_probs(self.model.ask(questions), answers).float().softmax(dim=1)
            found[rows] = chances.double().cpu().numpy()

        self._in_batches(examples, ask)
        return found

    def texts(self, examples: Sequence[Example]) -> list[str]:
        """What the model writes, (C,)."""
        found = [""] * len(examples)

        def ask(questions: list[Tokenized], rows: Int64) -> None:
            for row, text in zip(rows.tolist(), self.model.write(questions), strict=True):
                found[row] = text

        self._in_batches(examples, ask)
        return found

    @torch.inference_mode()
    def _in_batches(
        self, examples: Sequence[Example], ask: Callable[[list[Tokenized], Int64], None]
    ) -> None:
        """Questions of similar length together; `ask` is told which rows these are."""
        self.model.eval()
        read = self.model.prompts.prompts([example.input for example in examples])
        order = np.argsort([len(question.ids) for question in read], kind="stable")
        for first in range(0, len(order), self.config.batch_prompts):
            rows = order[first : first + self.config.batch_prompts]
            try:
                with self.autocast():
                    ask([read[row] for row in rows.tolist()], rows)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise UsageError(
                    f"memory ran out while {len(rows)} prompts were answered by "
                    f"{self.config.beams} beams each. Lower decoding.batch_prompts="
                    f"{self.config.batch_prompts}."
                ) from error


def other_answers(
    asker: Asker, generator: PromptGenerator, template: P5Template, seed: int
) -> dict[str, Any]:
    """Ask test cases by a prompt that is not ranked among all items.

    Args:
        asker: the trained model.
        generator: makes the questions.
        template: any but one that asks for an item without candidates.
        seed: of the cases drawn.

    Returns:
        cases, and by what is asked: for an item among candidates its HR and NDCG among these; for
        yes or no (like or dislike) accuracy and AUC of the first one's probability; for stars RMSE,
        MAE and AUC of their expectation; for a text BLEU, ROUGE and the share of distinct ones.
    """
    everything = list(generator.questions(template, "test"))
    rows = sample(len(everything), asker.config.other_cases, seed)
    examples = [everything[row] for row in rows.tolist()]
    targets = [example.target for example in examples]
    values: dict[str, Any]
    if template.group == "choose":
        values = _among_candidates(asker, generator, template, examples)
    elif template.group == "judge":
        words = ("yes", "no") if template.target == "yes_no" else ("like", "dislike")
        chances = asker.choices(examples, words)[:, 0]
        truth = np.array([target == words[0] for target in targets])
        values = {
            "accuracy": float(((chances > 0.5) == truth).mean()),
            "AUC": area_under_curve(truth, chances),
        }
    elif template.group == "stars":
        chances = asker.choices(examples, generator.words.stars)
        expected = chances @ np.array([float(stars) for stars in generator.words.stars])
        values = rating_values(np.array(targets, dtype=np.float64), expected)
    else:
        from llmrec.evaluation.texts import text_values

        tokens, cut = asker.model.prompts, asker.model.prompts.cut_answers
        tokens.answers(targets)
        share = (tokens.cut_answers - cut) / len(targets)
        values = text_values(targets, asker.texts(examples)) | {"true ones beyond the limit": share}
    return {"cases": len(examples), "measures": values}


def _among_candidates(
    asker: Asker, generator: PromptGenerator, template: P5Template, examples: Sequence[Example]
) -> dict[str, float]:
    """HR and NDCG of lists that are drawn from the candidates a prompt names."""
    everything = np.arange(1, len(asker.trie.items) + 1, dtype=np.int32)
    named = [generator.candidates(template, example) for example in examples]
    listed = asker.items(examples, lambda row: np.setdiff1d(everything, named[row]))
    targets = np.array([example.item for example in examples], dtype=np.int32)
    sizes = np.array([len(candidates) for candidates in named])
    ranking = Ranking.from_lists(listed.items, targets, sizes)
    measures = [measure for measure in MEASURES if measure.cutoff]
    return {str(measure): float(measure.per_case(ranking).mean()) for measure in measures}


def answer_trie(model: LanguageModel, mentions: Sequence[str]) -> Trie:
    """The prefix tree of all items' names, as the model's tokenizer writes them.

    Raises:
        UsageError: Two items are written alike, or one is too long for model.max_target_tokens.
    """
    tokens = model.prompts
    cut = tokens.cut_answers
    sequences = tokens.answers(mentions)
    if tokens.cut_answers > cut:
        raise UsageError(
            f"{tokens.cut_answers - cut} items have names of more than "
            f"model.max_target_tokens={tokens.max_target_tokens} tokens. Raise it, or use another "
            "indexing.name."
        )
    return Trie.of(sequences)


@dataclass(frozen=True)
class Barred:
    """Which items a case may not be answered with; made anew when asked, as they may be many."""

    interactions: Interactions
    """What the cases index into."""
    cases: Cases
    candidates: Bool
    """What may be recommended to anybody, (N + 1,)."""
    pools: Pools | None
    """Each case's own candidates instead, of which none is filtered."""
    filter_seen: bool | Literal["papers"]
    """As in `EvaluationConfig`."""

    def items(self, case: int) -> Int32:
        """Ascending."""
        if self.pools is not None:
            everything = np.arange(1, len(self.candidates), dtype=np.int32)
            return np.setdiff1d(everything, self.pools.items[case])
        barred = np.flatnonzero(~self.candidates)[1:]  # padding aside
        if self.filter_seen is not False:
            start = self.interactions.offsets[self.cases.user[case]]
            barred = np.union1d(barred, self.interactions.items[start : self.cases.end[case]])
        if self.filter_seen != "papers":
            barred = barred[barred != self.interactions.items[self.cases.target[case]]]
        return barred.astype(np.int32)

    def sizes(self, cases: Int64) -> Int64:
        """Among how many items some cases are then ranked."""
        count = len(self.candidates) - 1
        return np.array([count - len(self.items(case)) for case in cases.tolist()], dtype=np.int64)


def list_ranking(listed: Listed, targets: Int32, sizes: Int64, top_k: int) -> Ranking:
    """Answered lists as a ranking; `top_k` items of each are kept."""
    ranking = Ranking.from_lists(listed.items, targets, sizes)
    top: Int32 = np.zeros((len(targets), top_k), dtype=np.int32)
    kept = min(top_k, listed.items.shape[1])
    top[:, :kept] = listed.items[:, :kept]
    return Ranking(ranking.greater, ranking.equal, ranking.candidates, ranking.reachable, top)


def other_templates(
    templates: Sequence[P5Template], config: DecodingConfig, trained: Sequence[str]
) -> Iterator[P5Template]:
    """The further prompts that are asked after training, in their order.

    Args:
        templates: all.
        config: says which.
        trained: the families that were trained on.

    Raises:
        UsageError: A name that no template has.
    """
    known = {template.id: template for template in templates}
    if config.others == "none":
        return
    if config.others != "auto":
        for name in (part.strip() for part in config.others.split(",")):
            if name not in known:
                raise UsageError(
                    f"decoding.others names {name}, which no template is. There are "
                    f"{', '.join(known)}."
                )
            yield known[name]
        return
    for family in trained:
        members = [template for template in templates if template.family == family]
        for held_out in (template for template in members if template.held_out):
            alike = [t for t in members if not t.held_out and t.target == held_out.target]
            alike = [t for t in alike if t.group == held_out.group] or alike
            if config.template in [t.id for t in alike]:
                alike = []  # it is asked anyway
            yield from (t for t in (*alike[:1], held_out) if t.id != config.template)


def sample(count: int, wanted: int | Literal["all"], seed: int) -> Int64:
    """Some rows out of `count`, ascending; all of them where no fewer are wanted."""
    if wanted == "all" or wanted >= count:
        return np.arange(count)
    drawn: NDArray[np.int64] = np.random.default_rng((seed, 5)).permutation(count)[:wanted]
    return np.sort(drawn)
