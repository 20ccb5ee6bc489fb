"""Beam search against brute force, against Hugging Face's own, and at its edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from llmrec.errors import UsageError
from llmrec.prompting.decoding import (
    CausalSteps,
    Seq2SeqSteps,
    Steps,
    choice_log_probs,
    constrained_beams,
    free_beams,
)
from llmrec.prompting.trie import Trie

END, VOCABULARY = 1, 24
NOTHING_SEEN = np.empty(0, np.int32)


def tiny_t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, num_layers=2, num_heads=2, d_ff=64, d_kv=16, vocab_size=VOCABULARY,
        pad_token_id=0, eos_token_id=END, decoder_start_token_id=0,
    )  # fmt: skip
    return spread(transformers.T5ForConditionalGeneration(config).eval())


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=2,
        eos_token_id=END,
    )  # fmt: skip
    return spread(transformers.LlamaForCausalLM(config).eval())


def spread(model: Any) -> Any:
    """Random weights large enough that answers differ clearly in probability."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    return model


class Prompts:
    """B prompts of different lengths, given to either kind of model."""

    def __init__(self, model: Any, count: int = 4, *, longest: int = 9) -> None:
        self.model = model
        rng = np.random.default_rng(3)
        self.texts = [
            rng.integers(3, VOCABULARY, size=size).tolist()
            for size in np.linspace(3, longest, count).astype(int)
        ]

    def padded(self, rows: Sequence[int], extra: int = 0) -> tuple[Tensor, Tensor]:
        """Some of the prompts, on the left for decoders, by `extra` more than is needed."""
        texts = [self.texts[row] for row in rows]
        width = max(map(len, texts)) + extra
        ids = torch.zeros(len(texts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            part = slice(0, len(text))
            if not self.model.config.is_encoder_decoder:
                part = slice(width - len(text), width)
            ids[row, part] = torch.tensor(text)
            mask[row, part] = 1
        return ids, mask

    def steps(self, rows: Sequence[int], extra: int = 0) -> Steps:
        ids, mask = self.padded(rows, extra)
        if not self.model.config.is_encoder_decoder:
            return CausalSteps(self.model, ids, mask)
        with torch.inference_mode():
            hidden = self.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return Seq2SeqSteps(self.model, hidden, mask)

    @torch.inference_mode()
    def log_prob(self, row: int, answer: Sequence[int]) -> float:
        """One answer to one prompt, run whole: no cache, no padding, no beams."""
        prompt = torch.tensor([self.texts[row]])
        tokens = torch.tensor([list(answer)])
        if self.model.config.is_encoder_decoder:
            start = torch.cat([torch.zeros(1, 1, dtype=torch.int64), tokens[:, :-1]], dim=1)
            logits = self.model(input_ids=prompt, decoder_input_ids=start).logits[0]
        else:
            whole = torch.cat([prompt, tokens], dim=1)
            logits = self.model(input_ids=whole).logits[0, prompt.shape[1] - 1 : -1]
        picked = logits.log_softmax(-1).gather(1, tokens.T)
        return float(picked.sum())


def catalogue(items: int = 40) -> list[list[int]]:
    """Answers of 2 to 5 tokens with shared beginnings."""
    rng = np.random.default_rng(1)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < items:
        body = rng.integers(3, 9, size=rng.integers(1, 5))
        found[(*body.tolist(), END)] = None
    return [list(answer) for answer in found]


MODELS = pytest.mark.parametrize("make", [tiny_t5, tiny_llama])


@MODELS
@pytest.mark.parametrize("seen_count", [0, 15])
def test_with_as_many_beams_as_items_the_list_is_brute_force(make: Any, seen_count: int) -> None:
    answers, prompts = catalogue(), Prompts(make())
    rng = np.random.default_rng(2)
    seen = [(rng.permutation(len(answers))[:seen_count] + 1).astype(np.int32) for _ in range(4)]
    found = constrained_beams(prompts.steps(range(4)), Trie.of(answers), len(answers), seen)
    for row in range(4):
        scores = np.array([prompts.log_prob(row, answer) for answer in answers])
        scores[seen[row] - 1] = -np.inf
        wanted = np.argsort(-scores)[: len(answers) - seen_count] + 1
        size = len(wanted)
        assert found.items[row, :size].tolist() == wanted.tolist()
        assert not found.items[row, size:].any()
        assert np.abs(found.scores[row, :size] - scores[wanted - 1]).max() < 1e-4
        assert np.isneginf(found.scores[row, size:]).all()


@MODELS
@pytest.mark.parametrize("extra", [0, 3])
def test_one_prompt_alone_answers_as_among_others_and_however_it_is_padded(
    make: Any, extra: int
) -> None:
    answers, prompts = catalogue(), Prompts(make(), count=8)
    trie, nothing = Trie.of(answers), [NOTHING_SEEN] * 8
    together = constrained_beams(prompts.steps(range(8), extra), trie, 6, nothing)
    for row in range(8):
        alone = constrained_beams(prompts.steps([row]), trie, 6, nothing[:1])
        assert alone.items[0].tolist() == together.items[row].tolist()
        assert np.abs(alone.scores[0] - together.scores[row]).max() < 1e-4


@MODELS
def test_few_beams_find_distinct_unseen_items_with_their_own_scores(make: Any) -> None:
    answers, prompts = catalogue(), Prompts(make())
    seen = [np.arange(1, 21, dtype=np.int32)] * 4
    found = constrained_beams(prompts.steps(range(4)), Trie.of(answers), 5, seen)
    assert (found.items > 20).all()
    assert not found.invalid.any()
    for row in range(4):
        assert len(set(found.items[row].tolist())) == 5
        own = [prompts.log_prob(row, answers[item - 1]) for item in found.items[row]]
        assert np.abs(found.scores[row] - own).max() < 1e-4


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "intermediate_size": 64, "vocab_size": VOCABULARY, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": END,
}  # fmt: skip
OTHERS = {
    "absolute positions": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=2,
        eos_token_id=END,
    ),
    "sliding windows": transformers.MistralConfig(**SMALL, sliding_window=4),
    "normed queries": transformers.Qwen3Config(**SMALL),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_score_a_padded_prompt_as_one_run_whole(kind: str) -> None:
    torch.manual_seed(0)
    model = spread(transformers.AutoModelForCausalLM.from_config(OTHERS[kind]).eval())
    answers, prompts = catalogue(), Prompts(model)
    found = constrained_beams(prompts.steps(range(4), 2), Trie.of(answers), 5, [NOTHING_SEEN] * 4)
    for row in range(4):
        own = [prompts.log_prob(row, answers[item - 1]) for item in found.items[row]]
        assert np.abs(found.scores[row] - own).max() < 1e-4


@MODELS
def test_the_free_search_counts_and_drops_what_names_no_item_and_what_was_seen(make: Any) -> None:
    answers = [[first, second, END] for first in range(3, 24) for second in range(3, 24)]
    prompts = Prompts(make())
    trie, nothing = Trie.of(answers), [NOTHING_SEEN] * 4
    every = free_beams(prompts.steps(range(4)), trie, 200, END, 6, nothing)
    lefts = 0
    seen = [row[row > 0][::2] for row in every.items]  # every other item of each list
    found = free_beams(prompts.steps(range(4)), trie, 200, END, 6, seen)
    for row in range(4):
        listed = every.items[row][every.items[row] > 0]
        left = listed[1::2]
        lefts += len(left)
        assert every.invalid[row] == found.invalid[row] == 200 - len(listed)
        assert found.seen[row] == len(listed) - len(left)
        assert found.items[row].tolist() == [*left.tolist(), *[0] * (200 - len(left))]
        own = [prompts.log_prob(row, answers[item - 1]) for item in left]
        assert np.abs(found.scores[row, : len(left)] - own).max(initial=0) < 1e-4
        assert np.isneginf(found.scores[row, len(left) :]).all()
    assert lefts >= 4


@MODELS
def test_the_free_search_finds_what_hugging_face_finds(make: Any) -> None:
    model = make()
    prompts = Prompts(model, count=12)
    ids, mask = prompts.padded(range(12))
    peer = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=10, num_return_sequences=10,
        max_new_tokens=6, length_penalty=0.0, do_sample=False, return_dict_in_generate=True,
        output_scores=True, early_stopping=False,
    )  # fmt: skip
    theirs = peer.sequences_scores.view(12, 10).numpy()
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    answers = [tuple(row[start:].tolist()) for row in peer.sequences]
    ended = sorted({a[: a.index(END) + 1] for a in answers if END in a})
    ours = free_beams(prompts.steps(range(12)), Trie.of(ended), 10, END, 6, [NOTHING_SEEN] * 12)
    compared = 0
    for row in range(12):
        named = {
            ended.index(a[: a.index(END) + 1]) + 1: score
            for a, score in zip(answers[10 * row : 10 * row + 10], theirs[row], strict=True)
            if END in a
        }
        valid = ours.items[row] > 0
        assert ours.invalid[row] == 10 - len(named) == 10 - valid.sum()
        assert ours.items[row][valid].tolist() == list(named)
        assert np.abs(ours.scores[row][valid] - list(named.values())).max(initial=0) < 1e-4
        compared += len(named)
    assert compared >= 20


