"""Tables as files hold them, turned into columns; every mistake in them gets one clear sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from llmrec.data.columns import Columns, Float64
from llmrec.data.interactions import Float32, Int64
from llmrec.data.readers.config import DataConfig
from llmrec.errors import UsageError, nearest

_DEFAULTS = DataConfig()


def read_text_table(path: Path, separator: str, quote: str | None = '"') -> pl.DataFrame:
    """A delimited text file with a header, every column as strings, so that id 007 stays 007."""
    try:
        frame = pl.read_csv(path, separator=separator, quote_char=quote, infer_schema=False)
    except pl.exceptions.NoDataError as error:
        raise UsageError(f"{path} is empty; it needs a header and rows.") from error
    except pl.exceptions.PolarsError as error:
        line = _first_undecodable_line(path)
        if line:
            raise UsageError(f"{path} is not UTF-8 (line {line}); save it as UTF-8.") from error
        raise UsageError(
            f"{path} cannot be read as a table separated by {separator!r} "
            f"({str(error).splitlines()[0]}); give every row the header's columns, and "
            "put values with quotation marks into quotes, each mark doubled."
        ) from error
    return frame


def read_parquet(path: Path) -> pl.DataFrame:
    """A parquet file with its own types."""
    try:
        return pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} cannot be read as parquet ({reason}); write it anew.") from error


def _first_undecodable_line(path: Path) -> int:
    """Number of the first line that is not UTF-8, from 1; 0 where all are."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def columns_of(
    interactions: tuple[Path, pl.DataFrame],
    items: tuple[Path, pl.DataFrame] | None,
    config: DataConfig,
) -> Columns:
    """Columns of an interactions table and, where there is one, an items table.

    Args:
        interactions: The file, for messages, and its table.
        items: The same for the items. None takes the text fields from the columns of the
            interactions that mean nothing else, the first non-empty value of each item.
        config: Names of the columns, and what orders.

    Raises:
        UsageError: If a column or a value is missing, an item is described twice, or nothing is
            there.
    """
    path, frame = interactions
    for option in ("user_column", "item_column"):
        _require(frame, path, option, config, getattr(config, option))
    if frame.height == 0:
        raise UsageError(f"{path} has a header and no rows: there is nothing to learn from.")
    user_codes, user_ids = _factorise(_ids(frame, path, "user_column", config.user_column))
    met = _ids(frame, path, "item_column", config.item_column)
    if items is None:
        described, counts = _embedded_items(frame, met, config)
    else:
        described = _described_items(*items, config)
        counts = {}
    item_codes, item_ids = _factorise(pl.concat([met, described["item"]]))
    item_codes = item_codes[: frame.height]
    vocabulary = pl.DataFrame({"item": pl.Series(item_ids, dtype=pl.String)})
    aligned = vocabulary.join(described, on="item", how="left", maintain_order="left")
    if items is not None:
        absent = ~vocabulary["item"].is_in(described["item"].implode())
        absent_rows = absent.to_numpy()[item_codes]
        counts["items_absent_from_items_file"] = int(absent.sum())
        counts["interactions_absent_from_items_file"] = int(absent_rows.sum())
    names = [name for name in aligned.columns if name != "item"]
    timestamps, positions = _order(frame, path, config)
    ratings, missing = _ratings(frame, path, config)
    return Columns(
        users=user_codes,
        items=item_codes,
        user_ids=user_ids,
        item_ids=item_ids,
        fields={n.removeprefix("field:"): aligned[n].fill_null("").to_list() for n in names},
        timestamps=timestamps,
        positions=positions,
        ratings=ratings,
        counts={**counts, "ratings_missing": missing},
    )


def _named_columns(config: DataConfig) -> set[str]:
    """Columns that options name; the others may be text."""
    named = {config.user_column, config.item_column, config.timestamp_column}
    return named | {config.position_column, config.rating_column}


def _require(frame: pl.DataFrame, path: Path, option: str, config: DataConfig, name: str) -> None:
    if name not in frame.columns:
        taken = _named_columns(config)
        free = [column for column in frame.columns if column not in taken]
        hint = nearest(name, free) if free else f"it has only {', '.join(frame.columns)}."
        raise UsageError(f"{path} has no column {name!r} (data.{option}); {hint}")


def _ids(frame: pl.DataFrame, path: Path, option: str, name: str) -> pl.Series:
    column = frame[name]
    # pandas turns whole numbers beside a missing value into floats; 7.0 in parquet means 7.
    if column.dtype.is_float() and (column.fill_nan(None).drop_nulls() % 1 == 0).all():
        column = column.fill_nan(None).cast(pl.Int64)
    column = column.cast(pl.String)
    missing = (column.is_null() | (column.fill_null("").str.strip_chars() == "")).to_numpy()
    if missing.any():
        raise UsageError(
            f"{path} lacks a {name!r} (data.{option}) in {missing.sum():,} of {len(missing):,} "
            f"rows, first in row {missing.argmax() + 1} after the header; fill or remove them."
        )
    return column.alias("item")


