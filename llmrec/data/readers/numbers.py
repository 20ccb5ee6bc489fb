"""Columns of numbers and dates, whatever type a file gives them."""

from __future__ import annotations

import numpy as np
import polars as pl

from llmrec.data.columns import Float64
from llmrec.data.readers.files import Table, clip
from llmrec.errors import UsageError

_ISO_DATE = r"^\d{4}-\d{1,2}-\d{1,2}"
"""What a date in text begins with. Not 01/02/2024: January or February."""


def numbers(table: Table, name: str, option: str, missing_allowed: bool) -> Float64:
    """A numeric column as float64; dates become Unix seconds, to the microsecond.

    Args:
        table: The file's rows.
        name: The column.
        option: The option of the data that named it; only the timestamps may be dates.
        missing_allowed: Whether a row may lack its number, which is then NaN.

    Raises:
        UsageError: The column is of another type, or a value is no number; with its place.
    """
    path, column = table.path, table.frame[name]
    times = option == "timestamp_column"
    kind = column.dtype
    date = times and (kind == pl.Date or isinstance(kind, pl.Datetime))
    if not (date or kind.is_numeric() or kind in (pl.String, pl.Boolean, pl.Null)):
        wanted = "numbers or dates" if times else "numbers"
        raise UsageError(
            f"{path}: {name!r} (data.{option}) has the type {kind}; write it as {wanted}."
        )
    absent = column.is_null()
    parsed = column
    if kind == pl.String:
        stripped = column.str.strip_chars()
        absent |= stripped.fill_null("") == ""
        parsed = stripped.cast(pl.Float64, strict=False)
        if times and parsed.null_count() == len(parsed):
            parsed = _dates(stripped)
    elif kind.is_float():
        absent |= column.is_nan().fill_null(True)
    if parsed.dtype.is_temporal():
        parsed = parsed.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    values = parsed.cast(pl.Float64, strict=False).to_numpy()  # null becomes NaN
    bad = ~np.isfinite(values)
    if missing_allowed:
        bad &= ~absent.to_numpy()
    if bad.any():
        row = int(bad.argmax())
        wanted = "a number or a date such as 2024-05-01 12:30:00" if times else "a number"
        way_out = "" if missing_allowed else ", or choose another data.order"
        raise UsageError(
            f"{path}: {name!r} (data.{option}) is missing or not {wanted} in "
            f"{bad.sum():,} of {len(bad):,} rows, first in {table.where(row)} "
            f"({clip(column[row])}); fill or remove them{way_out}."
        )
    return np.asarray(values, dtype=np.float64)


def _dates(column: pl.Series) -> pl.Series:
    """ISO dates with or without a time of day; null where they are something else."""
    column = column.set(~column.str.contains(_ISO_DATE).fill_null(True), None)
    for to_date in (column.str.to_datetime, column.str.to_date):
        try:
            return to_date(strict=False)
        except pl.exceptions.ComputeError:  # no format could be inferred
            continue
    return column.cast(pl.Float64, strict=False)
