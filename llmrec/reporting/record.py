"""All numbers of a comparison of finished runs as one record; every output shows what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.errors import UsageError, nearest
from llmrec.evaluation.metrics import Float64, Measure
from llmrec.evaluation.ratings import middle_of, seed_intervals
from llmrec.evaluation.result import Result, differing
from llmrec.evaluation.significance import bootstrap, compare, holm
from llmrec.evaluation.slices import FAMILIES, slice_table
from llmrec.reporting.published import Published

DEFAULT_MEASURES = ("HR@10", "NDCG@10")

_SAME = {
    "cases": "the test users and targets",
    "split": "the split",
    "interactions": "the number of interactions",
    "candidates": "the candidates",
    "filter_seen": "filter_seen",
    "fit_on": "fit_on",
}
"""What all runs of a table must share; of rankings all, of predicted ratings what they have."""
_DATA = ("split", "interactions", "fit_on")
"""Of these, what predicted ratings must share with rankings that they stand beside."""
VARIABLE = [rule for rule in _SAME if rule != "cases"]
"""Rules that rows may differ in on purpose. The test users never: tests are paired on them."""
_ONE_ROW = {"run.seed", "run.label"}
"""All that the runs of one row may differ in, besides options that move no number."""

BEYOND = (
    "coverage", "gini", "mean_popularity", "popularity_lift", "novelty", "intra_list_similarity",
)  # fmt: skip
"""Entries of a result's beyond_accuracy that tables show."""


@dataclass(frozen=True)
class Question:
    """What a table is asked to show."""

    baseline: str | None = None
    """Label of the row every other is compared with; None: the first run's."""
    measures: Sequence[Measure] = tuple(map(Measure.parse, DEFAULT_MEASURES))
    contrasts: Sequence[tuple[str, str]] = ()
    """Further pairs of labels to compare, a family of their own."""
    title: str = ""
    """Printed above the tables."""
    text: str = ""
    """The question in words, printed under the title."""
    slices: bool = False
    """Whether every row is also shown per slice of the test users."""
    beyond_accuracy: bool = False
    """Whether coverage, Gini, popularity, novelty and likeness within lists are shown."""
    published: Sequence[Published] = ()
    """Others' numbers to print beside ours, where they are of the same data."""
    varies: Sequence[str] = ()
    """Rules of the protocol that rows differ in on purpose, such as filter_seen."""


def build_table(results: Sequence[Result], question: Question) -> dict[str, Any]:
    """All numbers of a comparison as one JSON-ready record, which every output shows.

    Only where asked for, it also holds ``slices`` and ``beyond_accuracy`` (and each row its own),
    ``published``, and ``varies`` (and each row, as ``protocol``, its values of those rules).

    Raises:
        UsageError: The runs must not share a table, or a label is unknown.
    """
    if not results:
        raise UsageError("No finished run to compare. Name run folders that hold a result.json.")
    ratings, results = [r for r in results if r.rates], [r for r in results if not r.rates]
    check_varies(question.varies)
    if not results:
        return _only_ratings(ratings, question)
    _check_comparable(results, question.varies)
    _check_beside(results, ratings, question.varies)
    rows = _rows(results)
    baseline = question.baseline or results[0].label
    for label in (baseline, *(label for pair in question.contrasts for label in pair)):
        if label not in rows:
            raise UsageError(f"No run is labelled {label!r}: {nearest(label, rows)}")
    values = {
        label: np.stack([result.values(question.measures) for result in group])  # (S, U, M)
        for label, group in rows.items()
    }
    lists = {label: _settings(group[0])["candidates"] for label, group in rows.items()}
    family = [(label, baseline) for label in rows if label != baseline]
    # A difference between rows on other candidate lists would be one between the lists.
    family = [(a, b) for a, b in family if lists[a] == lists[b] or not _lists_vary(results)]
    differences = dict(zip(family, _compare_family(values, family, question.measures), strict=True))
    for a, b in question.contrasts:
        if lists[a] != lists[b] and _lists_vary(results):
            raise UsageError(
                f"{a} and {b} were ranked on other candidate lists ({lists[a]} and {lists[b]}), so "
                "their difference says nothing. Leave this contrast out."
            )
    contrasts = _compare_family(values, question.contrasts, question.measures)
    first = results[0].record
    record: dict[str, Any] = {
        "title": question.title,
        "question": question.text,
        "baseline": baseline,
        "measures": [str(measure) for measure in question.measures],
        "data": first["data"],
        "protocol": first["protocol"],
        "cases": first["cases"],
        "versions": sorted({_made_with(result) for result in results}),
        "rows": [
            {
                "label": label,
                "seeds": [result.seed for result in group],
                "folders": [str(result.folder) for result in group],
                "metrics": _means(values[label], question.measures),
                "difference": differences.get((label, baseline)),
                "cost": _mean_cost([result.record["cost"] for result in group]),
            }
            for label, group in rows.items()
        ],
        "contrasts": [
            {"a": a, "b": b, "difference": difference}
            for (a, b), difference in zip(question.contrasts, contrasts, strict=True)
        ],
    }
    if ratings:
        record["ratings"] = _rating_rows(ratings, baseline)
    if question.varies:
        _add_rules(record, [*results, *ratings], question.varies)
    if question.slices:
        _add_slices(record, rows, values, question.measures)
    if question.beyond_accuracy:
        _add_beyond_accuracy(record, rows)
    if question.published:
        record["published"] = _published(question.published, first)
    return record


