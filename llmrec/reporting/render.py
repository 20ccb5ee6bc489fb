"""From the record of a comparison to text: terminal, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmrec import runs
from llmrec.data.splits import REPAIRS
from llmrec.evaluation.ratings import RATING_MEASURES
from llmrec.evaluation.slices import MIN_CASES

ALPHA = 0.05
"""Adjusted p below which a difference is called significant."""
WIDTH = 100
"""Columns, where the output is no terminal."""

COST_COLUMNS = {
    "train_seconds": "train s",
    "encode_seconds": "encode s",
    "cache_seconds": "cache s",
    "ask_seconds": "asking s",
    "prompt_tokens": "tokens in",
    "completion_tokens": "tokens out",
    "money": "money",
    "trainable_parameters": "trainable",
    "flops": "FLOPs",
    "peak_memory_bytes": "peak memory",
}
"""Entries of a result's cost that tables show, with their headings."""
FEW_ROWS = ("cache_seconds", "ask_seconds", "prompt_tokens", "completion_tokens", "money")
"""Those that are shown only where a row has them."""

BEYOND_COLUMNS = {
    "coverage": ("coverage\n% of items", 100, ".1f"),
    "gini": ("Gini\n0 to 1", 1, ".3f"),
    "mean_popularity": ("popularity\ncount", 1, ",.1f"),
    "popularity_lift": ("lift\n%", 100, "+.0f"),
    "novelty": ("novelty\nbits", 1, ".2f"),
    "intra_list_similarity": ("likeness\ncosine", 1, ".3f"),
}
"""Entries of a row's beyond_accuracy: heading with unit, factor, format."""

