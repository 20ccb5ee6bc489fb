"""Bad data in every format: an error with its place and the way out, or a counted repair."""

import datetime
import pickle
import time
import tracemalloc
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.data.interactions import Dataset
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.errors import UsageError

HEADER = ["user_id", "item_id", "timestamp", "rating", "title"]
ROWS = [
    ["u", "a", "1", "5", "A"],
    ["u", "b", "2", "4", "B"],
    ["v", "a", "3", "3", "A"],
    ["v", "b", "4", "2", "B"],
]
TYPES = {"timestamp": "float", "rating": "float", "title": "token_seq"}
FORMATS = {"csv": ",", "tsv": "\t", "inter": "\t", "parquet": ""}
TEXT = [name for name in FORMATS if name != "parquet"]
QUOTED = ["csv", "tsv"]
"""Formats in which a quotation mark means something."""


def load(path: Path, **options: Any) -> Dataset:
    return load_dataset(DataConfig(source=str(path), min_user_interactions=1, **options))


def row(*values: str) -> list[str]:
    return list(values)


def with_row(number: int, *values: str) -> list[list[str]]:
    return [*ROWS[:number], list(values), *ROWS[number + 1 :]]


@dataclass(frozen=True)
class Fault:
    """What is wrong, in which formats, and what comes of it."""

    header: list[str] = field(default_factory=lambda: HEADER)
    rows: list[list[str]] = field(default_factory=lambda: ROWS)
    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    line_end: str = "\n"
    edit: Callable[[bytes], bytes] = bytes
    """Of the whole text file."""
    row: int | None = None
    """The row at fault, from 0; -1 is the header."""
    lines_before: int = 0
    """Lines above the row at fault beyond one per row."""
    says: tuple[str, ...] = ()
    """Parts of the sentence, the column and the remedy among them; none: it is read."""
    counts: dict[str, int] = field(default_factory=dict)
    """What was repaired, where it is read."""


