"""Tables as files hold them, turned into columns; every mistake in them gets one clear sentence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from llmrec.data.columns import Columns, Float64
from llmrec.data.interactions import Float32, Int64
from llmrec.data.readers.config import DataConfig
from llmrec.data.readers.files import NUL, SHOWN, Table, clip
from llmrec.data.readers.numbers import numbers
from llmrec.errors import UsageError, nearest

_DEFAULTS = DataConfig()


_EXACT: dict[type[pl.DataType], int] = {pl.Float64: 2**53, pl.Float32: 2**24, pl.Float16: 2**11}
"""Whole numbers beyond these have no float of their own."""
_UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""From which number on a time counts in nano-, micro- or milliseconds, and how many make a second:
1e11 seconds after 1970 is the year 5138, 1e11 milliseconds after it 1973."""


def columns_of(interactions: Table, items: Table | None, config: DataConfig) -> Columns:
    """Columns of an interactions table and, where there is one, an items table.

    Args:
        interactions: The interactions.
        items: The items. None takes the text fields from the columns of the interactions that mean
            nothing else, the first non-empty value of each item.
        config: Names of the columns, and what orders.

    Raises:
        UsageError: If a column or a value is missing, an item is described twice, no item of the
            interactions is among the items, or nothing is there.
    """
    path, frame = interactions.path, interactions.frame
    for option in ("user_column", "item_column"):
        _require(interactions, option, config, getattr(config, option))
    if frame.height == 0:
        raise UsageError(
            f"{path} has a header{interactions.header} and no rows: there is nothing to learn "
            "from; add rows."
        )
    counts = dict(interactions.counts)
    user_codes, user_ids = _factorise(_ids(interactions, "user_column", config.user_column, counts))
    met = _ids(interactions, "item_column", config.item_column, counts)
    if items is None:
        described = _embedded_items(interactions, met, config, counts)
    else:
        _add(counts, items.counts)
        described = _described_items(items, config, counts)
    item_codes, item_ids = _factorise(pl.concat([met, described["item"]]))
    item_codes = item_codes[: frame.height]
    vocabulary = pl.DataFrame({"item": pl.Series(item_ids, dtype=pl.String)})
    aligned = vocabulary.join(described, on="item", how="left", maintain_order="left")
    if items is not None:
        absent = ~vocabulary["item"].is_in(described["item"].implode())
        absent_rows = absent.to_numpy()[item_codes]
        counts["items_absent_from_items_file"] = int(absent.sum())
        counts["interactions_absent_from_items_file"] = int(absent_rows.sum())
        if absent_rows.all():
            raise UsageError(
                f"{items.path} describes none of the items in {path}: {config.item_column!r} "
                f"(data.item_column) is {clip(met[0])} in {interactions.where(0)} of the one and "
                f"{clip(described['item'][0])} in {items.where(0)} of the other; write the ids "
                "alike in both."
            )
    names = [name for name in aligned.columns if name != "item"]
    timestamps, positions = _order(interactions, config, counts)
    ratings = _ratings(interactions, config, counts)
    order = timestamps if timestamps is not None else positions
    rows = {"user": user_codes, "item": item_codes} | ({} if order is None else {"order": order})
    counts["interactions_repeated_exactly"] = frame.height - pl.DataFrame(rows).n_unique()
    return Columns(
        users=user_codes,
        items=item_codes,
        user_ids=user_ids,
        item_ids=item_ids,
        fields={n.removeprefix("field:"): aligned[n].fill_null("").to_list() for n in names},
        timestamps=timestamps,
        positions=positions,
        ratings=ratings,
        reviews=_reviews(interactions, config, counts),
        counts=counts,
    )


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number


def _named_columns(config: DataConfig) -> set[str]:
    """Columns that options name; the others may be text."""
    named = {config.user_column, config.item_column, config.timestamp_column}
    named |= {config.position_column, config.rating_column}
    return named | set(_review_columns(config).values())


def _review_columns(config: DataConfig) -> dict[str, str]:
    """Each of `REVIEW_TEXTS` that is to be read -> its column."""
    columns = {
        "review": config.review_column,
        "headline": config.headline_column,
        "explanation": config.explanation_column,
        "feature": config.feature_column,
    }
    return {name: column for name, column in columns.items() if column != "none"}


