"""Reading: small files, each mistake one sentence, nothing dropped without a count."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.data.interactions import Dataset
from llmrec.data.readers import DataConfig, find_source, load_dataset
from llmrec.errors import UsageError


def load(path: Path, **options: Any) -> Dataset:
    options.setdefault("min_user_interactions", 1)
    return load_dataset(DataConfig(source=str(path), **options))


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def sequences(data: Dataset) -> dict[str, list[str]]:
    """External ids all the way: user -> items, oldest first."""
    return {
        name: [data.catalog.ids[item - 1] for item in data.interactions.history(user)]
        for user, name in enumerate(data.user_ids)
    }


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write(
        tmp_path / "interactions.csv",
        "user_id,item_id,timestamp,rating\nv,b,3,5\nu,a,2,4\nu,b,1,3\nv,a,3,\n",
    )
    write(tmp_path / "items.csv", "item_id,title,genres\nb,B,x|y\na,A,\nc,C,z\n")
    return tmp_path


def test_a_folder_is_read_ordered_and_counted(table: Path) -> None:
    data = load(table)
    assert data.name == table.name
    assert sequences(data) == {"u": ["b", "a"], "v": ["b", "a"]}  # v's tie: as in the file
    assert data.interactions.items.tolist() == [2, 1, 2, 1]
    assert data.interactions.items.dtype == np.int32
    assert data.interactions.offsets.tolist() == [0, 2, 4]
    assert data.interactions.timestamps is not None and data.interactions.ratings is not None
    assert data.interactions.timestamps.tolist() == [1, 2, 3, 3]
    assert data.interactions.ratings[:3].tolist() == [3, 4, 5]
    assert np.isnan(data.interactions.ratings[3])
    assert data.catalog.texts == ["A", "B"]
    assert data.catalog.fields["genres"] == ["", "x|y"]
    expected = {
        "interactions_read": 4,
        "users_read": 2,
        "items_read": 3,  # a, b, c
        "items_dropped_without_interactions": 1,  # c
        "items": 2,
        "interactions_tied_in_order": 2,  # both of v's
        "ratings_missing": 1,
        "repeat_interactions": 0,
    }
    assert expected.items() <= data.counts.items()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_all_three_table_formats_read_the_same(table: Path, suffix: str) -> None:
    expected = load(table).fingerprint()
    for stem in ("interactions", "items"):
        path = table / f"{stem}.csv"
        frame = pl.read_csv(path)
        path.unlink()
        if suffix == "parquet":
            frame.write_parquet(table / f"{stem}.parquet")
        else:
            frame.write_csv(table / f"{stem}.{suffix}", separator="," if suffix == "csv" else "\t")
    assert load(table).fingerprint() == expected


def test_one_file_of_ones_own_carries_its_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.csv",
        '\ufeffuser_id,item_id,title\r\nu,a,"A, ""quoted"""\r\nu,b,Bee\r\nv,a,other\r\n',
    )
    data = load(path)
    assert data.name == "mine"
    assert data.interactions.timestamps is None
    assert data.catalog.texts == ['A, "quoted"', "Bee"]  # of the first row of each item
    assert data.counts["item_descriptions_beyond_the_first"] == 1


def test_whole_number_ids_are_sorted_by_value_and_keep_their_zeros(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id\n7,10\n7,9\n7,010\n10,9\n")
    data = load(path)
    assert data.catalog.ids == ["9", "010", "10"]
    assert data.user_ids == ["7", "10"]


def test_numbers_do_not_tell_who_came_first(tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv", "user_id,item_id\nu,z\nu,a\nt,m\n")
    two = write(tmp_path / "two.csv", "user_id,item_id\nt,m\nu,a\nu,z\n")
    assert load(one).catalog.ids == load(two).catalog.ids == ["a", "m", "z"]
    assert load(one).user_ids == load(two).user_ids == ["t", "u"]


def test_float_ids_in_parquet_are_the_whole_numbers_they_were(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1.0, 1.0], "item_id": [10.0, 9.0]}).write_parquet(
        tmp_path / "x.parquet"
    )
    assert load(tmp_path / "x.parquet").catalog.ids == ["9", "10"]