FAULTS = {
    "missing column": Fault(
        header=["user_id", "item", "timestamp", "rating", "title"], row=-1,
        says=("no column 'item_id' (data.item_column)", "did you mean item?"),
    ),
    "no timestamp": Fault(
        rows=with_row(2, "v", "a", "", "3", "A"), row=2,
        says=("'timestamp' (data.timestamp_column)", "1 of 4 rows", "fill or remove them"),
    ),
    "NaN as timestamp": Fault(
        rows=with_row(2, "v", "a", "NaN", "3", "A"), row=2,
        says=("'timestamp' (data.timestamp_column)", "('NaN')", "choose another data.order"),
    ),
    "American date": Fault(
        rows=[[u, i, f"0{t}/02/2024", r, x] for u, i, t, r, x in ROWS], row=0,
        says=("'timestamp'", "4 of 4 rows", "('01/02/2024')", "a date such as 2024-05-01 12:30:00"),
    ),
    "one date that does not exist": Fault(
        rows=[[u, i, f"2023-02-{27 + int(t)}", r, x] for u, i, t, r, x in ROWS], row=1,
        says=("'timestamp'", "3 of 4 rows", "('2023-02-29')", "fill or remove them"),
    ),
    "dates among numbers": Fault(
        rows=with_row(1, "u", "b", "2024-05-01", "4", "B"), row=1,
        says=("'timestamp'", "1 of 4 rows", "('2024-05-01')"),
    ),
    "milliseconds": Fault(
        rows=[[u, i, f"170000000{t}500", r, x] for u, i, t, r, x in ROWS],
        counts={"timestamps_scaled_to_seconds": 4},
    ),
    "seconds among milliseconds": Fault(
        rows=[*([u, i, f"170000000{t}500", r, x] for u, i, t, r, x in ROWS[:3]),
              row("v", "b", "1700000004", "2", "B")], row=3,
        says=("'timestamp' (data.timestamp_column) mixes units", "1700000004 in ",
              "write all of it in Unix seconds"),
    ),
    "rating that is no number": Fault(
        rows=with_row(1, "u", "b", "2", "good", "B"), row=1,
        says=("'rating' (data.rating_column)", "('good')", "fill or remove them"),
    ),
    "no rating": Fault(rows=with_row(1, "u", "b", "2", "", "B"), counts={"ratings_missing": 1}),
    "no user": Fault(
        rows=with_row(3, "", "b", "4", "2", "B"), row=3,
        says=("'user_id' (data.user_column)", "1 of 4 rows", "fill or remove them"),
    ),
    "item of spaces": Fault(
        rows=with_row(1, "u", "  ", "2", "4", "B"), row=1,
        says=("'item_id' (data.item_column)", "1 of 4 rows", "fill or remove them"),
    ),
    "spaces around ids": Fault(
        rows=with_row(1, " u", "b ", "2", "4", "B"), counts={"ids_with_spaces_trimmed": 2}
    ),
    "ids that went through floats": Fault(
        rows=[["1", "7", "1", "5", "A"], ["1", "8.0", "2", "4", "B"],
              ["2", "7.0", "3", "3", "A"], ["2", "8.0", "4", "2", "B"]],
        counts={"ids_written_as_floats": 3, "items": 2},
    ),
    "NUL in an id": Fault(
        rows=with_row(1, "u", "b\0", "2", "4", "B"), row=1,
        says=("NUL byte", "column 'item_id", "write it anew"),
    ),
    "no title": Fault(
        rows=[*ROWS, row("u", "c", "5", "5", "")], counts={"items_with_empty_text": 1}
    ),
    "two titles": Fault(
        rows=with_row(2, "v", "a", "3", "3", "Other"),
        counts={"item_descriptions_beyond_the_first": 1},
    ),
    "duplicate row": Fault(rows=[*ROWS, ROWS[1]], counts={"interactions_repeated_exactly": 1}),
    "header only": Fault(rows=[], row=-1, says=("no rows", "nothing to learn from", "add rows")),
    # What only text can have.
    "empty file": Fault(
        edit=lambda _: b"", formats=TEXT, says=("is empty", "needs a header and rows")
    ),
    "blank lines alone": Fault(
        edit=lambda _: b"\n\n", formats=TEXT, says=("is empty", "needs a header and rows")
    ),
    "Latin-1": Fault(
        rows=with_row(1, "u", "b", "2", "4", "Café"), formats=TEXT, row=1,
        edit=lambda text: text.decode().encode("latin-1"),
        says=("not UTF-8", "column 'title", "save it as UTF-8"),
    ),
    "Latin-1 in the header": Fault(
        header=["user_id", "item_id", "timestamp", "rating", "títle"], formats=TEXT, row=-1,
        edit=lambda text: text.decode().encode("latin-1"), says=("not UTF-8", "save it as UTF-8"),
    ),
    "UTF-16": Fault(
        edit=lambda text: text.decode().encode("utf-16"), formats=TEXT, row=-1,
        says=("is UTF-16", "save it as UTF-8"),
    ),
    "UTF-16 without its mark": Fault(
        edit=lambda text: text.decode().encode("utf-16-le"), formats=TEXT, row=-1,
        says=("NUL byte", "write it anew as UTF-8"),
    ),
    "a torn write": Fault(
        edit=lambda text: text[:-3] + bytes(3), formats=TEXT, row=3,
        says=("NUL byte", "column 'rating", "write it anew"),
    ),
    "byte order mark": Fault(
        edit=lambda text: b"\xef\xbb\xbf" + text, formats=TEXT, counts={"interactions": 4}
    ),
    "CRLF": Fault(line_end="\r\n", formats=TEXT, counts={"interactions": 4}),
    "CR alone": Fault(
        line_end="\r", formats=TEXT, row=-1, says=("carriage returns", "save it with line feeds")
    ),
    "row too short": Fault(
        rows=with_row(2, "v", "a", "3", "3"), formats=TEXT, row=2,
        says=("4 fields instead of 5", "before column 'title", "every row the header's columns"),
    ),
    "row too long": Fault(
        rows=with_row(2, "v", "a", "3", "3", "A", "B"), formats=TEXT, row=2,
        says=("6 fields instead of 5", "after column 'title", "every row the header's columns"),
    ),
    "row cut off at the end of the file": Fault(
        edit=lambda text: text[:-6], formats=TEXT, row=3,
        says=("fields instead of 5", "before column", "every row the header's columns"),
    ),
    "blank lines": Fault(
        edit=lambda text: text.replace(b"\nv", b"\n\nv", 1) + b"\n", formats=TEXT,
        counts={"blank_lines_dropped": 2, "interactions": 4},
    ),
    "no rating after a blank line": Fault(
        rows=with_row(3, "v", "b", "4", "bad", "B"), row=3, lines_before=1, formats=TEXT,
        edit=lambda text: text.replace(b"\nv", b"\n\nv", 1), says=("'rating'", "('bad')"),
    ),
    "spaces around headers": Fault(
        header=[f" {name} " for name in HEADER], formats=QUOTED,
        counts={"headers_with_spaces_trimmed": 5, "interactions": 4},
    ),
    "two columns of one name": Fault(
        header=["user_id", "item_id", "timestamp", "title", "title"], formats=TEXT, row=-1,
        says=("names two columns 'title", "a name of its own"),
    ),
    "quoted separator": Fault(
        rows=with_row(1, "u", "b", "2", "4", '"B,\tb"'), formats=QUOTED, counts={"interactions": 4}
    ),
    "unquoted separator": Fault(
        rows=with_row(1, "u", "b", "2", "4", "B,\tb"), formats=TEXT, row=1,
        says=("6 fields instead of 5", "after column 'title"),
    ),
    "quoted numbers": Fault(
        rows=[[u, i, f'"{t}"', f'"{r}"', x] for u, i, t, r, x in ROWS], formats=QUOTED,
        counts={"interactions": 4, "ratings_missing": 0},
    ),
    "line breaks in a title": Fault(
        rows=with_row(0, "u", "a", "1", "5", '"A\n\nA"'), formats=QUOTED,
        counts={"lines_inside_quoted_values": 2, "interactions": 4},
    ),
    "bad rating after line breaks in a title": Fault(
        rows=[row("u", "a", "1", "5", '"A\n\nA"'), row("u", "b", "2", "bad", "B")], row=1,
        lines_before=2, formats=QUOTED, says=("'rating'", "('bad')"),
    ),
    "short row after line breaks in a title": Fault(
        rows=[row("u", "a", "1", "5", '"A\n\nA"'), row("u", "b", "2", "4")], row=1,
        lines_before=2, formats=QUOTED, says=("4 fields instead of 5", "before column 'title"),
    ),
    "quote never closed": Fault(
        rows=with_row(1, "u", "b", "2", "4", '"B'), row=1, formats=QUOTED,
        says=("quotation mark out of place", "into quotes, each mark doubled"),
    ),
    "quote within quotes": Fault(
        rows=with_row(1, "u", "b", "2", "4", '"B "b" B"'), row=1, formats=QUOTED,
        says=("quotation mark out of place", "into quotes, each mark doubled"),
    ),
    "lone quote": Fault(
        rows=with_row(1, "u", "b", "2", "4", '5" disk'), row=1, formats=QUOTED,
        says=("lone quotation mark", "column 'title", "into quotes, each mark doubled"),
    ),
}  # fmt: skip


