"""``llmrec data audit``: what in a data set would make an evaluation say more than is true.

Each check is a function of a data set and its split that returns one `Finding`; ``CHECKS`` lists
them in the order of the table. They see the data as a run would: ordered, filtered, split. What is
lost by then (the order of the rows in the file, ids of items that nobody met) no check speaks of.
Where ids or texts agree by accident the count is compared with what chance gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrec.data.audit import ids, order, repeats, sizes, texts, times
from llmrec.data.audit.findings import Finding, Verdict
from llmrec.data.interactions import Dataset, Split
from llmrec.data.readers import DataConfig, effective, load_dataset
from llmrec.data.splits import SplitConfig, split
from llmrec.errors import exit_code
from llmrec.options import as_dict, parse
from llmrec.runs import write_json

Check = Callable[[Dataset, Split], Finding]

CHECKS: tuple[Check, ...] = (
    order.ties,
    order.sorted_sequences,
    order.sorted_ties,
    times.time_values,
    times.bulk_times,
    repeats.repeats,
    repeats.repeated_targets,
    repeats.duplicate_rows,
    repeats.duplicate_users,
    sizes.users_dropped,
    sizes.unmet_items,
    sizes.rare_items,
    sizes.core,
    sizes.lengths,
    sizes.popularity,
    sizes.target_only_items,
    sizes.cold_targets,
    sizes.told,
    times.training_after_test,
    ids.next_number,
    ids.numbered_along_users,
    ids.numbered_in_time,
    texts.empty_texts,
    texts.short_texts,
    texts.shared_texts,
    texts.codes_as_texts,
    ids.ids_in_texts,
    texts.markup,
    texts.encoding,
    texts.control_characters,
)
"""All of them, in the order of the table."""

STYLES: dict[Verdict, str] = {
    "ok": "green",
    "skipped": "dim",
    "note": "cyan",
    "warning": "yellow",
    "fault": "bold red",
}
WIDTH = 100
"""Columns, where the output is no terminal."""


@dataclass(frozen=True)
class AuditConfig:
    """Look for what would mislead an evaluation on a data set."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    json: str = ""
    """File to write the findings to as well; empty writes none."""
    fail_on: Literal["never", "warning", "fault"] = "never"
    """The least verdict that makes the exit code 1."""


def audit(data: Dataset, cut: Split) -> list[Finding]:
    """Every check's finding, in the order of ``CHECKS``."""
    return [check(data, cut) for check in CHECKS]


def report(argv: Sequence[str]) -> int:
    """Audit a data set, print the table, and write the findings where asked to."""
    description = "Look for what would make an evaluation on a data set say more than is true."
    config, given = parse(AuditConfig, argv, "llmrec data audit", description)
    config = replace(config, data=effective(config.data, given))
    data = load_dataset(config.data)
    cut = split(data, config.split)
    findings = audit(data, cut)
    if config.json:
        records = [
            asdict(finding) | {"share": finding.count / finding.of if finding.of else None}
            for finding in findings
        ]
        about = {"data": data.name, "fingerprint": data.fingerprint(), "config": as_dict(config)}
        write_json(Path(config.json), about | {"findings": records})
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(_head(data, cut, config.split), highlight=False, markup=False)
    console.print(_table(findings))
    console.print(_summary(findings), highlight=False, markup=False)
    severity = ("never", "fault", "warning").index(config.fail_on)
    failing = ("fault", "warning")[:severity]
    return int(any(finding.verdict in failing for finding in findings))


def _head(data: Dataset, cut: Split, config: SplitConfig) -> str:
    return (
        f"{data.name}: {len(data.user_ids):,} users, {data.item_count:,} items, "
        f"{len(data.interactions.items):,} interactions ordered by {data.order}; split "
        f"{config.method}, {len(cut.test):,} test cases; fingerprint {data.fingerprint()[:12]}"
    )


def _table(findings: Iterable[Finding]) -> Table:
    """A row per check; what to do stands below what was found."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        words = Text(finding.found)  # a Text: titles may hold what looks like rich's markup
        if finding.remedy:
            words.append(f"\n-> {finding.remedy}", style="dim")
        table.add_row(finding.check, Text(finding.verdict, STYLES[finding.verdict]), words)
    return table


def _summary(findings: Sequence[Finding]) -> str:
    seen = Counter(finding.verdict for finding in findings)
    counted = ((seen[verdict], verdict) for verdict in reversed(STYLES) if seen[verdict])
    return ", ".join(
        f"{count} {verdict}{'s' * (count > 1 and verdict not in ('ok', 'skipped'))}"
        for count, verdict in counted
    )


def main(argv: Sequence[str]) -> int:
    """``llmrec data audit``."""
    return exit_code(report, argv)