def test_order_follows_the_option(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.csv", "user_id,item_id,timestamp,position\nu,a,3,1\nu,b,2,3\nu,c,1,2\n"
    )
    assert sequences(load(path)) == {"u": ["c", "b", "a"]}
    assert sequences(load(path, order="timestamp")) == {"u": ["c", "b", "a"]}
    assert sequences(load(path, order="position")) == {"u": ["a", "c", "b"]}
    assert sequences(load(path, order="file")) == {"u": ["a", "b", "c"]}
    assert load(path, order="position").interactions.timestamps is None
    for order in ("timestamp", "position", "file"):
        assert load(path, order=order).order == order  # what the result will say


def test_ties_keep_the_order_of_the_file_whatever_the_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id,timestamp\nu,z,5\nu,a,5\nu,m,5\nu,b,4\n")
    assert sequences(load(path)) == {"u": ["b", "z", "a", "m"]}


def test_fractions_of_a_second_still_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id,timestamp\nu,a,5.7\nu,b,5.2\n")
    data = load(path)
    assert sequences(data) == {"u": ["b", "a"]}
    assert data.interactions.timestamps is not None
    assert data.interactions.timestamps.tolist() == [5, 5]


@pytest.mark.parametrize("day", ["1970-01-02", "1970-01-02 00:00:00", "1970-01-02T00:00:00Z"])
def test_dates_become_unix_seconds(tmp_path: Path, day: str) -> None:
    data = load(write(tmp_path / "x.csv", f"user_id,item_id,timestamp\nu,a,{day}\n"))
    assert data.interactions.timestamps is not None
    assert data.interactions.timestamps.tolist() == [86_400]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "who,what,when\nu,a,2\nu,b,1\n")
    data = load(path, user_column="who", item_column="what", timestamp_column="when")
    assert sequences(data) == {"u": ["b", "a"]}
    assert data.catalog.fields == {}
    assert data.catalog.template_sha256 == ""


def test_an_item_absent_from_the_items_file_stays_with_empty_text_and_is_counted(
    table: Path,
) -> None:
    write(table / "items.csv", "item_id,title\nb,B\n")
    data = load(table)
    assert data.catalog.texts == ["", "B"]
    assert data.counts["items_absent_from_items_file"] == 1
    assert data.counts["interactions_absent_from_items_file"] == 2
    assert data.counts["items_with_empty_text"] == 1


