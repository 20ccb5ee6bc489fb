"""``llmrec prompts``: write a data set's prompts to a file, one row each.

FILE                   .jsonl or .parquet: input, target, family, template, user, item, split
FILE.indexing.json     what items are called in it
FILE.manifest.json     config, fingerprints, templates, counts; written last: FILE is then whole
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import polars as pl
from polars.io.plugins import register_io_source
from rich import box
from rich.console import Console
from rich.table import Table

import llmrec
from llmrec.data.readers import DataConfig, effective, load_dataset
from llmrec.data.splits import SplitConfig, split
from llmrec.errors import UsageError, exit_code, nearest
from llmrec.options import as_dict, parse
from llmrec.prompting.families import P5Template, load_family_templates
from llmrec.prompting.indexing import (
    Indexing,
    IndexingConfig,
    build_indexing,
    save_indexing,
)
from llmrec.prompting.p5 import Example, PromptConfig, PromptGenerator
from llmrec.runs import sha256_of, sync, write_json

MANIFEST, INDEXING = ".manifest.json", ".indexing.json"
"""What is appended to the name of the prompts' file."""
COLUMNS = ("input", "target", "family", "template", "user", "item", "split")
ROWS_AT_ONCE = 4096
"""Prompts per row group of a parquet file."""


@dataclass(frozen=True)
class PromptsConfig:
    """Write the prompts of a data set to a file."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    indexing: IndexingConfig = field(default_factory=IndexingConfig)
    out: str = ""
    """File to write, ending in .jsonl or .parquet; its manifest and indexing lie beside it."""
    part: Literal["train", "valid", "test"] = "train"
    """train: sampled prompts of every user's training part. valid, test: every case of the split,
    asked with every template of the families, those held out included."""
    only: str = ""
    """Ids of templates to ask valid or test with, comma-separated; empty: all."""
    epochs: int = 1
    """Epochs of training prompts, each drawn anew."""
    seed: int = 0
    """Of the training prompts; valid and test depend on prompts.seed alone. llmrec p5 train reads
    in its first stage those of twice its run.seed, epoch by epoch, and of one more when it trains
    again with the validation part."""
    overwrite: bool = False
    """Whether a file that is there is replaced."""


@dataclass(frozen=True)
class Session:
    """What prompts are made of."""

    generator: PromptGenerator
    templates: tuple[P5Template, ...]
    """All that were read."""
    indexing: Indexing


def open_session(
    data: DataConfig, how: SplitConfig, prompts: PromptConfig, indexing: IndexingConfig
) -> Session:
    """Read and split the data, name its items, and look what can be asked about them."""
    templates = load_family_templates(prompts.templates)  # before anything costly
    dataset = load_dataset(data)
    cut = split(dataset, how)
    names = build_indexing(indexing, dataset, cut.train_end)
    generator = PromptGenerator(dataset, cut, names, templates, prompts)
    return Session(generator, templates, names)


def template_named(templates: Sequence[P5Template], name: str, option: str) -> P5Template:
    """The template with this id.

    Raises:
        UsageError: There is none.
    """
    by_id = {template.id: template for template in templates}
    if name not in by_id:
        raise UsageError(f"--{option} {name}: no template has this id; {nearest(name, by_id)}")
    return by_id[name]


def examples(session: Session, config: PromptsConfig) -> Iterator[Example]:
    """The prompts that a config asks for, one after another."""
    generator = session.generator
    if config.part == "train":
        for epoch in range(1, config.epochs + 1):
            yield from generator.train(config.seed, epoch)
        return
    for template in asked(session, config):
        yield from generator.questions(template, config.part)


def asked(session: Session, config: PromptsConfig) -> tuple[P5Template, ...]:
    """The templates that cases are asked with."""
    names = dict.fromkeys(name.strip() for name in config.only.split(",") if name.strip())
    if names:
        return tuple(template_named(session.templates, name, "only") for name in names)
    families = {one.family for one in session.generator.kinds}
    return tuple(template for template in session.templates if template.family in families)


class Writer:
    """Writes a stream of prompts and counts them; nothing of them is held."""

    def __init__(self, session: Session) -> None:
        """Take the ids that users and items have outside."""
        dataset = session.generator.dataset
        self._users, self._items = dataset.user_ids, ["", *dataset.catalog.ids]
        self.counts: Counter[tuple[str, str]] = Counter()
        """Prompts by family and template."""

    def write(self, path: Path, stream: Iterator[Example]) -> None:
        """Write `path` under a temporary name, which it gets when whole.

        Raises:
            UsageError: It cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(descriptor)
            temporary = Path(name)
            try:
                WRITERS[path.suffix](self, temporary, stream)
                sync(temporary)
                temporary.chmod(0o644)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync(path.parent)
        except (OSError, pl.exceptions.ComputeError) as error:  # the latter where a disk is full
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(
                f"--out {path} cannot be written ({reason}). Free some space or name another file."
            ) from error

    def _rows(self, stream: Iterator[Example]) -> Iterator[tuple[str, ...]]:
        users, items, counts = self._users, self._items, self.counts
        for text, target, family, template, user, item, part in stream:
            counts[family, template] += 1
            yield text, target, family, template, users[user], items[item], part

    def _write_jsonl(self, path: Path, stream: Iterator[Example]) -> None:
        encode = json.JSONEncoder(ensure_ascii=False).encode
        with path.open("w", encoding="utf-8") as file:
            for row in self._rows(stream):
                file.write(encode(dict(zip(COLUMNS, row, strict=True))) + "\n")

    def _write_parquet(self, path: Path, stream: Iterator[Example]) -> None:
        schema = dict.fromkeys(COLUMNS, pl.String)

        def frames(*_: object) -> Iterator[pl.DataFrame]:  # nothing is projected or filtered
            every = self._rows(stream)
            while rows := list(islice(every, ROWS_AT_ONCE)):
                yield pl.DataFrame(rows, schema=schema, orient="row")

        register_io_source(frames, schema=schema).sink_parquet(path, row_group_size=ROWS_AT_ONCE)