def _factorise(column: pl.Series) -> tuple[Int64, list[str]]:
    """A code per row and the distinct values the codes stand for."""
    names = column.unique()
    table = pl.DataFrame({"name": names, "code": np.arange(len(names))})
    rows = pl.DataFrame({"name": column})
    codes = rows.join(table, on="name", how="left", maintain_order="left")["code"]
    return codes.to_numpy().astype(np.int64), names.to_list()


def _strings(frame: pl.DataFrame, names: list[str]) -> list[pl.Series]:
    """Field columns as strings, lists joined by commas; the prefix tells a field from `item`."""
    result = []
    for name in names:
        column = frame[name]
        if isinstance(column.dtype, pl.List):
            column = column.cast(pl.List(pl.String)).list.join(", ")
        elif column.dtype.is_nested() or column.dtype == pl.Binary:
            continue
        result.append(column.cast(pl.String).alias(f"field:{name}"))
    return result


def _embedded_items(
    frame: pl.DataFrame, met: pl.Series, config: DataConfig
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Item fields found in the interactions themselves."""
    names = [name for name in frame.columns if name not in _named_columns(config)]
    rows = pl.DataFrame([met, *_strings(frame, names)])
    # The first value that says something: a title may be missing from an item's first row.
    filled = pl.exclude("item").filter(pl.exclude("item").str.strip_chars() != "").first()
    first = rows.group_by("item", maintain_order=True).agg(filled)
    variants = rows.unique().height - first.height
    return first, {"item_descriptions_beyond_the_first": variants}


def _described_items(path: Path, frame: pl.DataFrame, config: DataConfig) -> pl.DataFrame:
    """The items file: `item` and its fields."""
    _require(frame, path, "item_column", config, config.item_column)
    if frame.height == 0:
        raise UsageError(f"{path} describes no item; add rows, or remove it to go without text.")
    ids = _ids(frame, path, "item_column", config.item_column)
    double = ids.is_duplicated()
    if double.any():
        twice = ids.filter(double)
        raise UsageError(
            f"{path} describes {twice.n_unique():,} items more than once, the first is "
            f"{twice[0]!r}; keep one row for each {config.item_column!r} (data.item_column)."
        )
    names = [name for name in frame.columns if name != config.item_column]
    return pl.DataFrame([ids, *_strings(frame, names)])


def _order(
    frame: pl.DataFrame, path: Path, config: DataConfig
) -> tuple[Float64 | None, Float64 | None]:
    """Timestamps or positions, whichever orders; neither where the file's order does."""
    renamed = config.timestamp_column != _DEFAULTS.timestamp_column
    by_time = config.order == "timestamp" or (config.order == "auto" and renamed)
    if by_time or (config.order == "auto" and config.timestamp_column in frame.columns):
        _require(frame, path, "timestamp_column", config, config.timestamp_column)
        name = config.timestamp_column
        return _numbers(frame[name], path, "timestamp_column", missing_allowed=False), None
    renamed = config.position_column != _DEFAULTS.position_column
    by_position = config.order == "position" or (config.order == "auto" and renamed)
    if by_position or (config.order == "auto" and config.position_column in frame.columns):
        _require(frame, path, "position_column", config, config.position_column)
        name = config.position_column
        return None, _numbers(frame[name], path, "position_column", missing_allowed=False)
    return None, None


def _ratings(frame: pl.DataFrame, path: Path, config: DataConfig) -> tuple[Float32 | None, int]:
    name = config.rating_column
    if name not in frame.columns:
        if name != _DEFAULTS.rating_column:
            _require(frame, path, "rating_column", config, name)
        return None, 0
    values = _numbers(frame[name], path, "rating_column", missing_allowed=True)
    return values.astype(np.float32), int(np.isnan(values).sum())


def _numbers(column: pl.Series, path: Path, option: str, missing_allowed: bool) -> Float64:
    """A numeric column as float64; dates become Unix seconds, to the microsecond."""
    absent = column.is_null()
    parsed = column
    if column.dtype == pl.String:
        stripped = column.str.strip_chars()
        absent |= stripped.fill_null("") == ""
        parsed = stripped.cast(pl.Float64, strict=False)
        if option == "timestamp_column" and parsed.null_count() == len(parsed):
            parsed = _dates(stripped)
    elif column.dtype.is_float():
        absent |= column.is_nan().fill_null(True)
    if parsed.dtype.is_temporal():
        parsed = parsed.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    values = parsed.cast(pl.Float64, strict=False).to_numpy()  # null becomes NaN
    bad = ~np.isfinite(values)
    if missing_allowed:
        bad &= ~absent.to_numpy()
    if bad.any():
        row = int(bad.argmax())
        way_out = "" if missing_allowed else ", or choose another data.order"
        raise UsageError(
            f"{path}: {column.name!r} (data.{option}) is missing or not a number in "
            f"{bad.sum():,} of {len(bad):,} rows, first in row {row + 1} after the header "
            f"({column[row]!r}); fill or remove them{way_out}."
        )
    return np.asarray(values, dtype=np.float64)


def _dates(column: pl.Series) -> pl.Series:
    """ISO dates with or without a time of day; all null where they are something else."""
    for to_date in (column.str.to_datetime, column.str.to_date):
        try:
            return to_date(strict=False)
        except pl.exceptions.ComputeError:  # no format could be inferred
            continue
    return column.cast(pl.Float64, strict=False)