def _lists_vary(results: Sequence[Result]) -> bool:
    """Whether any of the runs was ranked on candidate lists, rather than on all items."""
    return any("pool" in result.record["protocol"] for result in results)


def _only_ratings(results: Sequence[Result], question: Question) -> dict[str, Any]:
    """The record of runs that predict ratings and rank nothing."""
    baseline, labels = question.baseline or results[0].label, [r.label for r in results]
    if baseline not in labels:
        raise UsageError(f"No run is labelled {baseline!r}: {nearest(baseline, labels)}")
    of_rankings = {
        "contrasts": question.contrasts,
        "measures": tuple(map(str, question.measures)) != DEFAULT_MEASURES,
        "slices": question.slices,
        "beyond_accuracy": question.beyond_accuracy,
        "expected": question.published,
    }
    for option, asked in of_rankings.items():
        if asked:
            raise UsageError(
                f"{option} is about rows that rank, and these predict ratings. Leave it out; every "
                "row shows RMSE, MAE and AUC and is held against the baseline."
            )
    _check_comparable(results, question.varies)
    first = results[0].record
    record = {
        "title": question.title,
        "question": question.text,
        "baseline": baseline,
        "measures": [],
        "data": first["data"],
        "protocol": first["protocol"],
        "cases": first["cases"],
        "versions": sorted({_made_with(result) for result in results}),
        "rows": [],
        "contrasts": [],
        "ratings": _rating_rows(results, baseline),
    }
    if question.varies:
        _add_rules(record, results, question.varies)
    return record


def _rating_rows(results: Sequence[Result], baseline: str) -> list[dict[str, Any]]:
    """Runs that predict ratings; after those of the same cases the means that they must beat.

    Where the baseline is one of them, the others' squared errors are held against its own.
    """
    lines: list[dict[str, Any]] = []
    by_cases: dict[str, list[Result]] = {}
    for result in results:
        by_cases.setdefault(result.record["cases"]["fingerprint"], []).append(result)
    for group in by_cases.values():
        _check_same_ratings(group)
        rows, first = _rows(group), group[0].record
        differences = _error_differences(rows, baseline)
        for label, runs in rows.items():
            lines.append(_rating_row(label, runs) | {"difference": differences.get(label)})
        for name, metrics in first["means"].items():
            if name not in rows:
                told = {"label": name, "seeds": [], "metrics": metrics, "unpredicted": 0}
                lines.append(told | {"cases": first["cases"]["count"], "difference": None})
    return lines


