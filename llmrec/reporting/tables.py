"""``llmrec compare``: finished runs, paired on the same users, with intervals, p and cost."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmrec import runs
from llmrec.data.splits import REPAIRS
from llmrec.errors import UsageError, exit_code, nearest
from llmrec.evaluation.metrics import Float64, Measure
from llmrec.evaluation.result import Result, differing, read_result
from llmrec.evaluation.significance import bootstrap, compare, holm

DEFAULT_MEASURES = ("HR@10", "NDCG@10")
ALPHA = 0.05
"""Adjusted p below which a difference is called significant."""
WIDTH = 100
"""Columns, where the output is no terminal."""

COST_COLUMNS = {
    "train_seconds": "train s",
    "encode_seconds": "encode s",
    "trainable_parameters": "trainable",
    "flops": "FLOPs",
    "peak_memory_bytes": "peak memory",
}
"""Entries of a result's cost that tables show, with their headings."""

_SAME = {
    "cases": "the test users and targets",
    "split": "the split",
    "interactions": "the number of interactions",
    "candidates": "the number of candidates",
    "filter_seen": "filter_seen",
    "fit_on": "fit_on",
}
"""What all runs of a table must share."""
_ONE_ROW = {"run.seed", "run.label"}
"""All that the runs of one row may differ in, besides options that move no number."""

_READ = {"users_read": "users", "interactions_read": "interactions"}
_DROPPED = {
    "users_dropped_too_few_interactions": "users with too few interactions",
    "interactions_dropped_with_their_user": "interactions with them",
    "interactions_dropped_beyond_most_recent": "interactions before the most recent",
    "items_dropped_without_interactions": "items without interactions",
    "test_dropped_empty_history": "test users without history",
    "test_dropped_cold": "cold test targets",
}
_KEPT = REPAIRS | {
    "users_too_short_to_judge": "users too short to judge",
    "items_with_empty_text": "items without text",
    "repeat_interactions": "repeat interactions",
    "test_targets_repeated": "repeated test targets",
    "test_targets_cold": "cold test targets",
    "interactions_tied_in_order": "interactions tied in order",
    "train_interactions_after_a_test_target": "training interactions after a test target "
    "(leave-one-out's leak)",
}
"""Entries of a result's data counts that tables show where they are not zero, in words."""

QUALITY_HEADINGS = ("row", "seeds", "mean [95 %]", "difference [95 %]", "p (Holm)")


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


def build_table(results: Sequence[Result], question: Question) -> dict[str, Any]:
    """All numbers of a comparison as one JSON-ready record, which every output shows.

    Raises:
        UsageError: The runs must not share a table, or a label is unknown.
    """
    if not results:
        raise UsageError("No finished run to compare. Name run folders that hold a result.json.")
    _check_comparable(results)
    rows = _rows(results)
    baseline = question.baseline or results[0].label
    for label in (baseline, *(label for pair in question.contrasts for label in pair)):
        if label not in rows:
            raise UsageError(f"No run is labelled {label!r}: {nearest(label, rows)}")
    values = {
        label: np.stack([result.values(question.measures) for result in group])  # (S, U, M)
        for label, group in rows.items()
    }
    family = [(label, baseline) for label in rows if label != baseline]
    differences = dict(zip(family, _compare_family(values, family, question), strict=True))
    contrasts = _compare_family(values, question.contrasts, question)
    first = results[0].record
    return {
        "title": question.title,
        "question": question.text,
        "baseline": baseline,
        "measures": [str(measure) for measure in question.measures],
        "data": first["data"],
        "protocol": first["protocol"],
        "cases": first["cases"],
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


def _check_comparable(results: Sequence[Result]) -> None:
    """Refuse runs whose numbers answer different questions."""

    def settings(result: Result) -> dict[str, Any]:
        record, size = result.record, result.record["data"]["interactions"]
        return {**record["protocol"], "interactions": size, "cases": record["cases"]["fingerprint"]}

    first = settings(results[0])
    by_template: dict[str, Result] = {}  # another text of the same data is a fair comparison
    for result in results:
        other = settings(result)
        for key, what in _SAME.items():
            if first.get(key) != other.get(key):
                values = "" if key == "cases" else f" ({first.get(key)} and {other.get(key)})"
                raise UsageError(
                    f"{_called(results[0])} and {_called(result)} differ in {what}{values}, which "
                    "is never mixed within one table. Compare them apart or run one of them again."
                )
        data = result.record["data"]
        same_text = by_template.setdefault(data["template_sha256"], result)
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
    values: Mapping[str, Float64], pairs: Sequence[tuple[str, str]], question: Question
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
            for m, (measure, c) in enumerate(zip(question.measures, row, strict=True))
        }
        for pair, row in enumerate(compared)
    ]