_READ = {"users_read": "users", "interactions_read": "interactions"}
_DROPPED = {
    "users_dropped_too_few_interactions": "users with too few interactions",
    "interactions_dropped_with_their_user": "interactions with them",
    "users_dropped_outside_sample": "users outside the sample",
    "interactions_dropped_outside_sample": "interactions with them",
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


@dataclass(frozen=True)
class Grid:
    """One table as text: every output is made of these."""

    headings: Sequence[str]
    """A line break in one stands before its unit or count."""
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the cells to stress."""
    prose: frozenset[int] = frozenset({0})
    """Columns of words, which may be broken into lines; the others are numbers."""


def grids(record: Mapping[str, Any]) -> list[Grid]:
    """All tables of a comparison, in the order they are shown."""
    found = [_rules(record)] if record.get("varies") else []
    found += [_quality(record, measure) for measure in record["measures"]]
    if record["contrasts"]:
        found.append(_contrasts(record))
    if "published" in record and record["published"]["rows"]:
        found.append(_published(record))
    if "slices" in record:
        found += [
            _slices(record, family, measure)
            for family in _telling_families(record)
            for measure in record["measures"]
        ]
    if any(row.get("beyond_accuracy") for row in record["rows"]):
        found.append(_beyond(record))
    if "ratings" in record:
        found.append(_ratings(record))
    if any(row["difference"] for row in record.get("ratings", [])):
        found.append(_rating_differences(record))
    return [*found, _cost(record)]


def _ratings(record: Mapping[str, Any]) -> Grid:
    """Predicted ratings, in stars; AUC of 4 stars and more against fewer."""
    unanswered = any(row["unpredicted"] for row in record["ratings"])  # else an empty column
    rows = [
        [
            row["label"],
            _seeds(row),
            *(_rating(row["metrics"][name]) for name in RATING_MEASURES),
            f"{row['cases']:,}",
            *([f"{row['unpredicted']:,g}"] if unanswered else []),
        ]
        for row in record["ratings"]
    ]
    last = ("cases", "no answer") if unanswered else ("cases",)
    return Grid(("ratings", "seeds", *RATING_MEASURES, *last), rows)


def _seeds(row: Mapping[str, Any]) -> str:
    """How often a row was trained; a mean that every result holds is no run."""
    count = len(row["seeds"])
    return {0: "-", 1: "one seed"}.get(count, f"{count} seeds")


def _rating_differences(record: Mapping[str, Any]) -> Grid:
    """Squared errors held against those of the baseline, case by case."""
    rows = [
        [row["label"], *_difference_cells(row["difference"])]
        for row in record["ratings"]
        if row["difference"] is not None
    ]
    heading = f"less {record['baseline']}'s [95 %]"
    return Grid(("mean squared error", heading, "p (Holm)"), rows)


def _rating(value: Mapping[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _rules(record: Mapping[str, Any]) -> Grid:
    told = [row for row in (*record["rows"], *record.get("ratings", [])) if row.get("protocol")]
    rows = [
        [row["label"], *("-" if value is None else str(value) for value in values)]
        for row in told
        for values in [list(row["protocol"].values())]
        if any(value is not None for value in values)
    ]
    return Grid(("protocol", *record["varies"]), rows)


def _significant(difference: Mapping[str, float | None] | None) -> bool:
    p = difference["p_holm"] if difference else None
    return p is not None and p < ALPHA


def _difference_cells(
    difference: Mapping[str, float] | None, without: str = "baseline"
) -> tuple[str, str]:
    if difference is None:
        return without, ""
    d = difference
    star = " *" if _significant(d) else ""
    return (
        f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]",
        f"{d['p_holm']:.4f}{star}",
    )


def _quality(record: Mapping[str, Any], measure: str) -> Grid:
    """One measure of every row; the best is bold where it is significantly so."""
    best = max(row["metrics"][measure]["mean"] for row in record["rows"])
    lines, bold = [], set()
    for place, row in enumerate(record["rows"]):
        value = row["metrics"][measure]
        difference = row["difference"] and row["difference"][measure]
        mean = f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
        without = "baseline" if row["label"] == record["baseline"] else "other lists"
        lines.append([row["label"], _seeds(row), mean, *_difference_cells(difference, without)])
        if value["mean"] == best and _significant(difference):
            bold |= {(place, 0), (place, 2)}
    headings = (measure, "seeds", "mean [95 %]", "difference [95 %]", "p (Holm)")
    return Grid(headings, lines, frozenset(bold))


def _contrasts(record: Mapping[str, Any]) -> Grid:
    lines = [
        [f"{pair['a']} - {pair['b']}", measure, *_difference_cells(pair["difference"][measure])]
        for pair in record["contrasts"]
        for measure in record["measures"]
    ]
    return Grid(("contrast", "measure", "difference [95 %]", "p (Holm)"), lines)


def _published(record: Mapping[str, Any]) -> Grid:
    """Others' numbers: they were not run here, so nothing is tested and nothing is bold."""
    measures = record["measures"]
    lines = [
        [
            row["name"],
            *(f"{row['metrics'][m]:.4f}" if m in row["metrics"] else "-" for m in measures),
            row["source"],
            row["differences"],
        ]
        for row in record["published"]["rows"]
    ]
    words = frozenset({0, len(measures) + 1, len(measures) + 2})
    return Grid(("published", *measures, "source", "what differs"), lines, prose=words)


def _telling_families(record: Mapping[str, Any]) -> list[str]:
    """Families that cut the cases at all; the others are told in a note."""
    first = record["rows"][0]["slices"]
    return [name for name in record["slices"]["families"] if len(_filled(first[name])) > 1]


def _filled(slices: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [part for part in slices if part["cases"]]


def _slices(record: Mapping[str, Any], family: str, measure: str) -> Grid:
    """One measure in every slice of one family; in a slice the best is bold as in the whole."""
    parts = record["rows"][0]["slices"][family]
    means = [
        [s["metrics"][measure]["mean"] for s in row["slices"][family]] for row in record["rows"]
    ]
    lines, bold = [], set()
    for place, row in enumerate(record["rows"]):
        cells = [row["label"]]
        for column, part in enumerate(row["slices"][family]):
            mean = means[place][column]
            star = _significant(part["difference"] and part["difference"][measure])
            cells.append(_slice_cell(mean, part["tested"], star))
            if star and mean == max(line[column] for line in means):
                bold.add((place, column + 1))
        lines.append(cells)
    headings = [f"{measure}\nby {family}", *(f"{p['slice']}\n{_cases(p['cases'])}" for p in parts)]
    return Grid(headings, lines, frozenset(bold))


def _slice_cell(mean: float | None, tested: bool, star: bool) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}{' *' if star else ''}" if tested else f"({mean:.4f})"


def _cases(count: int) -> str:
    return f"{count:,} case{'' if count == 1 else 's'}"


def _beyond(record: Mapping[str, Any]) -> Grid:
    lines = []
    for row in record["rows"]:
        found = row["beyond_accuracy"] or dict.fromkeys(BEYOND_COLUMNS)
        cells = [
            _beyond_cell(found[name], factor, form)
            for name, (_, factor, form) in BEYOND_COLUMNS.items()
        ]
        lines.append([row["label"], *cells])
    first = f"beyond accuracy\ntop {record['beyond_accuracy']['cutoff']}"
    return Grid((first, *(heading for heading, _, _ in BEYOND_COLUMNS.values())), lines)


def _beyond_cell(value: Mapping[str, float | None] | None, factor: int, form: str) -> str:
    if value is None or value["mean"] is None:
        return "-"
    mean = f"{factor * value['mean']:{form}}"
    if value["sd"] is None:
        return mean
    return f"{mean} ±{factor * value['sd']:{form.lstrip('+')}}".replace("±0.", "±.")


def _cost(record: Mapping[str, Any]) -> Grid:
    rows = [*record["rows"], *(row for row in record.get("ratings", []) if row["seeds"])]
    # Only tuned rows cache, only chat rows ask, some for money; else the column would be empty.
    shown = {
        name: title
        for name, title in COST_COLUMNS.items()
        if name not in FEW_ROWS or any(row["cost"].get(name) for row in rows)
    }
    lines = [[row["label"], *(_amount(n, row["cost"].get(n)) for n in shown)] for row in rows]
    return Grid(("cost", *shown.values()), lines)


def _ranked(record: Mapping[str, Any]) -> str:
    """The rules of rankings, where there are any."""
    if not record["rows"]:
        return ""
    protocol = record["protocol"] | dict.fromkeys(record.get("varies", []), "varies")
    seen, ties = protocol["filter_seen"], protocol["ties"]
    return f", {_candidates(protocol)}, filter_seen {seen}, ties {ties}"


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
    data, varies = record["data"], record.get("varies", [])
    protocol = record["protocol"] | dict.fromkeys(varies, "varies")
    notes = [
        f"Data: {data['name']} ({data['source']}), {data['users']:,} users, "
        f"{data['items']:,} items, {data['interactions']:,} interactions, "
        f"fingerprint {data['fingerprint'][:12]}.",
        _preparation(data["counts"], protocol["order"]),
        f"Protocol: {protocol['split']}, fit_on {protocol['fit_on']}, {record['cases']['count']:,} "
        f"test cases{_ranked(record)}.",
        f"Differences are paired on the same users and taken to {record['baseline']}; p: sign-flip "
        f"permutation, Holm-corrected over the rows; * p < {ALPHA}. "
        "Bold: the best, where its difference to the baseline has a *.",
    ]
    if record.get("failed"):
        notes.append(
            f"Failed and not in the table: {'; '.join(record['failed'])}. Run the suite again."
        )
    if record.get("contrasts_lost"):
        notes.append(f"Contrasts lost with them: {'; '.join(record['contrasts_lost'])}.")
    if len(record["versions"]) > 1:
        notes.append(f"Made with different versions: {'; '.join(record['versions'])}.")
    if varies:
        notes.append(
            f"These rows differ in {' and '.join(varies)} on purpose: the differences are those of "
            "the protocol."
        )
        if "candidates" in varies and "pool" in record["protocol"]:
            notes[-1] += " Rows on other candidate lists are not compared."
    seeds = [len(row["seeds"]) for row in (*record["rows"], *record.get("ratings", []))]
    if 1 in seeds:
        notes.append("One seed: the interval covers users only, not training the row anew.")
    if any(count > 1 for count in seeds):
        notes.append(
            "Several seeds: intervals and p cover users and seeds; costs are means per run."
        )
    if any(row["metrics"]["AUC"]["mean"] is None for row in record.get("ratings", [])):
        notes.append(
            "No AUC: all or none of the items are liked (4 stars and more), or the ratings are not "
            "of .5 to 5 stars."
        )
    if "published" in record:
        notes += _published_notes(record["published"])
    if "slices" in record:
        notes += _slice_notes(record)
    if "beyond_accuracy" in record:
        notes += _beyond_notes(record)
    return notes


def _candidates(protocol: Mapping[str, Any]) -> str:
    """What the target was ranked among, in words."""
    count, pool = protocol["candidates"], protocol.get("pool")
    if count == "varies":
        return "varying candidates"
    if pool is None:
        return f"{count:,} candidates"
    users = "all" if pool["users"] == "all" else f"{pool['users']:,}"
    source = Path(pool["source"]).name
    return f"{count:,} candidates per case ({source}, seed {pool['seed']}, {users} users)"


def _published_notes(published: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Published numbers {left['file']} are left out, for they are of other data or rules: "
        f"{left['because']}."
        for left in published["left_out"]
    ]
    if published["rows"]:
        told = " ".join(["Published numbers were not run here and are tested against nothing.",
                         *published["notes"]])  # fmt: skip
        notes.append(told)
    return notes


def _slice_notes(record: Mapping[str, Any]) -> list[str]:
    telling, slices = _telling_families(record), record["rows"][0]["slices"]
    notes = [
        f"Slices: means of the cases in each; * p < {ALPHA} against {record['baseline']}, "
        "Holm-corrected over all rows and slices of one table, not over tables; (in "
        f"parentheses): fewer than {MIN_CASES} cases, not tested; -: none. Slices differ in "
        "difficulty: read down a column."
    ]
    for family in record["slices"]["families"]:
        if family not in telling:
            notes += [f"By {family}: all {_cases(p['cases'])} are {p['slice']}."
                      for p in _filled(slices[family])]  # fmt: skip
    if record["slices"]["unknown"]:
        notes.append(
            f"Not cut by {', '.join(record['slices']['unknown'])}: {record['baseline']} was run by "
            "an older version, which did not keep what that takes; run it again."
        )
    return notes


def _beyond_notes(record: Mapping[str, Any]) -> list[str]:
    found = [row["beyond_accuracy"] for row in record["rows"] if row["beyond_accuracy"]]
    notes = []
    if found:
        notes.append(
            "Beyond accuracy: coverage: candidates that are in anybody's list; Gini: 0 where all "
            "items are shown equally often, near 1 where few are; popularity: mean training "
            "interactions of the items shown; lift: that against the users' own histories; "
            "novelty: mean -log2 of an item's share of training interactions; likeness: mean "
            "cosine of two items of a list in TF-IDF space. Nothing here is tested."
        )
    if found and "pool" in record["protocol"]:
        notes.append(
            "Its lists are drawn from each case's own candidates, coverage from all items."
        )
    if any(value and value["sd"] is not None for row in found for value in row.values()):
        notes.append("± is the standard deviation over seeds, next to their mean.")
    without = [row["label"] for row in record["rows"] if row["beyond_accuracy"] is None]
    if without:
        notes.append(
            f"Beyond accuracy lacks {', '.join(without)}: run by an older version, which did not "
            "keep it; run again."
        )
    return notes


def _preparation(counts: Mapping[str, int], order: str) -> str:
    """What was read, what was dropped of it, and what is odd about the rest, as far as any was."""

    def listed(words: Mapping[str, str]) -> str:
        return ", ".join(f"{counts[k]:,} {word}" for k, word in words.items() if counts.get(k))

    parts = {"Read": listed(_READ), "Dropped": listed(_DROPPED), "Includes": listed(_KEPT)}
    said = [f"{what}: {numbers}." for what, numbers in parts.items() if numbers]
    return " ".join([*said, f"Ordered by {order}."])


def print_table(record: Mapping[str, Any], console: Console) -> None:
    """Show a comparison in the terminal: its tables, then the notes."""
    if record["title"]:
        console.print(escape(record["title"]), style="bold")
    if record["question"]:
        console.print(escape(record["question"]), style="italic")
    for grid in grids(record):
        _print_grid(grid, console)
    for note in _notes(record):
        console.print(escape(note), style="dim", highlight=False)


def _print_grid(grid: Grid, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(grid.headings):
        number = place not in grid.prose
        table.add_column(
            Text(heading, justify="right" if number else "left"),
            overflow="fold",
            no_wrap=number and console.width >= WIDTH,  # a long label gives way to the numbers
        )
    columns = [_aligned(grid, place) for place in range(len(grid.headings))]
    for row, cells in enumerate(zip(*columns, strict=True)):
        styles = ["bold" if (row, place) in grid.bold else "" for place in range(len(cells))]
        table.add_row(*map(Text, cells, styles))
    console.print(table)


def _aligned(grid: Grid, place: int) -> list[str]:
    """The cells of a column: numbers end in one line, whether or not a star comes after."""
    cells = [row[place] for row in grid.rows]
    if place in grid.prose:
        return cells
    stars = any(cell.endswith(" *") for cell in cells)
    cells = [f"{c}  " if stars and not c.endswith(" *") else c for c in cells]
    width = max(map(len, [*grid.headings[place].split("\n"), *cells]))
    return [cell.rjust(width) for cell in cells]


def to_markdown(record: Mapping[str, Any]) -> str:
    """The same tables as Markdown."""
    parts = [f"## {record['title']}\n"] if record["title"] else []
    parts += [f"{record['question']}\n"] if record["question"] else []
    parts += map(_markdown_grid, grids(record))
    parts.append(
        "\n".join(f"- {note.replace('*', chr(92) + '*')}" for note in _notes(record)) + "\n"
    )
    return "\n".join(parts)


def _markdown_grid(grid: Grid) -> str:
    def cell(text: str) -> str:  # pipes would open a cell, a lone star emphasis
        return text.replace("|", "\\|").replace(" *", " \\*").replace("\n", ", ")

    lines = [
        [cell(heading) for heading in grid.headings],
        ["---" if place in grid.prose else "---:" for place in range(len(grid.headings))],
        *(
            [
                f"**{cell(text)}**" if (row, column) in grid.bold else cell(text)
                for column, text in enumerate(cells)
            ]
            for row, cells in enumerate(grid.rows)
        ),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
