"""RecBole's atomic files: name.inter and name.item, tab separated, headers like user_id:token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmrec.data.columns import Columns
from llmrec.data.readers.config import DataConfig
from llmrec.data.readers.files import Dialect, Table, clip, read_text_table
from llmrec.data.readers.frames import columns_of
from llmrec.errors import UsageError

_TYPES = {"token", "token_seq", "float", "float_seq"}


def read(path: Path, config: DataConfig) -> Columns:
    """Read the one .inter file of a folder, or a given one, and the .item file of the same name."""
    if path.is_dir():
        found = sorted(path.glob("*.inter"))
        if len(found) != 1:
            names = ", ".join(entry.name for entry in found or sorted(path.iterdir())) or "nothing"
            raise UsageError(
                f"data.source: {path} must hold exactly one .inter file for data.format=recbole "
                f"(it holds {names}); name one file itself as data.source."
            )
        path = found[0]
    items = path.with_suffix(".item")
    described = _atomic(items) if items.is_file() else None
    return columns_of(_atomic(path), described, config)


def _atomic(path: Path) -> Table:
    # No quoting in atomic files: a title may begin with a quotation mark and mean it.
    table = read_text_table(path, Dialect("\t", quote=None))
    renamed: dict[str, str] = {}
    for header in table.frame.columns:
        name, _, kind = header.rpartition(":")
        if not name or kind not in _TYPES:
            raise UsageError(
                f"{path} has the column header {clip(header)} (line 1); atomic files "
                "(data.format=recbole) name each column with its type, like user_id:token "
                f"({', '.join(sorted(_TYPES))})."
            )
        if name in renamed.values():
            raise UsageError(
                f"{path} names two columns {clip(name)} (line 1); give each column a name of "
                "its own."
            )
        renamed[header] = name
    return replace(table, frame=table.frame.rename(renamed))