def _mean_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each entry's mean over the row's seeds; one that a run does not have is left out."""
    shared = [name for name in costs[0] if all(isinstance(c.get(name), int | float) for c in costs)]
    return {name: float(np.mean([cost[name] for cost in costs])) for name in shared}


# From the record to text: every output is made of these rows of cells.


def _seeds(row: Mapping[str, Any]) -> str:
    return "one seed" if len(row["seeds"]) == 1 else f"{len(row['seeds'])} seeds"


def _difference_cells(difference: Mapping[str, float] | None) -> tuple[str, str]:
    if difference is None:
        return "baseline", ""
    d = difference
    star = " *" if d["p_holm"] < ALPHA else ""
    return (
        f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]",
        f"{d['p_holm']:.4f}{star}",
    )


def _quality_rows(record: Mapping[str, Any], measure: str) -> list[tuple[list[str], bool]]:
    """Cells of one measure's rows, and whether the row is the best and significantly so."""
    best = max(row["metrics"][measure]["mean"] for row in record["rows"])
    lines = []
    for row in record["rows"]:
        value = row["metrics"][measure]
        difference = row["difference"] and row["difference"][measure]
        mean = f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
        bold = bool(value["mean"] == best and difference and difference["p_holm"] < ALPHA)
        lines.append(([row["label"], _seeds(row), mean, *_difference_cells(difference)], bold))
    return lines


def _contrast_rows(record: Mapping[str, Any]) -> list[list[str]]:
    return [
        [f"{pair['a']} - {pair['b']}", measure, *_difference_cells(pair["difference"][measure])]
        for pair in record["contrasts"]
        for measure in record["measures"]
    ]


def _cost_rows(record: Mapping[str, Any]) -> list[list[str]]:
    return [
        [row["label"], *(_amount(name, row["cost"].get(name)) for name in COST_COLUMNS)]
        for row in record["rows"]
    ]


def _amount(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.endswith("_seconds"):
        return f"{value:.1f}"
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.0f} MB"
    return f"{value:,.0f}" if value < 1e9 else f"{value:.2e}"


def _notes(record: Mapping[str, Any]) -> list[str]:
    """The lines below the tables: data, protocol, legend."""
    data, protocol = record["data"], record["protocol"]
    notes = [
        f"Data: {data['name']} ({data['source']}), {data['users']:,} users, "
        f"{data['items']:,} items, {data['interactions']:,} interactions, "
        f"fingerprint {data['fingerprint'][:12]}.",
        _preparation(data["counts"], protocol["order"]),
        f"Protocol: {protocol['split']}, fit_on {protocol['fit_on']}, {record['cases']['count']:,} "
        f"test cases, {protocol['candidates']:,} candidates, "
        f"filter_seen {protocol['filter_seen']}, ties {protocol['ties']}.",
        f"Differences are paired on the same users and taken to {record['baseline']}; p: sign-flip "
        f"permutation, Holm-corrected over the rows; * p < {ALPHA}. "
        "Bold: the best, where its difference to the baseline has a *.",
    ]
    if any(len(row["seeds"]) == 1 for row in record["rows"]):
        notes.append("One seed: the interval covers users only, not training the row anew.")
    if any(len(row["seeds"]) > 1 for row in record["rows"]):
        notes.append(
            "Several seeds: intervals and p cover users and seeds; costs are means per run."
        )
    return notes


def _preparation(counts: Mapping[str, int], order: str) -> str:
    """What was read, what was dropped of it, and what is odd about the rest, as far as any was."""

    def listed(words: Mapping[str, str]) -> str:
        return ", ".join(f"{counts[k]:,} {word}" for k, word in words.items() if counts.get(k))

    parts = {"Read": listed(_READ), "Dropped": listed(_DROPPED), "Includes": listed(_KEPT)}
    said = [f"{what}: {numbers}." for what, numbers in parts.items() if numbers]
    return " ".join([*said, f"Ordered by {order}."])


_CONTRAST_HEADINGS = ("contrast", "measure", "difference [95 %]", "p (Holm)")
_COST_HEADINGS = ("cost", *COST_COLUMNS.values())