def write(folder: Path, suffix: str, header: list[str], rows: list[list[str]], end: str) -> Path:
    path = folder / f"data.{suffix}"
    if suffix == "parquet":
        columns = [[values[place] or None for values in rows] for place in range(len(header))]
        series = [pl.Series(n, c, dtype=pl.String) for n, c in zip(header, columns, strict=True)]
        pl.DataFrame(series).write_parquet(path)
        return path
    named = [f"{name}:{TYPES.get(name, 'token')}" if suffix == "inter" else name for name in header]
    lines = [FORMATS[suffix].join(values) + end for values in (named, *rows)]
    path.write_bytes("".join(lines).encode())
    return path


@pytest.mark.parametrize(
    ("name", "suffix"), [(name, s) for name, fault in FAULTS.items() for s in fault.formats]
)
def test_a_fault_is_an_error_with_its_place_or_a_counted_repair(
    tmp_path: Path, name: str, suffix: str
) -> None:
    fault = FAULTS[name]
    path = write(tmp_path, suffix, fault.header, fault.rows, fault.line_end)
    if suffix != "parquet":
        path.write_bytes(fault.edit(path.read_bytes()))
    if not fault.says:
        data = load(path)
        assert fault.counts.items() <= data.counts.items()
        assert data.counts["interactions"] == data.counts["interactions_read"] == len(fault.rows)
        assert data.catalog.texts[0].split()[0] == "A"
        return
    with pytest.raises(UsageError) as error:
        load(path)
    sentence = str(error.value)
    place = () if fault.row is None else (f"line {fault.row + 2 + fault.lines_before}",)
    if suffix == "parquet":
        place = () if fault.row == -1 else (f"row {(fault.row or 0) + 1}",)
    for part in (str(path), *place, *fault.says):
        assert part in sentence, sentence
    assert "\n" not in sentence