@MODELS
def test_as_many_rows_of_other_prompts_go_on_from_their_own_prompts(make: Any) -> None:
    prompts = Prompts(make())
    steps = prompts.steps([0, 3])
    steps.start()
    steps.step(torch.tensor([0, 0, 1]), torch.tensor([4, 5, 6]))  # prompts 0 0 3
    logits = steps.step(torch.tensor([1, 2, 2]), torch.tensor([7, 8, 9]))  # prompts 0 3 3
    found = logits.log_softmax(1)[:, 10]
    rows = [(0, [5, 7]), (3, [6, 8]), (3, [6, 9])]
    wanted = [
        prompts.log_prob(row, [*said, 10]) - prompts.log_prob(row, said) for row, said in rows
    ]
    assert np.abs(found.numpy() - wanted).max() < 1e-4


@MODELS
def test_a_choice_has_the_log_probability_of_its_whole_answer(make: Any) -> None:
    prompts = Prompts(make())
    choices = [[5, END], [5, 6, END], [5], [7, 7, 8, END], [5, 6, 9]]
    found = choice_log_probs(prompts.steps(range(4)), choices)
    wanted = [[prompts.log_prob(row, choice) for choice in choices] for row in range(4)]
    assert np.abs(found.numpy() - wanted).max() < 1e-4


