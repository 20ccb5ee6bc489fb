"""Plain tables: csv, tsv or parquet with named columns."""

from __future__ import annotations

from pathlib import Path

from llmrec.data.columns import Columns
from llmrec.data.readers.config import DataConfig
from llmrec.data.readers.files import Dialect, Table, read_parquet, read_text_table
from llmrec.data.readers.frames import columns_of
from llmrec.errors import UsageError

SUFFIXES = (".csv", ".tsv", ".parquet")


def read(path: Path, config: DataConfig) -> Columns:
    """Read a folder with an interactions file and, optionally, an items file; or one file.

    A single file may carry the items' text itself, in further columns.
    """
    if path.is_file():
        return columns_of(_table(path), None, config)
    interactions = _find(path, "interactions")
    if interactions is None:
        there = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
        raise UsageError(
            f"data.source: {path} holds no interactions.csv, .tsv or .parquet (it holds {there}); "
            "rename the file, or name it itself as data.source."
        )
    items = _find(path, "items")
    described = None if items is None else _table(items)
    return columns_of(_table(interactions), described, config)


def _find(folder: Path, stem: str) -> Path | None:
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UsageError(f"data.source: {folder} holds both {names}; keep one of them.")
    return found[0] if found else None


def _table(path: Path) -> Table:
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"data.source: {path} ends in {path.suffix or 'nothing'}, which data.format=table does "
            f"not read; use one of {', '.join(SUFFIXES)}."
        )
    if path.suffix == ".parquet":
        return read_parquet(path)
    return read_text_table(path, Dialect("," if path.suffix == ".csv" else "\t"))