def _require(table: Table, option: str, config: DataConfig, name: str) -> None:
    columns = table.frame.columns
    if name not in columns:
        taken = _named_columns(config)
        # Clipped: a file of another kind may have a header of ten million characters.
        free = [column[:SHOWN] for column in columns if column not in taken]
        has = f"it has only {', '.join(column[:SHOWN] for column in columns[:SHOWN]) or 'none'}."
        hint = nearest(name, free[:SHOWN]) if free else has
        raise UsageError(
            f"{table.path} has no column {name!r} (data.{option}){table.header}; {hint}"
        )


def _ids(table: Table, option: str, name: str, counts: dict[str, int]) -> pl.Series:
    """A column of ids as text; spaces around them and a float's .0 are removed, and counted."""
    path, column = table.path, _whole(table, option, table.frame[name])
    text = _text(column)
    if text is None or column.dtype.is_nested():
        raise UsageError(
            f"{path}: {name!r} (data.{option}) has the type {column.dtype}, which is no id; write "
            "it as text or whole numbers."
        )
    stripped = text.str.strip_chars()
    missing = (stripped.fill_null("") == "").to_numpy()
    if missing.any():
        raise UsageError(
            f"{path} lacks a {name!r} (data.{option}) in {missing.sum():,} of {len(missing):,} "
            f"rows, first in {table.where(int(missing.argmax()))}; fill or remove them."
        )
    nul = stripped.str.contains(NUL, literal=True).to_numpy()
    if nul.any():
        raise UsageError(
            f"{path} holds a NUL byte in {table.where(int(nul.argmax()))}, column {name!r}: it is "
            "damaged; write it anew."
        )
    _add(counts, {"ids_with_spaces_trimmed": int((stripped != text).sum())})
    # A file that went through floats says 7.0, and 7 where it is joined with one that did not.
    floats = stripped.str.contains(r"^-?\d+\.0+$")
    repaired = bool(floats.any() and stripped.str.contains(r"^-?\d+(\.0+)?$").all())
    if repaired:
        stripped = stripped.str.replace(r"\.0+$", "")
    _add(counts, {"ids_written_as_floats": int(floats.sum()) if repaired else 0})
    return stripped.alias("item")


def _whole(table: Table, option: str, column: pl.Series) -> pl.Series:
    """Whole numbers as integers: pandas makes floats of them beside a missing value."""
    if not column.dtype.is_float():
        return column
    numbers = column.fill_nan(None)
    if not (numbers.drop_nulls() % 1 == 0).all():
        return numbers
    beyond = (numbers.abs() > _EXACT[column.dtype.base_type()]).fill_null(False)
    if beyond.any():
        row = int(beyond.to_numpy().argmax())
        raise UsageError(
            f"{table.path}: {column.name!r} (data.{option}) holds {numbers[row]:.0f} as "
            f"{column.dtype} in {table.where(row)}, where neighbouring ids are the same number; "
            "write it as text or integers."
        )
    return numbers.cast(pl.Int64)


def _text(column: pl.Series) -> pl.Series | None:
    """A column as strings, lists joined by commas; None where its type is no text."""
    if column.dtype == pl.Struct:
        return None
    try:
        if isinstance(column.dtype, pl.Array):
            column = column.arr.to_list()
        if isinstance(column.dtype, pl.List):
            return column.cast(pl.List(pl.String)).list.join(", ")
        return column.cast(pl.String)
    except (pl.exceptions.ComputeError, pl.exceptions.InvalidOperationError):
        return None  # bytes that are no text, durations, lists of lists


def _factorise(column: pl.Series) -> tuple[Int64, list[str]]:
    """A code per row and the distinct values the codes stand for."""
    names = column.unique()
    table = pl.DataFrame({"name": names, "code": np.arange(len(names))})
    rows = pl.DataFrame({"name": column})
    codes = rows.join(table, on="name", how="left", maintain_order="left")["code"]
    return codes.to_numpy().astype(np.int64), names.to_list()


def _strings(table: Table, names: list[str], counts: dict[str, int]) -> list[pl.Series]:
    """Field columns as strings; the prefix tells a field from `item`."""
    result = []
    for name in names:
        text = _text(table.frame[name])
        if text is None:
            _add(counts, {"columns_that_are_no_text_dropped": 1})
        else:
            result.append(text.alias(f"field:{name}"))
    return result


def _embedded_items(
    table: Table, met: pl.Series, config: DataConfig, counts: dict[str, int]
) -> pl.DataFrame:
    """Item fields found in the interactions themselves."""
    names = [name for name in table.frame.columns if name not in _named_columns(config)]
    rows = pl.DataFrame([met, *_strings(table, names, counts)])
    # The first value that says something: a title may be missing from an item's first row.
    filled = pl.exclude("item").filter(pl.exclude("item").str.strip_chars() != "").first()
    first = rows.group_by("item", maintain_order=True).agg(filled)
    counts["item_descriptions_beyond_the_first"] = rows.unique().height - first.height
    return first


