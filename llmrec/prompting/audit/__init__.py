"""``llmrec prompts audit``: whether prompts tell what they are tested on, from their own text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrec.data.audit.findings import Finding
from llmrec.data.interactions import Dataset
from llmrec.data.readers import DataConfig, effective, load_dataset
from llmrec.data.splits import SplitConfig, split
from llmrec.errors import UsageError, exit_code
from llmrec.options import parse
from llmrec.prompting.audit.checks import audit, largest_plus_one
from llmrec.prompting.families import load_family_templates
from llmrec.prompting.generate import (
    COLUMNS,
    INDEXING,
    MANIFEST,
    ROWS_AT_ONCE,
    PromptsConfig,
    Session,
    asked,
    open_session,
)
from llmrec.prompting.indexing import Indexing, IndexingConfig, build_indexing, load_indexing
from llmrec.prompting.p5 import Example, PromptConfig

__all__ = ["audit", "largest_plus_one", "main"]

STYLES = {"ok": "green", "skipped": "dim", "note": "cyan", "warning": "yellow", "fault": "bold red"}
WIDTH = 100
"""Columns, where the output is no terminal."""


@dataclass(frozen=True)
class PromptAuditConfig:
    """Look whether prompts tell what they are tested on."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    indexing: IndexingConfig = field(default_factory=IndexingConfig)
    files: str = ""
    """Files of prompts, comma-separated, all of these data and this split; empty: one epoch of
    training prompts and all test questions are made and looked at."""
    seed: int = 0
    """Of the training prompts, where they are made."""


def read_prompts(path: Path, dataset: Dataset) -> Iterator[Example]:
    """The prompts of a file, one after another.

    Raises:
        UsageError: There is no such file, a row lacks a column, or names a user or an item that
            the data does not have.
    """
    users = {name: user for user, name in enumerate(dataset.user_ids)}
    items = {name: item for item, name in enumerate(dataset.catalog.ids, start=1)}
    for number, row in enumerate(_rows(path), start=1):
        try:
            text, target, family, template, user, item, part = (row[name] for name in COLUMNS)
            yield Example(text, target, family, template, users[user], items[item], part)
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"--files {path} row {number}: {error} is missing, or names no user or item of "
                f"this data. A row has {', '.join(COLUMNS)}; name the data by --data.source."
            ) from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            table = pl.scan_parquet(path)
            for first in itertools.count(0, ROWS_AT_ONCE):
                rows = table.slice(first, ROWS_AT_ONCE).collect()
                if not len(rows):
                    return
                yield from rows.iter_rows(named=True)
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise UsageError(
            f"--files {path} cannot be read ({error}). Name .jsonl or .parquet files of prompts."
        ) from error


def _made(session: Session, config: PromptAuditConfig) -> Iterator[Example]:
    """What ``llmrec prompts`` would write: an epoch, and every test question."""
    yield from session.generator.train(config.seed)
    for template in asked(session, PromptsConfig(part="test")):
        if not session.generator.cannot_ask(template, "test"):
            yield from session.generator.questions(template, "test")


def _names_in(files: Sequence[Path], dataset: Dataset) -> Indexing | None:
    """The indexing that lies beside the files; None where none does.

    Raises:
        UsageError: They were made with different ones.
    """
    beside = [file.with_name(file.name + INDEXING) for file in files]
    found = [load_indexing(path, dataset) for path in beside if path.is_file()]
    if len({indexing.fingerprint for indexing in found}) > 1:
        raise UsageError("--files were made with different indexing; audit them one by one.")
    return found[0] if found else None


def _check_origin(files: Sequence[Path], dataset: Dataset, how: SplitConfig) -> None:
    """Refuse files that their manifest says are of other data or another split."""
    for file in files:
        manifest = file.with_name(file.name + MANIFEST)
        if not manifest.is_file():
            continue
        try:
            about = json.loads(manifest.read_text(encoding="utf-8"))
            of, its = about["fingerprint"], about["config"]["split"]
        except (ValueError, LookupError, TypeError) as error:
            raise UsageError(
                f"{manifest} is damaged; write {file} anew, or delete the manifest."
            ) from error
        if of != dataset.fingerprint() or its != asdict(how):
            raise UsageError(
                f"--files {file} was made of other data or with another split: pass the --data "
                f"and --split options that stand in {manifest}."
            )


def report(argv: Sequence[str]) -> int:
    """Look, and print the table; 1 where there is a fault."""
    description = "Look whether prompts tell what they are tested on. Exit code 1 where they do."
    config, given = parse(PromptAuditConfig, argv, "llmrec prompts audit", description)
    config = replace(config, data=effective(config.data, given))
    if config.seed < 0:
        raise UsageError(f"--seed {config.seed} must not be negative.")
    files = [Path(name.strip()) for name in config.files.split(",") if name.strip()]
    if files:
        dataset, templates = (
            load_dataset(config.data),
            load_family_templates(config.prompts.templates),
        )
        cut = split(dataset, config.split)
        _check_origin(files, dataset, config.split)
        indexing = _names_in(files, dataset)
        indexing = indexing or build_indexing(config.indexing, dataset, cut.train_end)
        prompts: Iterable[Example] = itertools.chain.from_iterable(
            read_prompts(file, dataset) for file in files
        )
    else:
        session = open_session(config.data, config.split, config.prompts, config.indexing)
        dataset, cut = session.generator.dataset, session.generator.cut
        templates, indexing = session.templates, session.indexing
        prompts = _made(session, config)
    findings = audit(prompts, dataset, cut, indexing, templates)
    _print(findings)
    return int(any(finding.verdict == "fault" for finding in findings))


def _print(findings: Sequence[Finding]) -> None:
    """A row per check; what to do stands below what was found."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        words = Text(finding.found)  # a Text: prompts may hold what looks like rich's markup
        if finding.remedy:
            words.append(f"\n-> {finding.remedy}", style="dim")
        table.add_row(finding.check, Text(finding.verdict, STYLES[finding.verdict]), words)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)


def main(argv: Sequence[str]) -> int:
    """Entry point of ``llmrec prompts audit``."""
    return exit_code(report, argv)