def _rating_row(label: str, runs: Sequence[Result]) -> dict[str, Any]:
    """A row's measures: means over its seeds, with intervals that cover them."""
    metrics = runs[0].record["metrics"]["test"]
    if len(runs) > 1:
        truth, predicted = _stars(runs)
        metrics = {
            name: {k: None if np.isnan(v) else v for k, v in asdict(interval).items()}
            for name, interval in seed_intervals(truth, predicted).items()
        }
    return {
        "label": label,
        "seeds": [run.seed for run in runs],
        "folders": [str(run.folder) for run in runs],
        "metrics": metrics,
        "cases": runs[0].record["cases"]["count"],
        "unpredicted": float(np.mean([run.record["unpredicted"] for run in runs])),
        "cost": _mean_cost([run.record["cost"] for run in runs]),
    }


def _stars(runs: Sequence[Result]) -> tuple[Float64, Float64]:
    """The truth, (C,), and what each run predicted, (S, C); NaN where it predicted nothing."""
    predicted = np.stack([run.per_user["predicted"].to_numpy() for run in runs])
    return runs[0].per_user["stars"].to_numpy(), predicted


def _check_same_ratings(group: Sequence[Result]) -> None:
    """Refuse runs on the same cases whose data hold other ratings of them."""
    truth = group[0].per_user["stars"]
    for result in group:
        if not result.per_user["stars"].equals(truth):
            raise UsageError(
                f"{_called(group[0])} and {_called(result)} predict other ratings of the same "
                "cases. Compare them apart or run one of them again."
            )


def _error_differences(
    rows: Mapping[str, Sequence[Result]], baseline: str
) -> dict[str, dict[str, float]]:
    """By label: the mean squared error less the baseline's, paired on the cases."""
    values: dict[str, Float64] = {}
    for label, runs in rows.items():
        truth, predicted = _stars(runs)
        told = np.where(np.isnan(predicted), middle_of(truth), predicted)
        values[label] = ((told - truth) ** 2)[:, :, None]  # (S, C, 1)
    if baseline not in values:
        return {}
    pairs = [(label, baseline) for label in values if label != baseline]
    found = _compare_family(values, pairs, ("MSE",))
    return {a: difference["MSE"] for (a, _), difference in zip(pairs, found, strict=True)}


def _made_with(result: Result) -> str:
    versions = result.record.get("versions", {})
    return ", ".join(f"{name} {versions.get(name, '?')}" for name in ("llmrec", "torch"))


def check_varies(rules: Sequence[str]) -> None:
    """Refuse a name that is no rule which rows may differ in."""
    for rule in rules:
        if rule not in VARIABLE:
            raise UsageError(
                f"varies: {rule} is no rule that rows may differ in: {nearest(rule, VARIABLE)}"
            )


def _settings(result: Result) -> dict[str, Any]:
    """A run's value of every rule in `_SAME`."""
    record, size = result.record, result.record["data"]["interactions"]
    settings = {"interactions": size, "cases": record["cases"]["fingerprint"]}
    pool = record["protocol"].get("pool")
    if pool is not None:  # as many of others are other candidates
        how = f"{Path(pool['source']).name}, seed {pool['seed']}, lists {pool['sha256'][:12]}"
        settings["candidates"] = f"{pool['size']} per case: {how}"
    return {**record["protocol"], **settings}


def _check_beside(
    ranked: Sequence[Result], ratings: Sequence[Result], varies: Sequence[str]
) -> None:
    """Refuse predicted ratings of other data, or of other rules, than the rankings beside them."""
    known = {result.record["data"]["fingerprint"] for result in ranked}
    for result in ratings:
        if result.record["data"]["fingerprint"] not in known:
            told = [f"{_called(r)} ({_data_of(r)})" for r in (ranked[0], result)]
            raise UsageError(
                f"{' and '.join(told)} are of other data, which never share a table. Compare them "
                "apart, or run one of them again."
            )
    _check_comparable([ranked[0], *ratings], varies, _DATA)