def _described_items(table: Table, config: DataConfig, counts: dict[str, int]) -> pl.DataFrame:
    """The items file: `item` and its fields."""
    path, frame = table.path, table.frame
    _require(table, "item_column", config, config.item_column)
    if frame.height == 0:
        raise UsageError(
            f"{path} has a header{table.header} and describes no item; add rows, or remove the "
            "file to go without text."
        )
    ids = _ids(table, "item_column", config.item_column, counts)
    double = ids.is_duplicated()
    if double.any():
        twice = ids.filter(double)
        again = int((ids == twice[0]).to_numpy().nonzero()[0][1])
        raise UsageError(
            f"{path} describes {twice.n_unique():,} items more than once, the first is "
            f"{clip(twice[0])}, again in {table.where(again)}; keep one row for each "
            f"{config.item_column!r} (data.item_column)."
        )
    names = [name for name in frame.columns if name != config.item_column]
    return pl.DataFrame([ids, *_strings(table, names, counts)])


def _order(
    table: Table, config: DataConfig, counts: dict[str, int]
) -> tuple[Float64 | None, Float64 | None]:
    """Timestamps or positions, whichever orders; neither where the file's order does."""
    columns = table.frame.columns
    renamed = config.timestamp_column != _DEFAULTS.timestamp_column
    by_time = config.order == "timestamp" or (config.order == "auto" and renamed)
    if by_time or (config.order == "auto" and config.timestamp_column in columns):
        _require(table, "timestamp_column", config, config.timestamp_column)
        return _times(table, config.timestamp_column, counts), None
    renamed = config.position_column != _DEFAULTS.position_column
    by_position = config.order == "position" or (config.order == "auto" and renamed)
    if by_position or (config.order == "auto" and config.position_column in columns):
        _require(table, "position_column", config, config.position_column)
        values = numbers(table, config.position_column, "position_column", missing_allowed=False)
        return None, values
    return None, None


def _times(table: Table, name: str, counts: dict[str, int]) -> Float64:
    """Timestamps as Unix seconds; numbers far too large for seconds are scaled, and counted."""
    values = numbers(table, name, "timestamp_column", missing_allowed=False)
    size = np.abs(values)
    for least, per_second in _UNITS:
        if table.frame[name].dtype.is_temporal() or not (size >= least).any():
            continue
        other = (size < least) & (size > 0)  # 0 is the same time in every unit
        if other.any():
            row = int(other.argmax())
            large = int((size >= least).argmax())
            raise UsageError(
                f"{table.path}: {name!r} (data.timestamp_column) mixes units of time: "
                f"{values[large]:.0f} in {table.where(large)}, {values[row]:.0f} in "
                f"{table.where(row)}; write all of it in Unix seconds."
            )
        counts["timestamps_scaled_to_seconds"] = len(values)
        return values / per_second
    return values


def _ratings(table: Table, config: DataConfig, counts: dict[str, int]) -> Float32 | None:
    name = config.rating_column
    counts["ratings_missing"] = 0
    if name not in table.frame.columns:
        if name != _DEFAULTS.rating_column:
            _require(table, "rating_column", config, name)
        return None
    values = numbers(table, name, "rating_column", missing_allowed=True)
    counts["ratings_missing"] = int(np.isnan(values).sum())
    return values.astype(np.float32)


def _reviews(table: Table, config: DataConfig, counts: dict[str, int]) -> dict[str, pl.Series]:
    """What users wrote, by its name in `REVIEW_TEXTS`; blank texts are empty, and counted."""
    defaults, texts = _review_columns(_DEFAULTS), {}
    for name, column in _review_columns(config).items():
        if column not in table.frame.columns:
            if column != defaults[name]:
                _require(table, f"{name}_column", config, column)
            continue
        text = _text(table.frame[column])
        if text is None:
            raise UsageError(
                f"{table.path}: {column!r} (data.{name}_column) has the type "
                f"{table.frame[column].dtype}; write it as text, or say none to leave it out."
            )
        blank = text.str.strip_chars().fill_null("") == ""
        counts[f"{name}s_missing"] = int(blank.sum())
        texts[name] = text.set(blank, "")
    return texts
