"""The six tasks: how each asks about a case, and what an answer says about the candidates.

A task is pure: a `Question` in, `Request` parts out; an answer's text in, a `Verdict` out. It knows
neither servers nor journals, and the same functions serve scoring and ``llmrec chat show``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_uppercase
from typing import Any, Literal, TypeAlias

from llmrec.chat.parsing import (
    TitleMatcher,
    obeys,
    parse_list,
    parse_pick,
    parse_rating,
    parse_yes_no,
    pick_scores,
)
from llmrec.chat.requests import Answer, Choice, Constraint, Pattern, Schema
from llmrec.errors import UsageError

TaskName: TypeAlias = Literal["pick", "top", "list", "pair", "point", "rating"]
SHORT_TOKENS = 4
"""Where the first token is read: a few more, for its text is read if it is no option, such as a
leading blank or the beginning of a split word."""
LEAST_MASS = 0.5
"""Probability that the first token must give to options together to be read as the answer: less is
that of a model which begins with other words."""
TOP_LOGPROBS = 20
"""Alternatives asked for where one token answers: the most that servers give by default."""
STARS = ("1", "2", "3", "4", "5")
POOL_SIZES: dict[str, int] = {"pick": 4, "top": 100, "list": 20, "pair": 4, "point": 20}
"""Candidates per case where `evaluation.pool.size` is not given."""


@dataclass(frozen=True)
class TaskConfig:
    """What is asked about a case, and how the answer is decoded and read."""

    task: TaskName = "pick"
    """pick: the one out of few, by letter. top: the best of many, as a JSON list. list: all
    candidates in order. pair: which of two, for every pair. point: yes or no for each candidate.
    rating: 1 to 5 stars for the target."""
    history: Literal["plain", "recency", "example"] = "plain"
    """plain: numbered, oldest first. recency: the last one named again. example: the history
    without its last item first serves as a solved example."""
    history_items: int = 20
    """Most recent items of the history that are shown."""
    decoding: Literal["constrained", "free"] = "constrained"
    """constrained: the server is told to produce valid answers only. free: it may say anything."""
    logprobs: Literal["auto", "off"] = "auto"
    """auto: constrained answers of pick, pair, point and rating are read as the probabilities of
    their first token, where the server gives them and it is an answer. off: as text."""
    list_length: int = 10
    """Titles that `top` asks for."""
    shuffles: int = 1
    """Times that a case is asked, each time with its candidates in another order; the answers are
    added up."""
    examples: int = 0
    """Other users' ratings shown as solved examples; rating only. 0 is zero-shot."""
    max_tokens: int | Literal["auto"] = "auto"
    """Tokens that an answer may have. auto: enough for the task's answer; models that think aloud
    need more."""
    temperature: float = 0.0
    """0: the likeliest answer; above, answers are drawn, with the run's seed."""
    template: str = ""
    """Path of your own task template. Empty: the shipped one."""

    def __post_init__(self) -> None:
        """Refuse what no task can do."""
        if min(self.history_items, self.list_length, self.shuffles) < 1:
            raise UsageError(
                "chat.history_items, chat.list_length and chat.shuffles must be at least 1."
            )
        if self.shuffles > 1 and self.task in ("point", "rating"):
            raise UsageError(
                f"chat.shuffles={self.shuffles} means nothing to chat.task={self.task}, which "
                "shows one item at a time. Leave it out."
            )
        if self.list_length != 10 and self.task != "top":
            raise UsageError(
                f"chat.list_length={self.list_length} means nothing to chat.task={self.task}. "
                "Leave it out, or use chat.task=top."
            )
        if self.history != "plain" and self.task == "rating":
            raise UsageError(
                f"chat.history={self.history} means nothing to chat.task=rating, which shows the "
                "history with its ratings. Leave it out."
            )
        if self.examples < 0 or (self.examples and self.task != "rating"):
            raise UsageError(
                f"chat.examples={self.examples}: examples are shown by chat.task=rating, 1 or more "
                "of them, or 0 for none."
            )
        if self.max_tokens != "auto" and self.max_tokens < 1:
            raise UsageError(f"chat.max_tokens={self.max_tokens} must be at least 1, or auto.")
        if not 0 <= self.temperature <= 2:
            raise UsageError(f"chat.temperature={self.temperature} must lie in [0, 2].")

    @property
    def reads_tokens(self) -> bool:
        """Whether the first token's log-probabilities are the answer, where there are any."""
        one_token = self.task not in ("top", "list") and self.decoding == "constrained"
        return self.logprobs == "auto" and one_token

    @property
    def brief(self) -> bool:
        """Whether the prompt asks for the bare answer, without words around it."""
        return self.decoding == "constrained"