def test_the_filter_drops_short_users_then_keeps_the_most_recent(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id\nu,a\nu,b\nu,c\nv,d\n")
    data = load(path, min_user_interactions=2, max_user_interactions=2)
    assert sequences(data) == {"u": ["b", "c"]}
    expected = {
        "users_dropped_too_few_interactions": 1,
        "interactions_dropped_with_their_user": 1,
        "interactions_dropped_beyond_most_recent": 1,
        "items_dropped_without_interactions": 2,  # a and d
        "interactions": 2,
    }
    assert expected.items() <= data.counts.items()


MANY = [(f"u{user:02d}", f"i{(user * step) % 17}") for user in range(30) for step in range(1, 6)]


@pytest.mark.parametrize("form", ["csv", "shuffled.csv", "parquet", "inter"])
def test_the_same_users_are_drawn_whatever_the_format_and_the_order_of_rows(
    tmp_path: Path, form: str
) -> None:
    rows = pl.DataFrame({"user_id": [u for u, _ in MANY], "item_id": [i for _, i in MANY]})
    path = tmp_path / f"x.{form}"
    if form == "parquet":
        rows.write_parquet(path)
    elif form == "inter":
        names = {"user_id": "user_id:token", "item_id": "item_id:token"}
        rows.rename(names).write_csv(path, separator="\t")
    else:
        order = np.random.default_rng(3).permutation(150) if form[0] == "s" else np.arange(150)
        rows[order].write_csv(path)
    data = load(path, sample_users=4)
    assert data.user_ids == ["u03", "u11", "u13", "u20"]
    assert data.counts["users_dropped_outside_sample"] == 30 - 4
    assert data.counts["interactions_dropped_outside_sample"] == 150 - 20
    assert data.interactions.lengths.tolist() == [5, 5, 5, 5]


def test_the_catalogue_of_a_sample_is_what_its_users_met(tmp_path: Path) -> None:
    rows = "".join(f"u{user},own{user}\nu{user},all\nu{user},all\n" for user in range(9))
    path = write(tmp_path / "x.csv", f"user_id,item_id\n{rows}")
    data = load(path, sample_users=2, max_user_interactions=2)
    assert data.catalog.ids == ["all"]  # their own came first and are beyond the most recent 2
    data = load(path, sample_users=2)
    assert data.catalog.ids == ["all", *(f"own{name[1:]}" for name in data.user_ids)]
    assert data.counts["items_dropped_without_interactions"] == 7
    assert data.fingerprint() != load(path, sample_users=2, sample_seed=1).fingerprint()
    assert load(path, sample_users=9).fingerprint() == load(path).fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_users": 0}, r"data\.sample_users=0: use 1 to 2, .* or all\."),
        ({"sample_users": 3}, r"data\.sample_users=3: use 1 to 2, the users with enough"),
        ({"sample_users": 1, "sample_seed": -1}, r"data\.sample_seed=-1 must not be negative\."),
        ({"sample_seed": 1}, r"data\.sample_seed=1 draws nobody while data\.sample_users=all\."),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id\nu,a\nu,b\nv,a\nv,b\nw,a\n")
    with pytest.raises(UsageError, match=message):
        load(path, min_user_interactions=2, **options)


def test_items_that_share_their_text_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id,title\nu,a,T\nu,b,T\nu,c,\nu,d,\nu,a,T\n")
    counts = load(path).counts
    assert counts["items_sharing_their_text"] == 2
    assert counts["items_with_empty_text"] == 2
    assert counts["repeat_interactions"] == 1


def test_nobody_left_says_who_had_how_many(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id\nu,a\nu,b\nv,a\n")
    message = r"min_user_interactions=5 leaves nobody.* 1 with 2, 1 with 1; lower it to 2 or less"
    with pytest.raises(UsageError, match=message):
        load(path, min_user_interactions=5)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "is empty"),
        ("user_id,item_id\n", {}, "no rows"),
        (
            "user,item_id\nu,a\n",
            {},
            r"no column 'user_id' \(data\.user_column\) \(line 1\); did you mean user",
        ),
        ("user_id,item_id\nu,a\n,b\nv,\n", {}, r"'user_id'.* 1 of 3 rows, first in line 3"),
        ("user_id,item_id\nu,a\nv,  \n", {}, r"'item_id'.* 1 of 2 rows, first in line 3"),
        (
            "user_id,item_id,timestamp\nu,a,1\nu,b,nan\nu,c,\n",
            {},
            r"'timestamp' \(data\.timestamp_column\).* 2 of 3 rows, first in line 3.*data\.order",
        ),
        ("user_id,item_id,timestamp\nu,a,soon\n", {}, "'soon'"),
        ("user_id,item_id,position\nu,a,x\n", {}, r"data\.position_column"),
        ("user_id,item_id,rating\nu,a,good\n", {}, r"data\.rating_column"),
        ("user_id,item_id\nu,a\n", {"order": "timestamp"}, "no column 'timestamp'"),
        ("user_id,item_id,time\nu,a,1\n", {"timestamp_column": "tim"}, "did you mean time"),
        ("user_id,item_id,score\nu,a,1\n", {"rating_column": "scores"}, "did you mean score"),
        ("user_id,item_id\nu,a,too,many\n", {}, "4 fields instead of 2 in line 2"),
        ("user_id,item_id,name\nu,a,A\n", {}, r"'title'.*its fields: name.*item_text=none"),
        ("user_id,item_id\nu,a\n", {"min_user_interactions": 0}, "use 1 or more"),
        ("user_id,item_id\nu,a\n", {"max_user_interactions": 0}, "use 1 or more, or all"),
    ],
)
def test_a_mistake_in_a_file_is_one_clear_sentence(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(UsageError, match=message) as error:
        load(path, **options)
    assert "\n" not in str(error.value)


def test_a_missing_rating_is_kept_and_counted_in_parquet_too(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "rating": [1.0, None, float("nan")]}
    )
    frame.write_parquet(tmp_path / "x.parquet")
    assert load(tmp_path / "x.parquet").counts["ratings_missing"] == 2