def test_every_kind_of_fault_meets_every_format_that_can_have_it(
    figure: Callable[[str, object], None],
) -> None:
    cases = [(fault, suffix) for fault in FAULTS.values() for suffix in fault.formats]
    errors = sum(bool(fault.says) for fault, _ in cases)
    figure("bad files", f"{errors} refused with their place, {len(cases) - errors} read as counted")
    assert {suffix for _, suffix in cases} == set(FORMATS)


@pytest.mark.parametrize("suffix", FORMATS)
def test_milliseconds_give_the_times_that_seconds_do(tmp_path: Path, suffix: str) -> None:
    rows = FAULTS["milliseconds"].rows
    times = load(write(tmp_path, suffix, HEADER, rows, "\n")).interactions.timestamps
    assert times is not None
    assert times.tolist() == [1700000001, 1700000002, 1700000003, 1700000004]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "inter"])
def test_words_for_nothing_are_ids_like_any_other(tmp_path: Path, suffix: str) -> None:
    rows = [[user, item, "1", "5", "T"] for user in "uv" for item in ("NA", "null", "None", "nan")]
    data = load(write(tmp_path, suffix, HEADER, rows, "\n"))
    assert data.catalog.ids == ["NA", "None", "nan", "null"]


def test_versions_keep_their_point_nought(tmp_path: Path) -> None:
    rows = [["u", item, "1", "5", "T"] for item in ("1.0", "1.1", "1")]
    data = load(write(tmp_path, "csv", HEADER, rows, "\n"))
    assert data.catalog.ids == ["1", "1.0", "1.1"]
    assert data.counts["ids_written_as_floats"] == 0


SEPARATORS = [("csv", "interactions.csv", "items.csv"), ("tsv", "interactions.tsv", "items.tsv"),
              ("inter", "d.inter", "d.item"),
              ("parquet", "interactions.parquet", "items.parquet")]  # fmt: skip


def two_files(folder: Path, kind: str, items: list[list[str]]) -> Path:
    """ROWS without titles, and an items file beside them."""
    names = {name: pair for name, *pair in SEPARATORS}[kind]
    for name, header, rows in (
        (names[0], HEADER[:4], [values[:4] for values in ROWS]),
        (names[1], ["item_id", "title"], items),
    ):
        write(folder, kind, header, rows, "\n").rename(folder / name)
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_an_item_of_the_interactions_that_is_no_item_is_counted(tmp_path: Path, kind: str) -> None:
    counts = load(two_files(tmp_path, kind, [["a", "A"]])).counts
    assert counts["items_absent_from_items_file"] == 1
    assert counts["interactions_absent_from_items_file"] == 2
    assert counts["items_with_empty_text"] == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_items_of_which_none_is_met_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="describes none of the items in") as error:
        load(two_files(tmp_path, kind, [["0a", "A"], ["0b", "B"]]))
    place = "row 1" if kind == "parquet" else "line 2"
    sentence = str(error.value)
    for part in (f"'a' in {place}", f"'0a' in {place}", "data.item_column", "write the ids alike"):
        assert part in sentence


@pytest.mark.parametrize("kind", FORMATS)
def test_an_item_with_two_titles_is_refused_with_the_second_place(
    tmp_path: Path, kind: str
) -> None:
    with pytest.raises(UsageError) as error:
        load(two_files(tmp_path, kind, [["a", "A"], ["b", "B"], ["a", "Other"]]))
    place = "row 3" if kind == "parquet" else "line 4"
    for part in ("'a'", f"again in {place}", "keep one row", "data.item_column"):
        assert part in str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_repairs_in_the_items_file_are_counted_too(tmp_path: Path, kind: str) -> None:
    counts = load(two_files(tmp_path, kind, [["a ", "A"], ["b", "B"]])).counts
    assert counts["ids_with_spaces_trimmed"] == 1
    assert counts["items_absent_from_items_file"] == 0