WRITERS: dict[str, Callable[[Writer, Path, Iterator[Example]], None]] = {
    ".jsonl": Writer._write_jsonl,
    ".parquet": Writer._write_parquet,
}


def generate(argv: Sequence[str]) -> int:
    """Read, write, and say what came of it."""
    description = "Write a data set's prompts, for training or for testing, to a file."
    config, given = parse(PromptsConfig, argv, "llmrec prompts", description)
    config = replace(config, data=effective(config.data, given))
    out = _checked(config)
    session = open_session(config.data, config.split, config.prompts, config.indexing)
    if config.part != "train":
        ids = [one.id for one in _askable(session, config, config.part)]
        config = replace(config, only=",".join(ids))
    beside = {kind: out.with_name(out.name + kind) for kind in (MANIFEST, INDEXING)}
    writer = Writer(session)
    beside[MANIFEST].unlink(missing_ok=True)  # it vouches for the file that is replaced
    writer.write(out, examples(session, config))
    save_indexing(beside[INDEXING], session.indexing, session.generator.dataset)
    write_json(beside[MANIFEST], _manifest(session, config, writer.counts, out))
    _report(session, config, writer.counts)
    return 0


def _checked(config: PromptsConfig) -> Path:
    """The file to write.

    Raises:
        UsageError: An option is wrong, before anything costly.
    """
    out = Path(config.out)
    if not config.out:
        raise UsageError("--out is missing. Name the file to write, such as --out prompts.jsonl.")
    if out.suffix not in WRITERS:
        raise UsageError(f"--out {out} must end in {' or '.join(WRITERS)}.")
    if out.exists() and not config.overwrite:
        raise UsageError(f"--out {out} exists. Name another or replace it by --overwrite true.")
    if config.epochs < 1 or config.seed < 0:
        raise UsageError(
            f"--epochs {config.epochs} and --seed {config.seed}: use 1 epoch or more and a seed "
            "that is not negative."
        )
    if config.part != "train" and config.epochs != 1:
        raise UsageError(
            f"--epochs {config.epochs} counts training prompts; leave it out for --part "
            f"{config.part}, whose questions are the same every time."
        )
    if config.part == "train" and config.only:
        raise UsageError("--only names templates for --part valid or test; leave it out for train.")
    return out


def _askable(
    session: Session, config: PromptsConfig, part: Literal["valid", "test"]
) -> Iterator[P5Template]:
    """The templates of the families that this part has a case for; all where they are named."""
    for template in asked(session, config):
        reason = session.generator.cannot_ask(template, part)
        if not reason:
            yield template
        elif config.only:
            raise UsageError(reason)
        else:
            session.generator.left_out[template.id] = reason


def _manifest(
    session: Session, config: PromptsConfig, counts: Counter[tuple[str, str]], out: Path
) -> dict[str, Any]:
    dataset = session.generator.dataset
    used = {template for _, template in counts}
    return {
        "prompts": counts.total(),
        "sha256": sha256_of(out),
        "by_family": {
            family: {its: counts[name, its] for name, its in sorted(counts) if name == family}
            for family in dict.fromkeys(family for family, _ in sorted(counts))
        },
        "left_out": session.generator.left_out,
        "users": session.generator.users,
        "users_in_all": dataset.interactions.user_count,
        "users_with_more_than_half_called_wrong": session.generator.crowded,
        "data": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "told_fingerprint": dataset.told_fingerprint(),
        "indexing_fingerprint": session.indexing.fingerprint,
        "templates": {
            template.id: {"version": template.version, "sha256": template.sha256}
            for template in session.templates
            if template.id in used
        },
        "config": as_dict(config),
        "llmrec": llmrec.__version__,
    }


def _report(session: Session, config: PromptsConfig, counts: Counter[tuple[str, str]]) -> None:
    """Print what was written and what was not."""
    held_out = {template.id for template in session.templates if template.held_out}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("family", "prompts", "templates", "of these held out"):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for family in dict.fromkeys(template.family for template in session.templates):
        ids = {template for its, template in counts if its == family}
        if ids:
            total = sum(counts[family, template] for template in ids)
            table.add_row(family, f"{total:,}", str(len(ids)), str(len(ids & held_out)))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    for name, reason in session.generator.left_out.items():
        console.print(f"{name} left out: {reason}")
    if config.part == "train" and session.generator.crowded:
        console.print(
            f"{session.generator.crowded:,} users are told that more than half of the items they "
            "never met are wrong, which gives the held-out ones away by their absence: lower "
            "prompts.candidates."
        )
    console.print(f"{counts.total():,} prompts ({config.part}) written to {config.out}.")


def main(argv: Sequence[str]) -> int:
    """Entry point of ``llmrec prompts``."""
    return exit_code(generate, argv)