def _data_of(result: Result) -> str:
    data = result.record["data"]
    return f"{data['name']}, fingerprint {data['fingerprint'][:12]}"


def _check_comparable(
    results: Sequence[Result], varies: Sequence[str], rules: Iterable[str] = tuple(_SAME)
) -> None:
    """Refuse runs whose numbers answer different questions."""
    first = _settings(results[0])
    # Another text of the same data is a fair comparison; so are fewer of its interactions, if asked
    # for. Otherwise the interactions are the same number here.
    by_template: dict[tuple[str, int], Result] = {}
    for result in results:
        other = _settings(result)
        for key in rules:
            if key not in varies and first.get(key) != other.get(key):
                values = "" if key == "cases" else f" ({first.get(key)} and {other.get(key)})"
                raise UsageError(
                    f"{_called(results[0])} and {_called(result)} differ in {_SAME[key]}{values}, "
                    "which is never mixed within one table unasked. Compare them apart, run one of "
                    f"them again{', or name it in varies' if key in VARIABLE else ''}."
                )
        data = result.record["data"]
        same_text = by_template.setdefault((data["template_sha256"], data["interactions"]), result)
        if data["fingerprint"] != same_text.record["data"]["fingerprint"]:
            raise UsageError(
                f"The data changed between {_called(same_text)} and {_called(result)} (fingerprint "
                f"{same_text.record['data']['fingerprint'][:12]} and {data['fingerprint'][:12]}). "
                "Compare them apart or run one of them again."
            )


def _called(result: Result) -> str:
    return str(result.folder or result.label)