def test_a_wrong_encoding_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id,title\nu,a,A\nu,b,é\n", "latin-1")
    with pytest.raises(UsageError, match=r"not UTF-8 \(line 3, column 'title'\)"):
        load(path)


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x\.parquet cannot be read as parquet"):
        load(write(tmp_path / "x.parquet", "PAR?"))


def test_an_item_described_twice_is_refused(table: Path) -> None:
    write(table / "items.csv", "item_id,title\na,A\nb,B\na,C\n")
    with pytest.raises(UsageError, match=r"describes 1 items .* 'a', again in line 4"):
        load(table)


def test_an_empty_catalogue_is_refused(table: Path) -> None:
    write(table / "items.csv", "item_id,title\n")
    with pytest.raises(UsageError, match="describes no item"):
        load(table)


def test_a_missing_source_is_named_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ml-1m").mkdir()
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
    assert find_source("ml-1m") == tmp_path / "ml-1m"
    with pytest.raises(UsageError, match=r"data\.source=ml-2m .*did you mean ml-1m"):
        find_source("ml-2m")
    with pytest.raises(UsageError, match=r"holds no interactions\.csv.*it holds nothing"):
        load(tmp_path / "ml-1m")


def test_two_interactions_files_in_one_folder_are_refused(table: Path) -> None:
    write(table / "interactions.tsv", "user_id\titem_id\nu\ta\n")
    with pytest.raises(UsageError, match="holds both"):
        load(table)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.json"):
        load(write(tmp_path / "x.json", "{}"))


def test_recbole_atomic_files_are_read_with_their_quotes(tmp_path: Path) -> None:
    write(
        tmp_path / "d.inter",
        "user_id:token\titem_id:token\ttimestamp:float\r\nu\t2\t9\r\nu\t10\t8\r\n",
    )
    write(tmp_path / "d.item", 'item_id:token\ttitle:token_seq\n10\t"Ten" things\n2\tTwo\n')
    data = load(tmp_path)
    assert sequences(data) == {"u": ["10", "2"]}
    assert data.catalog.texts == ["Two", '"Ten" things']
    assert load(tmp_path / "d.inter").fingerprint() == data.fingerprint()


def test_recbole_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"exactly one \.inter"):
        load(tmp_path, format="recbole")
    write(tmp_path / "d.inter", "user_id\titem_id:token\nu\ta\n")
    with pytest.raises(UsageError, match="column header 'user_id'"):
        load(tmp_path)


def test_a_title_missing_from_an_items_first_row_is_taken_from_a_later_one(tmp_path: Path) -> None:
    rows = "user_id,item_id,title\nu,a,\nv,a,A\nu,b,B\nv,b,Other\n"
    data = load(write(tmp_path / "mine.csv", rows))
    assert data.catalog.texts == ["A", "B"]


def test_a_column_that_another_option_names_is_no_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no column 'item_id' .*product"):
        load(write(tmp_path / "mine.csv", "user_id,product\nu,a\n"))


def test_where_no_column_is_free_those_there_are_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'item_id' .*it has only user_id, timestamp\."):
        load(write(tmp_path / "mine.csv", "user_id,timestamp\nu,1\n"))
