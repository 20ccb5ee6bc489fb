"""Where does a row win? Cases cut by what is known of their targets and histories.

A family (popularity of the target, length of the history, repeat or new, text or none) puts every
case into exactly one of its slices, so slice means weighted by their counts give the overall mean.
Slices depend on data and split alone: they are the same for every row of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmrec.data.interactions import Cases, Dataset, Int64
from llmrec.evaluation.significance import Float64, bootstrap, compare, holm

Facts: TypeAlias = Mapping[str, NDArray[Any]]
"""Column name -> one value per case, (C,); as in ``per_user.parquet``."""

MIN_CASES = 30
"""Slices with fewer cases are shown without interval and p: a percentile bootstrap of a handful of
mostly zero values is far too narrow."""


@dataclass(frozen=True)
class Family:
    """One way to cut the cases."""

    column: str
    """The fact it reads."""
    bounds: tuple[int, ...]
    """The least value of each slice, ascending; the last slice has no upper end."""
    labels: tuple[str, ...]
    """One per slice."""


FAMILIES = {
    "target popularity": Family(
        "target_train_count", (0, 1, 5, 20, 100), ("0 (cold)", "1-4", "5-19", "20-99", "100+")
    ),
    "history length": Family(
        "history_length", (0, 5, 10, 20, 50), ("0-4", "5-9", "10-19", "20-49", "50+")
    ),
    "target": Family("target_repeated", (0, 1), ("new", "repeat")),
    "target text": Family("target_has_text", (0, 1), ("empty", "present")),
}
"""Training interactions with the target; visible interactions of the user; whether the target is
among them; whether the target has a text."""


def case_facts(dataset: Dataset, cases: Cases, train_counts: Int64) -> dict[str, NDArray[Any]]:
    """What slices are cut by, one value per case, in case order.

    Args:
        dataset: The data.
        cases: The questions, C of them.
        train_counts: How often each item was trained on, (N + 1,).

    Returns:
        ``history_length``: visible interactions, int64; ``target_train_count``: training
        interactions with the target, int64; ``target_repeated``: the target is among the visible
        interactions, bool; ``target_has_text``: its rendered text is not empty, bool.
    """
    interactions = dataset.interactions
    targets = interactions.items[cases.target]  # (C,)
    has_text = np.array([False, *(text != "" for text in dataset.catalog.texts)])  # (N + 1,)
    return {
        "history_length": cases.end - interactions.offsets[cases.user],
        "target_train_count": train_counts[targets],
        "target_repeated": _repeated(dataset, cases),
        "target_has_text": has_text[targets],
    }


def _repeated(dataset: Dataset, cases: Cases) -> NDArray[np.bool_]:
    """Whether each target is among the visible interactions of its case, (C,)."""
    interactions = dataset.interactions
    starts = interactions.offsets[cases.user]
    lengths = cases.end - starts
    rows = np.repeat(np.arange(len(cases)), lengths)  # (T',) the case of every visible interaction
    within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    targets = interactions.items[cases.target]
    repeated = np.zeros(len(cases), dtype=np.bool_)
    repeated[rows[interactions.items[starts[rows] + within] == targets[rows]]] = True
    return repeated


def assign(facts: Facts) -> dict[str, tuple[tuple[str, ...], Int64]]:
    """The slice of every case: family -> its labels and an index into them, (C,).

    A family whose column is absent (a run of an older version) is left out.

    Raises:
        ValueError: A value is below the first slice, which no count can be.
    """
    slices = {}
    for name, family in FAMILIES.items():
        if family.column not in facts:
            continue
        index = np.searchsorted(family.bounds, facts[family.column].astype(np.int64), "right") - 1
        if (index < 0).any():
            raise ValueError(f"{family.column} holds a value below {family.bounds[0]}.")
        slices[name] = (family.labels, index.astype(np.int64))
    return slices


def slice_table(
    facts: Facts, values: Float64, baseline: Float64 | None, measures: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """A row's means in every slice, and its paired differences to a baseline.

    Comparable under the same conditions as the overall means; slices of one family differ in
    difficulty, so read a slice across rows, not a row across slices. p is Holm-corrected over the
    tested slices of its family, per measure; a table corrects over its rows as well.

    Args:
        facts: As from `case_facts`, (C,) each.
        values: Per-case values of the row, (S, C, M).
        baseline: Of the baseline, (S', C, M), on the same cases; None for the baseline itself.
        measures: M names.

    Returns:
        Family -> one JSON-ready record per slice, empty ones included: ``slice``; ``cases``;
        ``tested``, false below `MIN_CASES`; ``metrics``: measure -> mean, low, high;
        ``difference``: measure -> difference, low, high, p, p_holm, or None without a baseline.
        What is not known is None: the mean of an empty slice, interval and p where not tested.
    """
    return {
        name: _family(labels, index, values, baseline, measures)
        for name, (labels, index) in assign(facts).items()
    }


def _family(
    labels: Sequence[str],
    index: Int64,
    values: Float64,
    baseline: Float64 | None,
    measures: Sequence[str],
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for place, label in enumerate(labels):
        inside = np.flatnonzero(index == place)
        own = np.take(values, inside, axis=1)  # (S, C', M), laid out as a copy of its own
        other = None if baseline is None else np.take(baseline, inside, axis=1)
        records.append(
            {
                "slice": label,
                "cases": len(inside),
                "tested": len(inside) >= MIN_CASES,
                "metrics": _means(own, measures),
                "difference": None if other is None else _gaps(own, other, measures),
            }
        )
    tested = [r["difference"] for r in records if r["tested"] and r["difference"] is not None]
    for measure in measures:
        adjusted = holm(np.array([difference[measure]["p"] for difference in tested]))
        for difference, p in zip(tested, adjusted, strict=True):
            difference[measure]["p_holm"] = float(p)
    return records


def _means(values: Float64, measures: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Mean and interval of one slice, (S, C', M)."""
    if values.shape[1] >= MIN_CASES:
        found = bootstrap(values)
        return {
            measure: {"mean": i.mean, "low": i.low, "high": i.high}
            for measure, i in zip(measures, found, strict=True)
        }
    return {
        measure: {"mean": mean, "low": None, "high": None}
        for measure, mean in zip(measures, _plain_means(values), strict=True)
    }


def _gaps(a: Float64, b: Float64, measures: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Paired difference a - b of one slice; p_holm is filled in once its family is known."""
    if a.shape[1] >= MIN_CASES:
        return {
            measure: {"difference": c.difference, "low": c.low, "high": c.high, "p": c.p}
            for measure, c in zip(measures, compare(a, b), strict=True)
        }
    means = _plain_means(a.mean(axis=0, keepdims=True) - b.mean(axis=0, keepdims=True))
    unknown: dict[str, float | None] = dict.fromkeys(("low", "high", "p", "p_holm"))
    return {
        measure: {"difference": mean, **unknown}
        for measure, mean in zip(measures, means, strict=True)
    }


def _plain_means(values: Float64) -> list[float | None]:
    """The mean of each measure, or None where there is no case: (S, C', M) -> M values."""
    if values.shape[1] == 0:
        return [None] * values.shape[2]
    return [float(mean) for mean in values.mean(axis=0).mean(axis=0)]
