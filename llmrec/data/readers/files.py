"""Files as tables that know where each row stands; damage in a file is one sentence with its place.

polars reads; what it would let pass without a word (rows too short, columns renamed, other
encodings) is looked for here with the csv module, which also knows the line of every row.
"""

from __future__ import annotations

import csv
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from llmrec.errors import UsageError

SHOWN = 60
"""Characters of a file's content that a message quotes: a line may have ten million."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
NUL = "\0"


@dataclass(frozen=True)
class Dialect:
    """How a text file separates and quotes its fields."""

    separator: str
    quote: str | None = '"'
    """None: quotation marks mean nothing."""


@dataclass(frozen=True)
class Table:
    """One file's rows and how to find them in it again."""

    path: Path
    frame: pl.DataFrame
    dialect: Dialect | None = None
    """None for parquet, which has rows and no lines."""
    counts: dict[str, int] = field(default_factory=dict)
    """What was repaired in reading it."""

    @property
    def header(self) -> str:
        """The place of the header, for messages: nothing in parquet."""
        return f" ({self.where(-1)})" if self.dialect else ""

    def where(self, row: int) -> str:
        """The place of a row of ``frame``: its line in a text file, else its number from 1."""
        if self.dialect is None:
            return f"row {row + 1}"
        records = (record for record in _records(self.path, self.dialect) if record.fields)
        for number, record in enumerate(records):
            if number == row + 1:  # record 0 is the header
                return f"line {record.line}"
        return f"row {row + 1} after the header"


@dataclass(frozen=True)
class _Record:
    line: int
    """Line it begins in, from 1; with quoted line breaks it has several."""
    fields: list[str]
    raw: str