@dataclass(frozen=True)
class Question:
    """One case as a prompt tells it: titles as displayed."""

    history: tuple[str, ...]
    """The user's items, oldest first."""
    candidates: tuple[str, ...]
    """In the order shown; for a rating the one item."""
    truth: int | None
    """Where the target stands among them; None where it is not one of them."""
    history_block: str = ""
    """The history as its template writes it."""
    stars: float = 0.0
    """The target's rating, 1..5; rating only."""
    rated: tuple[tuple[str, float], ...] = ()
    """The history with its ratings; rating only."""
    examples: tuple[Mapping[str, Any], ...] = ()
    """Solved examples (rated, candidate, stars); rating only."""

    @cached_property
    def matcher(self) -> TitleMatcher:
        """Finds titles of this question in an answer."""
        return TitleMatcher(self.candidates, self.history)


@dataclass(frozen=True)
class Asked:
    """One part of a question, ready to be sent but for its number."""

    prompt: str
    max_tokens: int
    constraint: Constraint | None
    top_logprobs: int


@dataclass
class Verdict:
    """What one answer says."""

    scores: dict[int, float] = field(default_factory=dict)
    """Place of a candidate -> its score, higher is better; absent: not in the answer."""
    kinds: Counter[str] = field(default_factory=Counter)
    """How the answer's parts were understood: exact, normalised, fuzzy, token, duplicate, seen,
    invented, ..., and why it was not: unparsable, cut, invalid, failed, constraint_ignored."""
    chosen: int | None = None
    """The place that came out on top, where one did."""


Render: TypeAlias = Callable[..., str]
"""A task's template: named inputs -> the prompt."""


def ask(question: Question, part: int, config: TaskConfig, render: Render) -> Asked:
    """The prompt of one part of a question, with how its answer is to be decoded."""
    inputs, constraint, tokens = _INPUTS[config.task](question, part, config)
    if config.max_tokens != "auto":
        tokens = config.max_tokens
    elif config.reads_tokens:
        tokens = SHORT_TOKENS
    return Asked(
        render(brief=config.brief, **inputs),
        tokens,
        constraint if config.decoding == "constrained" else None,
        TOP_LOGPROBS if config.reads_tokens else 0,
    )


def parts(candidates: int, config: TaskConfig) -> int:
    """Requests that one asking of a case takes."""
    if config.task == "pair":
        return candidates * (candidates - 1) // 2
    return candidates if config.task == "point" else 1


def judge(answer: Answer, question: Question, part: int, config: TaskConfig) -> Verdict:
    """What an answer to one part of a question says about its candidates."""
    verdict = Verdict()
    if answer.status in ("invalid", "failed"):
        verdict.kinds[answer.status] += 1
        return verdict
    if answer.top and config.reads_tokens:
        _read_tokens(verdict, answer, question, part, config)
        if verdict.scores:
            verdict.kinds["token"] += 1
            return verdict
    constraint = _INPUTS[config.task](question, part, config)[1]
    if config.decoding == "constrained" and not obeys(answer.text, constraint):
        verdict.kinds["constraint_ignored"] += 1
    _READ[config.task](verdict, answer.text, question, part, config)
    # A letter after which the tokens ran out is whole; a list, or nothing understood, is not.
    if answer.status == "cut" and not (config.reads_tokens and verdict.scores):
        verdict.kinds["cut"] += 1
    return verdict


def letters(count: int) -> tuple[str, ...]:
    """A, B, C, ..."""
    return tuple(ascii_uppercase[:count])


def pair_of(part: int, candidates: int) -> tuple[int, int]:
    """Which two candidates the part compares, as A and B.

    Every other pair is turned round, so that the place says nothing over all of them.
    """
    first, second = next(itertools.islice(itertools.combinations(range(candidates), 2), part, None))
    return (second, first) if part % 2 else (first, second)


_Inputs: TypeAlias = tuple[dict[str, Any], Constraint, int]
"""A template's inputs, what a valid answer is, and the tokens that one needs at most."""


def _pick(question: Question, part: int, config: TaskConfig) -> _Inputs:
    inputs = {"history": question.history_block, "candidates": list(question.candidates)}
    return inputs, Choice(letters(len(question.candidates))), _tokens(config, 8, 128)


def _listed(question: Question, part: int, config: TaskConfig) -> _Inputs:
    size = len(question.candidates)
    count = min(config.list_length, size) if config.task == "top" else size
    inputs = {
        "history": question.history_block,
        "candidates": list(question.candidates),
        "count": count,
    }
    titles = {"type": "string", "enum": list(question.candidates)}
    schema = {"type": "array", "items": titles, "minItems": count, "maxItems": count}
    # Two bytes a token: twice what tokenisers need, in Latin and in other scripts.
    longest = sorted((len(title.encode()) for title in question.candidates), reverse=True)[:count]
    return inputs, Schema(schema), sum(longest) // 2 + 16 * count + 64


def _pair(question: Question, part: int, config: TaskConfig) -> _Inputs:
    shown = [question.candidates[place] for place in pair_of(part, len(question.candidates))]
    inputs = {"history": question.history_block, "candidates": shown}
    return inputs, Choice(letters(2)), _tokens(config, 8, 128)