SIZE = 10_000_000


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tsv", "inter")]


@pytest.mark.parametrize("suffix", ["csv", *SLOW])
def test_a_line_of_ten_megabytes_is_read_in_seconds(
    tmp_path: Path, suffix: str, figure: Callable[[str, object], None]
) -> None:
    rows = [*ROWS, row("v", "c", "5", "", "long " * (SIZE // 5)), row("v", "d", "6", "1", "")]
    path = write(tmp_path, suffix, HEADER, rows, "\n")
    tracemalloc.start()
    began = time.perf_counter()
    data = load(path)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.catalog.texts[2]) == SIZE - 1
    assert seconds < 20
    assert peak < 30 * SIZE
    figure(f"10 MB line, {suffix}", f"{seconds:.1f} s, {peak / SIZE:.0f} times its size")


@pytest.mark.parametrize("place", ["header", "value", "user_id", "timestamp", "rating"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_sentence_quotes_little_of_ten_megabytes(tmp_path: Path, suffix: str, place: str) -> None:
    huge = "x" * SIZE
    header = ["user_id", huge, "timestamp", "rating", "title"] if place == "header" else HEADER
    rows = [list(ROWS[0]), list(ROWS[1])]
    if place in HEADER:
        rows[1][HEADER.index(place)] = huge
    if place == "value":
        rows[1][1] = f"{huge}\0"
    path = write(tmp_path, suffix, header, rows, "\n")
    began = time.perf_counter()
    if place == "user_id":  # an odd id, but one
        assert load(path).counts["users"] == 2
    else:
        with pytest.raises(UsageError) as error:
            load(path)
        assert len(str(error.value)) < 1000
    assert time.perf_counter() - began < 20


# Parquet: types.


def parquet(folder: Path, **columns: Any) -> Path:
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"]} | columns)
    frame.write_parquet(folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize(
    ("column", "ids"),
    [
        (pl.Series(["b", "a"], dtype=pl.Categorical), ["a", "b"]),
        (pl.Series(["b", "a"], dtype=pl.Enum(["b", "a"])), ["a", "b"]),
        (pl.Series([10, 9], dtype=pl.UInt64), ["9", "10"]),
        (pl.Series([10, 9], dtype=pl.Int8), ["9", "10"]),
        (pl.Series([2**62, 2**62 + 1]), [str(2**62), str(2**62 + 1)]),
        (pl.Series([10.0, 9.0], dtype=pl.Float32), ["9", "10"]),
        (pl.Series([b"b", b"a"]), ["a", "b"]),
        (pl.Series(["007", "7"]), ["007", "7"]),
    ],
)
def test_ids_of_any_plain_type_are_read_as_written(
    tmp_path: Path, column: pl.Series, ids: list[str]
) -> None:
    assert load(parquet(tmp_path, item_id=column)).catalog.ids == ids


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pl.Series([1, None]), ("lacks a 'item_id'", "row 2", "fill or remove")),
        (pl.Series([1.0, float("nan")]), ("lacks a 'item_id'", "row 2", "fill or remove")),
        (pl.Series([None, None]), ("lacks a 'item_id'", "row 1", "fill or remove")),
        (pl.Series([2.0**53 + 2, 1.0]), ("9007199254740994 as Float64", "row 1", "or integers")),
        (pl.Series([1, 2**24 + 2], dtype=pl.Float32), ("as Float32", "row 2", "or integers")),
        (pl.Series([uuid.UUID(int=2**127 + n).bytes for n in (1, 2)]), ("Binary", "as text")),
        (pl.Series([["a"], ["b"]]), ("List(String)", "which is no id", "as text")),
        (pl.Series([{"a": 1}, {"a": 2}]), ("Struct", "which is no id", "as text")),
        (pl.Series([datetime.timedelta(1)] * 2), ("Duration", "which is no id", "as text")),
    ],
)
def test_ids_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, column: pl.Series, says: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as error:
        load(parquet(tmp_path, item_id=column))
    for part in ("x.parquet", "'item_id' (data.item_column)", *says):
        assert part in str(error.value)


@pytest.mark.parametrize("option", ["timestamp", "rating", "position"])
@pytest.mark.parametrize(
    "column",
    [
        pl.Series([[1], [2]]),
        pl.Series([{"a": 1}, {"a": 2}]),
        pl.Series([b"1", b"2"]),
        pl.Series([datetime.time(1), datetime.time(2)]),
        pl.Series(["1", "2"], dtype=pl.Categorical),
    ],
)
def test_numbers_of_another_type_are_refused(
    tmp_path: Path, option: str, column: pl.Series
) -> None:
    with pytest.raises(UsageError) as error:
        load(parquet(tmp_path, **{option: column}))
    for part in ("x.parquet", f"'{option}' (data.{option}_column)", "type", "write it as numbers"):
        assert part in str(error.value)


def test_dates_are_no_ratings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'rating' .* has the type Date; write it as numbers"):
        load(parquet(tmp_path, rating=[datetime.date(2024, 5, 1)] * 2))


def test_dates_and_times_of_parquet_are_never_scaled(tmp_path: Path) -> None:
    days = pl.Series([datetime.datetime(1970, 1, 2), datetime.datetime(6000, 1, 1)])
    data = load(parquet(tmp_path, timestamp=days))
    assert data.interactions.timestamps is not None
    assert data.interactions.timestamps[0] == 86_400
    assert data.counts.get("timestamps_scaled_to_seconds", 0) == 0


def test_a_title_in_bytes_or_lists_is_read_and_other_columns_are_counted(tmp_path: Path) -> None:
    path = parquet(
        tmp_path,
        title=[b"A", b"B"],
        tags=[["x", "y"], []],
        vector=pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int8, 2)),
        cover=[b"\xff", b"\xfe"],
        nested=[{"a": 1}, {"a": 2}],
    )
    data = load(path)
    assert data.catalog.texts == ["A", "B"]
    assert data.catalog.fields["tags"] == ["x, y", ""]
    assert data.catalog.fields["vector"] == ["1, 2", "3, 4"]
    assert data.counts["columns_that_are_no_text_dropped"] == 2