def print_table(record: Mapping[str, Any], console: Console) -> None:
    """Show a comparison in the terminal: quality, contrasts, cost, notes."""
    if record["title"]:
        console.print(escape(record["title"]), style="bold")
    if record["question"]:
        console.print(escape(record["question"]), style="italic")
    for measure in record["measures"]:
        lines = _quality_rows(record, measure)
        _print_grid(
            console, (measure, *QUALITY_HEADINGS[1:]), [c for c, _ in lines], [b for _, b in lines]
        )
    if record["contrasts"]:
        _print_grid(console, _CONTRAST_HEADINGS, _contrast_rows(record), [])
    _print_grid(console, _COST_HEADINGS, _cost_rows(record), [])
    for note in _notes(record):
        console.print(escape(note), style="dim", highlight=False)


def _print_grid(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[bool]
) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        number = place > 0
        table.add_column(
            heading,
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number and console.width >= WIDTH,  # a long label gives way to the numbers
        )
    for place, row in enumerate(rows):
        strong = bool(bold) and bold[place]
        table.add_row(*map(Text, row), style="bold" if strong else "")
    console.print(table)


def to_markdown(record: Mapping[str, Any]) -> str:
    """The same tables as Markdown."""
    parts = [f"## {record['title']}\n"] if record["title"] else []
    parts += [f"{record['question']}\n"] if record["question"] else []
    for measure in record["measures"]:
        lines = [
            [
                f"**{cell}**" if bold and place in (0, 2) else cell
                for place, cell in enumerate(cells)
            ]
            for cells, bold in _quality_rows(record, measure)
        ]
        parts.append(_markdown_grid((measure, *QUALITY_HEADINGS[1:]), lines))
    if record["contrasts"]:
        parts.append(_markdown_grid(_CONTRAST_HEADINGS, _contrast_rows(record)))
    parts.append(_markdown_grid(_COST_HEADINGS, _cost_rows(record)))
    parts.append(
        "\n".join(f"- {note.replace('*', chr(92) + '*')}" for note in _notes(record)) + "\n"
    )
    return "\n".join(parts)


def _markdown_grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    # Pipes would open a cell, a lone star emphasis.
    cells = [[c.replace("|", "\\|").replace(" *", " \\*") for c in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


class _Parser(argparse.ArgumentParser):
    """Mistakes are one sentence, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help.")


def _parser() -> _Parser:
    parser = _Parser(
        prog="llmrec compare",
        description="Finished runs in one table, paired on the same users: quality, p and cost.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run folder, or a folder of run folders"
    )
    parser.add_argument(
        "--baseline", metavar="LABEL", help="row the others are compared with (the first run's)"
    )
    parser.add_argument(
        "--measures", nargs="+", default=DEFAULT_MEASURES, help="such as HR@10 NDCG@10 AUC"
    )
    parser.add_argument(
        "--contrast", nargs=2, action="append", default=[], metavar=("A", "B"),
        help="compare two more rows; a Holm family of their own; may be repeated",
    )  # fmt: skip
    parser.add_argument("--title", default="", help="printed above the tables")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables as Markdown"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    return parser


def run_folders(named: Sequence[Path]) -> list[Path]:
    """Run folders; a folder that is no run stands for the finished runs inside it, by name."""
    folders: list[Path] = []
    for path in named:
        inside = sorted(path.glob(f"*/{runs.RESULT}")) if path.is_dir() else []
        whole = (path / runs.RESULT).exists() or not inside
        folders += [path] if whole else [file.parent for file in inside]
    return folders


def write_files(record: Mapping[str, Any], markdown: Path | None, json: Path | None) -> None:
    """Write a comparison as Markdown, as JSON, or both."""
    if markdown:
        runs.write_atomically(markdown, to_markdown(record).encode())
    if json:
        runs.write_json(json, record)


def console() -> Console:
    """The terminal, or plain text of a fixed width where there is none."""
    found = Console(emoji=False)  # a label such as a:x:b is shown as it is
    return found if found.is_terminal else Console(width=WIDTH, emoji=False)


def _compare(argv: Sequence[str]) -> int:
    options = _parser().parse_args(list(argv))
    question = Question(
        baseline=options.baseline,
        measures=[Measure.parse(name) for name in options.measures],
        contrasts=[(a, b) for a, b in options.contrast],
        title=options.title,
    )
    results = [read_result(folder) for folder in run_folders(list(map(Path, options.runs)))]
    record = build_table(results, question)
    print_table(record, console())
    write_files(record, options.markdown, options.json)
    return 0


def main(argv: Sequence[str]) -> int:
    """``llmrec compare RUN RUN ...``; 2 for a user's mistake."""
    return exit_code(_compare, argv)