def clip(value: object) -> str:
    """A value as a message quotes it."""
    text = repr(value[: SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN + 2 else f"{text[:SHOWN]}..."


def read_text_table(path: Path, dialect: Dialect) -> Table:
    """A delimited text file with a header, every column as strings, so that id 007 stays 007.

    Blank lines are dropped and spaces around headers are removed, both counted.

    Raises:
        UsageError: The file is empty, not UTF-8, or a row does not fit the header.
    """
    header = _header(path, dialect)
    try:
        frame = pl.read_csv(
            path, separator=dialect.separator, quote_char=dialect.quote, infer_schema=False
        )
    except pl.exceptions.PolarsError as error:
        _survey(path, dialect, header, refused=True)
        raise UsageError(
            f"{path} cannot be read as a table separated by {dialect.separator!r} "
            f"({str(error).splitlines()[0][:SHOWN]}); {_remedy(dialect)}."
        ) from error
    counts = {}
    # polars fills a short row with nulls, so the last column of one is null.
    if frame[:, -1].has_nulls() or _contains(path, dialect.quote or NUL, NUL):
        blank, spanning = _survey(path, dialect, header)
        counts = {"blank_lines_dropped": len(blank), "lines_inside_quoted_values": spanning}
        if blank:
            kept = ~pl.int_range(frame.height, eager=True).is_in(pl.Series(blank).implode())
            frame = frame.filter(kept)
    names = [name.strip() for name in header]
    counts["headers_with_spaces_trimmed"] = sum(a != b for a, b in zip(names, header, strict=True))
    if len(names) != frame.width:
        raise UsageError(f"{path} has a header that cannot be read (line 1); {_remedy(dialect)}.")
    frame.columns = names
    return Table(path, frame, dialect, counts)


def read_parquet(path: Path) -> Table:
    """A parquet file with its own types."""
    try:
        return Table(path, pl.read_parquet(path))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        reason = str(error).splitlines()[0][:SHOWN]  # a panic: the file is damaged inside
        raise UsageError(f"{path} cannot be read as parquet ({reason}); write it anew.") from error


def _header(path: Path, dialect: Dialect) -> list[str]:
    """The names in the first line that is not blank."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); check the file's permissions."
        ) from error
    if start in _UTF16:
        raise UsageError(f"{path} is UTF-16, not UTF-8 (line 1); save it as UTF-8.")
    first = next((record for record in _records(path, dialect) if record.fields), None)
    if first is None:
        raise UsageError(f"{path} is empty; it needs a header and rows.")
    _check_characters(path, first, first.fields)
    if "\r" in first.raw.rstrip("\r\n"):
        raise UsageError(
            f"{path} ends its lines with carriage returns alone (line 1); save it with line feeds."
        )
    names = [name.strip() for name in first.fields]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"{path} names two columns {clip(name)} (line {first.line}); give each column a "
                "name of its own."
            )
    return first.fields


def _records(path: Path, dialect: Dialect) -> Iterator[_Record]:
    """Every row of a text file, the header first, blank lines as rows without fields.

    Raises:
        UsageError: A quotation mark stands where none can.
    """
    begun: list[str] = []
    line = 1
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:

        def lines() -> Iterator[str]:
            for text in file:
                begun.append(text)
                # A carriage return within a line is a character like any other, as for polars.
                yield text.rstrip("\r\n").replace("\r", " ") + "\n"

        limit = csv.field_size_limit(sys.maxsize)  # a title may have ten million characters
        try:
            for fields in csv.reader(
                lines(),
                delimiter=dialect.separator,
                quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
                strict=True,
            ):
                yield _Record(line, fields, "".join(begun))
                line += len(begun)
                begun.clear()
        except csv.Error as error:
            raise UsageError(
                f"{path} has a quotation mark out of place in the row that begins in line {line} "
                f"({error}); {_remedy(dialect)}."
            ) from error
        finally:
            csv.field_size_limit(limit)


def _survey(
    path: Path, dialect: Dialect, header: list[str], refused: bool = False
) -> tuple[list[int], int]:
    """Check every row; the numbers of the blank ones, and how many lines quoted values go on for.

    Args:
        path: The file.
        dialect: How it is read.
        header: The names of its columns.
        refused: Whether polars could not read it, so that some row is at fault.

    Raises:
        UsageError: The first row at fault, with its line and column.
    """
    blank, spanning, row = [], 0, -1  # the header is row -1
    records = _records(path, dialect)
    for record in records:  # blank lines before the header are no rows
        if record.fields:
            break
    for row, record in enumerate(records):
        if not record.fields:
            blank.append(row)
            continue
        _check_characters(path, record, header)
        spanning += record.raw.count("\n", 0, -1)
        given, wanted = len(record.fields), len(header)
        if given != wanted:
            # The column: the first that is absent, or the last before what is too many.
            column = header[min(given, wanted - 1)]
            end = "ends before" if given < wanted else "goes on after"
            raise UsageError(
                f"{path} has {given} fields instead of {wanted} in line {record.line}: the row "
                f"{end} column {clip(column)}; {_remedy(dialect)}."
            )
        if refused and dialect.quote and record.raw.count(dialect.quote) % 2:
            odd = [dialect.quote in value for value in record.fields].index(True)
            raise UsageError(
                f"{path} has a lone quotation mark in line {record.line}, column "
                f"{clip(header[odd])}; {_remedy(dialect)}."
            )
    return blank, spanning


def _check_characters(path: Path, record: _Record, header: list[str]) -> None:
    """Refuse bytes that are no UTF-8, and NUL, which no text holds but torn and UTF-16 files do."""
    if record.raw.isascii() and NUL not in record.raw:
        return
    for column, value in enumerate(record.fields):
        name = clip(header[min(column, len(header) - 1)])
        if NUL in value:
            raise UsageError(
                f"{path} holds a NUL byte in line {record.line}, column {name}: it is damaged or "
                "not UTF-8; write it anew as UTF-8."
            )
        if any("\udc80" <= character <= "\udcff" for character in value):
            raise UsageError(
                f"{path} is not UTF-8 (line {record.line}, column {name}); save it as UTF-8."
            )


def _contains(path: Path, *marks: str) -> bool:
    """Whether any of the marks is in the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(mark.encode()) >= 0 for mark in marks)


def _remedy(dialect: Dialect) -> str:
    if dialect.quote is None:
        return "give every row the header's columns, with no tab in a value"
    return (
        f"give every row the header's columns, and put values that hold {dialect.separator!r} or "
        "quotation marks into quotes, each mark doubled"
    )
