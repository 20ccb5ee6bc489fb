"""Verdicts added up: one score per candidate, how answers were understood, and bias by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmrec.chat.plan import Plan, templates_of
from llmrec.chat.requests import Answer
from llmrec.chat.tasks import Verdict
from llmrec.data.interactions import Int64
from llmrec.evaluation.metrics import MEASURES, Float64, Measure, Ranking

ONE_REQUEST = ("pick", "top", "list")
"""Tasks that ask about all candidates at once, so that a place in the prompt can be favoured."""
PLACE_BINS = 10
"""Longer prompts show hit rates for so many stretches of places."""


@dataclass
class Tally:
    """What a run's answers come to."""

    scores: Float64
    """(C, K) in the pool's order; NaN where no answer names a candidate."""
    kinds: Counter[str] = field(default_factory=Counter)
    """How answers and their parts were understood."""
    hits: Float64 = field(default_factory=lambda: np.zeros(0))
    """(K,) by the truth's place as shown: hits, ties averaged; one asking each."""
    askings: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """(K,) by the truth's place as shown."""
    chosen: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """(K,) how often the candidate shown there came out on top."""
    first: Int64 = field(default_factory=lambda: np.zeros(2, np.int64))
    """Pairs won by the first and by the second named; `pair` only."""


def tally(plan: Plan, answers: Iterable[Answer]) -> Tally:
    """Add all answers up; one that is missing counts as no answer."""
    shape = plan.items.shape
    found = Tally(
        np.full(shape, np.nan),
        hits=np.zeros(shape[1]),
        askings=np.zeros(shape[1], np.int64),
        chosen=np.zeros(shape[1], np.int64),
    )
    for answer in answers:
        place, verdict = plan.judge(answer)
        found.kinds.update(verdict.kinds)
        for candidate, score in verdict.scores.items():
            before = found.scores[place.case, candidate]
            found.scores[place.case, candidate] = score + (0.0 if np.isnan(before) else before)
        if plan.config.task in ONE_REQUEST:
            _note_place(found, plan, place.case, place.shuffle, verdict)
        elif plan.config.task == "pair" and verdict.scores:
            _note_pair(found, verdict)
    return found


def cutoff(plan: Plan) -> int:
    """K of the hit rate by place: 1 for a pick, else as long as the list asked for, at most 10."""
    return 1 if plan.config.task == "pick" else min(10, plan.config.list_length)


def _note_place(found: Tally, plan: Plan, case: int, shuffle: int, verdict: Verdict) -> None:
    order = plan.order(case, shuffle)
    shown = np.empty(len(order), dtype=np.int64)
    shown[order] = np.arange(len(order))
    if verdict.chosen is not None:
        found.chosen[shown[verdict.chosen]] += 1
    truth = plan.question(case, shuffle).truth
    if truth is None:
        return
    found.askings[truth] += 1
    score = verdict.scores.get(int(order[truth]))
    if score is not None:
        greater = sum(other > score for other in verdict.scores.values())
        equal = sum(other == score for other in verdict.scores.values()) - 1
        found.hits[truth] += min(max((cutoff(plan) - greater) / (equal + 1), 0.0), 1.0)


def _note_pair(found: Tally, verdict: Verdict) -> None:
    first, second = verdict.scores.values()  # in the order named
    found.first[0] += first > second
    found.first[1] += second > first


def answered_measures(plan: Plan, found: Tally) -> list[Measure]:
    """The measures that the answers say something about.

    A pick that names one candidate orders no others, and a list of ten ends there: deeper cut-offs
    and the AUC would count what was never asked for as wrong.
    """
    depth, task = plan.items.shape[1], plan.config.task
    if task == "pick" and set(found.kinds) - {"token", "invalid", "failed"}:
        depth = 1
    elif task == "top":
        depth = plan.config.list_length
    ordered = task in ("pair", "point") or (task == "pick" and depth > 1)
    return [m for m in MEASURES if (ordered if not m.cutoff else ordered or m.cutoff <= depth)]


def ranking_of(plan: Plan, found: Tally, top_k: int) -> Ranking:
    """The cases' ranking; a target that no answer names is a miss."""
    interactions, cases = plan.dataset.interactions, plan.cases
    targets = interactions.items[cases.target]
    return Ranking.from_scores(
        found.scores, plan.items, targets, cases.user.astype(np.int64), top_k
    )


def report(plan: Plan, found: Tally) -> dict[str, Any]:
    """How the answers were understood and where in the prompt the hits lie.

    It follows from the answers alone: no times and no attempts, so that a resumed run writes the
    same bytes.
    """
    record: dict[str, Any] = {
        "task": plan.config.task,
        "cases": len(plan.cases),
        "requests": plan.count,
        "templates": templates_of(plan.config),
        "understood": dict(sorted(found.kinds.items())),
    }
    if plan.config.task in ONE_REQUEST:
        record["places"] = _places(plan, found)
    if plan.config.task == "pair":
        record["pairs"] = {
            "first_named_wins": int(found.first[0]),
            "second_named_wins": int(found.first[1]),
        }
    return record


def _places(plan: Plan, found: Tally) -> dict[str, Any]:
    """Hit rate by the truth's place, share of answers by place, and whether truths lie evenly."""
    size = len(found.askings)
    bins = np.array_split(np.arange(size), min(size, PLACE_BINS if size > 26 else size))
    asked = np.array([found.askings[places].sum() for places in bins])
    hits = np.array([found.hits[places].sum() for places in bins])
    chosen = np.array([found.chosen[places].sum() for places in bins])
    rates = [float(h / a) if a else None for h, a in zip(hits, asked, strict=True)]
    known = [rate for rate in rates if rate is not None]
    return {
        "measure": f"HR@{cutoff(plan)}",
        "places": [_span(places) for places in bins],
        "truths": asked.tolist(),
        "hit_rate": rates,
        "best_minus_worst": max(known) - min(known) if known else 0.0,
        "put_first": chosen.tolist(),
    }


def _span(places: Int64) -> str:
    first, last = int(places[0]) + 1, int(places[-1]) + 1
    return str(first) if first == last else f"{first}-{last}"