def _rows(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Runs by label, in the order given; each row's runs differ in seed alone."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        row = rows.setdefault(result.label, [])
        for other in row:
            if other.seed == result.seed:
                raise UsageError(
                    f"{_called(other)} and {_called(result)} are both {result.label} with seed "
                    f"{result.seed}. Leave one out, or give it a --run.label of its own."
                )
            changed = differing(other.identity(), result.identity())
            changed = [name for name in changed if name not in _ONE_ROW]
            if changed:
                raise UsageError(
                    f"{_called(other)} and {_called(result)} are both labelled {result.label} but "
                    f"differ in {', '.join(changed)}. Give one of them a --run.label of its own."
                )
        row.append(result)
    return rows


def _means(values: Float64, measures: Sequence[Measure]) -> dict[str, dict[str, float]]:
    return {
        str(measure): {"mean": i.mean, "low": i.low, "high": i.high}
        for measure, i in zip(measures, bootstrap(values), strict=True)
    }


def _compare_family(
    values: Mapping[str, Float64],
    pairs: Sequence[tuple[str, str]],
    measures: Sequence[Measure | str],
) -> list[dict[str, dict[str, float]]]:
    """Paired differences of pairs of rows; p is corrected over the pairs, per measure."""
    if not pairs:
        return []
    compared = [compare(values[a], values[b]) for a, b in pairs]  # per pair, per measure
    adjusted = np.stack(
        [holm(np.array(ps)) for ps in zip(*([c.p for c in row] for row in compared), strict=True)]
    )  # (M, pairs)
    return [
        {
            str(measure): {
                "difference": c.difference,
                "low": c.low,
                "high": c.high,
                "p": c.p,
                "p_holm": float(adjusted[m, pair]),
            }
            for m, (measure, c) in enumerate(zip(measures, row, strict=True))
        }
        for pair, row in enumerate(compared)
    ]


def _mean_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each entry's mean over the row's seeds; one that a run does not have is left out."""
    shared = [name for name in costs[0] if all(isinstance(c.get(name), int | float) for c in costs)]
    return {name: float(np.mean([cost[name] for cost in costs])) for name in shared}


def _add_rules(record: dict[str, Any], results: Sequence[Result], varies: Sequence[str]) -> None:
    """Which of the rules do differ, and each row's values of them; None where it has no such."""
    settings = {(result.rates, result.label): _settings(result) for result in results}
    ranked = [(row, settings[False, row["label"]]) for row in record["rows"]]
    ratings = [row for row in record.get("ratings", []) if row["seeds"]]
    rated = [(row, settings[True, row["label"]]) for row in ratings]
    record["varies"] = [
        rule
        for rule in varies
        if any(len({str(told.get(rule)) for _, told in kind}) > 1 for kind in (ranked, rated))
    ]
    for row, told in [*ranked, *rated]:
        row["protocol"] = {rule: told.get(rule) for rule in record["varies"]}


def _add_slices(
    record: dict[str, Any],
    rows: Mapping[str, Sequence[Result]],
    values: Mapping[str, Float64],
    measures: Sequence[Measure],
) -> None:
    """Every row's slices, cut by what the baseline's first run knows of the cases."""
    per_user = rows[record["baseline"]][0].per_user
    columns = {name: family.column for name, family in FAMILIES.items()}
    known = [column for column in columns.values() if column in per_user.columns]
    facts = {column: per_user.get_column(column).to_numpy() for column in known}
    names = list(map(str, measures))
    for row in record["rows"]:
        label = row["label"]
        other = None if label == record["baseline"] else values[record["baseline"]]
        row["slices"] = slice_table(facts, values[label], other, names)
    _correct_over_rows(record["rows"], names)
    unknown = [name for name, column in columns.items() if column not in known]
    record["slices"] = {"families": list(record["rows"][0]["slices"]), "unknown": unknown}


def _correct_over_rows(rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> None:
    """Holm over all tested slices of all rows, per family and measure: what one table shows."""
    for family in rows[0]["slices"]:
        cells = [
            cell["difference"]
            for row in rows
            for cell in row["slices"][family]
            if cell["tested"] and cell["difference"] is not None
        ]
        for measure in measures:
            adjusted = holm(np.array([cell[measure]["p"] for cell in cells]))
            for cell, p in zip(cells, adjusted, strict=True):
                cell[measure]["p_holm"] = float(p)


def _add_beyond_accuracy(record: dict[str, Any], rows: Mapping[str, Sequence[Result]]) -> None:
    """Every row's means over its seeds; None where a run has no such numbers."""
    cutoffs: dict[int, Result] = {}
    for row in record["rows"]:
        group = rows[row["label"]]
        found = [result.record.get("beyond_accuracy") for result in group]
        row["beyond_accuracy"] = _over_seeds(found) if all(found) else None
        cutoffs |= {f["cutoff"]: result for f, result in zip(found, group, strict=True) if f}
    if len(cutoffs) > 1:
        (a, one), (b, other), *_ = cutoffs.items()
        raise UsageError(
            f"{_called(one)} keeps {a} items per user and {_called(other)} {b}, so their lists "
            "cannot be compared. Run them with one evaluation.top_k, or leave beyond accuracy out."
        )
    record["beyond_accuracy"] = {"cutoff": next(iter(cutoffs), None)}


def _over_seeds(found: Sequence[Any]) -> dict[str, dict[str, float | None] | None]:
    """Mean of each measure over seeds and their standard deviation, None for one seed."""
    means: dict[str, dict[str, float | None] | None] = {}
    for name in BEYOND:
        values = [f[name]["mean"] if isinstance(f.get(name), dict) else f.get(name) for f in found]
        if any(value is None for value in values):
            means[name] = None  # such as the likeness of items without text
            continue
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        means[name] = {"mean": float(np.mean(values)), "sd": spread}
    return means


def _published(files: Sequence[Published], first: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the files that speak of the same data and rules; why the others are left out."""
    shown: dict[str, Any] = {"rows": [], "notes": [], "left_out": []}
    for file in files:
        refusal = file.refusal(first["data"], first["protocol"])
        if refusal:
            shown["left_out"].append({"file": file.name, "because": refusal})
        else:
            shown["rows"] += [dict(row, file=file.name) for row in file.rows]
            shown["notes"] += [file.note] if file.note else []
    return shown
