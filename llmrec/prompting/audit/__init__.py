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
from llmrec.data.interactions import Dataset, Split
from llmrec.data.readers import DataConfig, effective, load_dataset
from llmrec.data.splits import SplitConfig, fit_ends, split
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.result import read_result
from llmrec.options import parse
from llmrec.prompting.audit.checks import audit, largest_plus_one
from llmrec.prompting.families import P5Template, load_family_templates
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
from llmrec.prompting.p5 import Example, PromptConfig, PromptGenerator
from llmrec.runs import CONFIG

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
    run: str = ""
    """Folder of a finished run of llmrec p5 train, whose data, split, prompts and names are taken
    and whose training prompts are made again: those of the model that was tested, all epochs."""
    epochs: int = 1
    """Epochs of training prompts that are made; of a run at most so many, where this is given."""
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


@dataclass(frozen=True)
class Looked:
    """What is looked at, and what it must keep to."""

    prompts: Iterable[Example]
    dataset: Dataset
    cut: Split
    indexing: Indexing
    templates: tuple[P5Template, ...]


def _made(session: Session, epochs: int, seed: int) -> Iterator[Example]:
    """What ``llmrec prompts`` would write: some epochs, and every test question."""
    for epoch in range(1, epochs + 1):
        yield from session.generator.train(seed, epoch)
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


def _of_session(session: Session, cut: Split, epochs: int, seed: int) -> Looked:
    prompts = _made(session, epochs, seed)
    return Looked(prompts, session.generator.dataset, cut, session.indexing, session.templates)


def _of_files(files: Sequence[Path], config: PromptAuditConfig) -> Looked:
    dataset = load_dataset(config.data)
    templates = load_family_templates(config.prompts.templates)
    cut = split(dataset, config.split)
    _check_origin(files, dataset, config.split)
    indexing = _names_in(files, dataset)
    indexing = indexing or build_indexing(config.indexing, dataset, cut.train_end)
    prompts = itertools.chain.from_iterable(read_prompts(file, dataset) for file in files)
    return Looked(prompts, dataset, cut, indexing, templates)


def _of_run(folder: Path, most: int | None) -> Looked:
    """What the tested model of a run was trained on, at most so many epochs of it.

    Raises:
        UsageError: There is no such run, or its data is not what it was.
    """
    from llmrec.prompting.train_p5 import INDEXING as NAMES  # here: it loads torch
    from llmrec.prompting.train_p5 import P5Config

    record = read_result(folder).record
    if "p5" not in record:
        raise UsageError(f"--run {folder} was not trained on prompts. Name a run of p5 train.")
    its, _ = parse(P5Config, ["--config", str(folder / CONFIG)], "llmrec prompts audit", "")
    templates, dataset = load_family_templates(its.prompts.templates), load_dataset(its.data)
    if dataset.fingerprint() != record["data"]["fingerprint"]:
        raise UsageError(
            f"the data is no longer that which {folder} was trained with. Put it back, or train "
            "again."
        )
    # Trained again with the validation part: only what comes after that is held out.
    again = its.run.fit_on == "train+valid"
    ends = fit_ends(dataset.interactions, its.split, its.run.fit_on)
    cut = replace(split(dataset, its.split), train_end=ends)
    indexing = load_indexing(folder / NAMES, dataset)
    generator = PromptGenerator(dataset, cut, indexing, templates, its.prompts)
    trained = record["cost"]["refit_epochs" if again else "epochs"]
    epochs = trained if most is None else min(most, trained)
    session = Session(generator, templates, indexing)
    return _of_session(session, cut, epochs, 2 * its.run.seed + again)


def report(argv: Sequence[str]) -> int:
    """Look, and print the table; 1 where there is a fault."""
    description = "Look whether prompts tell what they are tested on. Exit code 1 where they do."
    config, given = parse(PromptAuditConfig, argv, "llmrec prompts audit", description)
    config = replace(config, data=effective(config.data, given))
    if config.seed < 0 or config.epochs < 1:
        raise UsageError(
            f"--epochs {config.epochs} and --seed {config.seed}: use 1 epoch or more and a seed "
            "that is not negative."
        )
    files = [Path(name.strip()) for name in config.files.split(",") if name.strip()]
    if config.run:
        if ignored := sorted(set(given) - {"run", "epochs"}):
            raise UsageError(f"--run tells all but --epochs: leave out --{', --'.join(ignored)}.")
        looked = _of_run(Path(config.run), config.epochs if "epochs" in given else None)
    elif files:
        if ignored := sorted({"epochs", "seed"} & set(given)):
            raise UsageError(
                f"--{ignored[0]} is of prompts that are made: leave it out with --files."
            )
        looked = _of_files(files, config)
    else:
        session = open_session(config.data, config.split, config.prompts, config.indexing)
        looked = _of_session(session, session.generator.cut, config.epochs, config.seed)
    findings = audit(looked.prompts, looked.dataset, looked.cut, looked.indexing, looked.templates)
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