def _point(question: Question, part: int, config: TaskConfig) -> _Inputs:
    inputs = {"history": question.history_block, "candidate": question.candidates[part]}
    return inputs, Choice(("yes", "no")), _tokens(config, 8, 64)


def _rating(question: Question, part: int, config: TaskConfig) -> _Inputs:
    inputs = {
        "rated": [list(pair) for pair in question.rated],
        "examples": list(question.examples),
        "candidate": question.candidates[0],
    }
    return inputs, Pattern(f"[{''.join(STARS)}]"), _tokens(config, 8, 64)


def _tokens(config: TaskConfig, brief: int, free: int) -> int:
    return brief if config.brief else free


_INPUTS: dict[str, Callable[[Question, int, TaskConfig], _Inputs]] = {
    "pick": _pick, "top": _listed, "list": _listed, "pair": _pair, "point": _point,
    "rating": _rating,
}  # fmt: skip


def _read_tokens(
    verdict: Verdict, answer: Answer, question: Question, part: int, config: TaskConfig
) -> None:
    """Score by the first token's alternatives, as shares of the mass on valid answers."""
    constraint = _INPUTS[config.task](question, part, config)[1]
    options = constraint.options if isinstance(constraint, Choice) else STARS
    mass = pick_scores(answer.top, options)
    total = sum(mass.values())
    if total < LEAST_MASS:
        return
    share = {option: weight / total for option, weight in mass.items()}
    if config.task == "rating":
        verdict.scores[0] = sum(int(option) * weight for option, weight in share.items())
        return
    if config.task == "point":
        verdict.scores[part] = share.get("yes", 0.0)
        return
    places = range(len(question.candidates))
    if config.task == "pair":
        places = pair_of(part, len(question.candidates))  # type: ignore[assignment]
    # An option that is not among the alternatives has next to nothing: last, tied with its like.
    for option, place in zip(options, places, strict=True):
        verdict.scores[place] = share.get(option, 0.0)
    best = max(verdict.scores, key=lambda place: verdict.scores[place])
    verdict.chosen = best


def _read_pick(
    verdict: Verdict, text: str, question: Question, part: int, config: TaskConfig
) -> None:
    parsed = parse_pick(text, question.matcher, letters(len(question.candidates)))
    _note(verdict, parsed.kinds, parsed.problem)
    for place in parsed.places[:1]:
        verdict.scores[place], verdict.chosen = 1.0, place


def _read_list(
    verdict: Verdict, text: str, question: Question, part: int, config: TaskConfig
) -> None:
    size = len(question.candidates)
    parsed = parse_list(
        text, question.matcher, config.list_length if config.task == "top" else size
    )
    _note(verdict, parsed.kinds, parsed.problem)
    for rank, place in enumerate(parsed.places):
        verdict.scores[place] = float(size - rank)  # Borda's count
    verdict.chosen = next(iter(parsed.places), None)


def _read_pair(
    verdict: Verdict, text: str, question: Question, part: int, config: TaskConfig
) -> None:
    places = pair_of(part, len(question.candidates))
    matcher = TitleMatcher([question.candidates[place] for place in places], question.history)
    parsed = parse_pick(text, matcher, letters(2))
    _note(verdict, parsed.kinds, parsed.problem)
    for winner in parsed.places[:1]:
        verdict.scores = {place: float(i == winner) for i, place in enumerate(places)}
        verdict.chosen = places[winner]


def _read_point(
    verdict: Verdict, text: str, question: Question, part: int, config: TaskConfig
) -> None:
    said = parse_yes_no(text)
    _note(verdict, {} if said is None else {"exact": 1}, "unparsable" if said is None else "")
    if said is not None:
        verdict.scores[part] = float(said)


def _read_rating(
    verdict: Verdict, text: str, question: Question, part: int, config: TaskConfig
) -> None:
    said = parse_rating(text)
    _note(verdict, {} if said is None else {"exact": 1}, "unparsable" if said is None else "")
    if said is not None:
        verdict.scores[0] = said


def _note(verdict: Verdict, kinds: Mapping[str, int], problem: str) -> None:
    verdict.kinds.update(kinds)
    if problem:
        verdict.kinds[problem] += 1


_READ: dict[str, Callable[[Verdict, str, Question, int, TaskConfig], None]] = {
    "pick": _read_pick, "top": _read_list, "list": _read_list, "pair": _read_pair,
    "point": _read_point, "rating": _read_rating,
}  # fmt: skip


def check_pool(size: int, config: TaskConfig) -> None:
    """Refuse candidate lists that a task cannot show.

    Raises:
        UsageError: More options than letters, or too few candidates to choose from.
    """
    if config.task == "pick" and size > len(ascii_uppercase):
        raise UsageError(
            f"evaluation.pool.size={size}: chat.task=pick has {len(ascii_uppercase)} letters for "
            "its options. Use fewer candidates, or chat.task=top."
        )
    if size < 2:
        raise UsageError(f"evaluation.pool.size={size} must be at least 2.")