def test_ten_thousand_answers_are_the_items_they_are_said_to_be(figure: Any) -> None:
    rng = np.random.default_rng(4)
    answers = [[3 + n // 400, 3 + n // 20 % 20, 3 + n % 20, END] for n in range(5000)]
    trie, model = Trie.of(answers), tiny_t5()
    found = valid = 0
    for _ in range(10):
        ids = torch.from_numpy(rng.integers(3, VOCABULARY, size=(100, 8)))
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            hidden = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        seen = [rng.integers(1, 5001, size=30).astype(np.int32) for _ in range(100)]
        lists = constrained_beams(Seq2SeqSteps(model, hidden, mask), trie, 10, seen)
        told = torch.tensor([[answers[item - 1] for item in row] for row in lists.items.tolist()])
        start = torch.cat([torch.zeros_like(told[..., :1]), told[..., :-1]], dim=2)
        with torch.inference_mode():
            logits = model(
                encoder_outputs=(hidden.repeat_interleave(10, 0),),
                decoder_input_ids=start.flatten(0, 1),
            ).logits
        wanted = logits.log_softmax(-1).gather(2, told.flatten(0, 1)[..., None]).sum((1, 2))
        alike = np.abs(lists.scores - wanted.view(100, 10).numpy()) < 1e-4
        for row, scored, known in zip(lists.items.tolist(), alike, seen, strict=True):
            assert len(set(row)) == 10
            assert not set(row) & set(known.tolist())
            found += len(row)
            valid += int(scored.sum())
    figure("answers that are items, scored as their own words", f"{valid} of {found}")
    assert valid == found == 10_000


class Fixed:
    """A model that says the same logits at every place; V = 5, token 1 ends."""

    def __init__(self, logits: Sequence[float]) -> None:
        self.logits = torch.tensor([list(logits)])

    def start(self) -> Tensor:
        return self.logits

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        return self.logits.expand(len(rows), -1)


FOUR = [[2, 1], [3, 1], [4, 2, 1], [4, 3, 1]]


def test_scores_are_over_the_whole_vocabulary_and_not_divided_by_length() -> None:
    # p = 1/10, 1/10, 2/10, 3/10, 3/10: item 2 is [3, end] with .3 x .1, item 4 .3 x .3 x .1
    logits = np.log([1, 1, 2, 3, 3])
    found = constrained_beams(Fixed(logits), Trie.of(FOUR), 4, [NOTHING_SEEN])
    assert found.items.tolist() == [[2, 1, 4, 3]]
    assert np.exp(found.scores[0]) == pytest.approx([0.03, 0.02, 0.009, 0.006], rel=1e-5)


def test_a_beam_is_not_spent_on_a_branch_of_seen_items_alone() -> None:
    logits = np.log([1, 1, 2, 3, 90])  # 4 is by far the likeliest first token
    seen = [np.array([3, 4, 4], np.int32)]
    found = constrained_beams(Fixed(logits), Trie.of(FOUR), 1, seen)
    assert found.items.tolist() == [[2]]


def test_a_short_answer_found_early_keeps_its_place() -> None:
    answers = [[2, 1], [3, 3, 1], [3, 4, 1]]
    logits = np.log([1, 40, 10, 29, 20])  # .1 x .4 = .04; .29 x .29 x .4 = .034; .0232
    found = constrained_beams(Fixed(logits), Trie.of(answers), 2, [NOTHING_SEEN])
    assert found.items.tolist() == [[1, 2]]


def test_a_longer_answer_that_is_likelier_takes_the_place_of_a_short_one() -> None:
    logits = np.log([1, 1, 1, 8, 1])  # .083 for the first, .667 x .667 = .44 for the second
    found = constrained_beams(Fixed(logits), Trie.of([[2], [3, 3]]), 1, [NOTHING_SEEN])
    assert found.items.tolist() == [[2]]


def test_fewer_unseen_items_than_beams_leave_the_rest_empty() -> None:
    seen = [np.array([0, 1, 2, 3], np.int32)]  # 0 is padding
    found = constrained_beams(Fixed(np.zeros(5)), Trie.of(FOUR), 3, seen)
    assert found.items.tolist() == [[4, 0, 0]]
    assert np.isneginf(found.scores[0, 1:]).all()


def test_everything_seen_gives_an_empty_list() -> None:
    seen = [np.arange(1, 5, dtype=np.int32)]
    found = constrained_beams(Fixed(np.zeros(5)), Trie.of(FOUR), 3, seen)
    assert not found.items.any()


def test_an_answer_cut_off_is_invalid() -> None:
    logits = np.log([1, 1, 1, 1, 96])  # 4, 4, 4, ... never ends
    found = free_beams(Fixed(logits), Trie.of(FOUR), 1, 1, 3, [NOTHING_SEEN])
    assert found.items.tolist() == [[0]]
    assert found.invalid.tolist() == [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_diverged_is_told_of(bad: float) -> None:
    steps = Fixed([0, 0, 0, 0, bad])
    with pytest.raises(UsageError, match="diverged"):
        constrained_beams(steps, Trie.of(FOUR), 2, [NOTHING_SEEN])
    with pytest.raises(UsageError, match="diverged"):
        free_beams(steps, Trie.of(FOUR), 2, 1, 3, [NOTHING_SEEN])
    with pytest.raises(UsageError, match="diverged"):
        choice_log_probs(steps, [[2], [3]])


def test_a_token_that_the_model_rules_out_makes_no_answer() -> None:
    found = constrained_beams(Fixed([0, 0, 0, -np.inf, 0]), Trie.of(FOUR), 4, [NOTHING_SEEN])
    assert found.items.tolist() == [[1, 3, 0, 0]]


def test_prompts_padded_on_the_right_are_refused() -> None:
    with pytest.raises(ValueError, match="left"):
        CausalSteps(None, torch.ones(1, 2), torch.tensor([[1, 0]]))