def test_damaged_parquet_is_one_sentence_or_read(
    tmp_path: Path, figure: Callable[[str, object], None]
) -> None:
    whole = write(tmp_path, "parquet", HEADER, ROWS, "").read_bytes()
    path, rng = tmp_path / "x.parquet", np.random.default_rng(0)
    refused = 0
    for number in range(300):
        content = bytearray(whole)
        if number % 2:
            content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        else:
            del content[rng.integers(len(whole)) :]
        path.write_bytes(content)
        try:
            load(path)
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        assert number % 2, "a truncated file was read"
    figure("damaged parquet", f"{refused} of 300 refused, 0 crashes; the others parse")


class Attack:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_pickle_in_the_place_of_data_is_refused_and_not_opened(
    tmp_path: Path, suffix: str, protocol: int
) -> None:
    marker = tmp_path / "marker"
    attack = pickle.dumps(Attack(marker), protocol)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(attack)
    with pytest.raises(UsageError) as error:
        load(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    pickle.loads(attack)
    assert marker.exists()  # so it would have worked


@pytest.mark.parametrize(
    "body",
    [
        "{{ title.__class__.__mro__[1].__subclasses__() }}",
        "{{ (title|attr('__class__')).__mro__ }}",
        "{{ ''.__class__.__mro__ }}{{ title }}",
        "{{ title.format.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(title) }}",
        "{{ self._TemplateReference__context }}{{ title }}",
        "{{ cycler.__init__.__globals__.os.system('touch marker') }}{{ title }}",
        "{% include '/etc/passwd' %}{{ title }}",
        "{% import 'os' as os %}{{ title }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.chdir(tmp_path)
    template = tmp_path / "evil.jinja"
    template.write_text(f"{{# id: evil | version: 1 | inputs: title #}}\n{body}\n")
    path = write(tmp_path, "csv", HEADER, ROWS, "\n")
    with pytest.raises(UsageError, match="evil") as error:
        load(path, item_text=str(template))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()
