"""What users wrote stays beside what they met, whatever is sorted, dropped or kept for later."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.data.interactions import REVIEW_TEXTS, Dataset
from llmrec.data.prepared import write_prepared
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.readers.prepared import REVIEWS
from llmrec.data.simulated import SimulatedConfig
from llmrec.errors import UsageError
from llmrec.runs import MANIFEST, sha256_of, write_manifest

CSV = (  # w has one interaction; v's are a tie; u's stand in the wrong order
    "user_id,item_id,timestamp,rating,title,review,headline,explanation,feature\n"
    "v,b,3,5,B,vb review,vb headline,vb explanation,vb\n"
    "u,c,4,4,C,uc review,,uc explanation,uc\n"
    "w,c,9,1,C,wc review,wc headline,wc explanation,wc\n"
    "u,b,1,3,B,ub review,ub headline,,\n"
    "v,a,3,,A,,va headline,  ,va\n"
    "u,a,2,2,A,ua review,ua headline,ua explanation,ua\n"
)


def load(path: Path, **options: Any) -> Dataset:
    options.setdefault("min_user_interactions", 1)
    return load_dataset(DataConfig(source=str(path), **options))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.csv", CSV)


def told(data: Dataset, name: str) -> dict[str, list[str]]:
    """External user -> what they wrote, oldest first."""
    offsets, texts = data.interactions.offsets, data.reviews[name]
    assert texts.dtype == object and texts.shape == data.interactions.items.shape
    assert {type(text) for text in texts} == {str}
    return {
        user: texts[offsets[row] : offsets[row + 1]].tolist()
        for row, user in enumerate(data.user_ids)
    }


def test_texts_follow_their_interactions_through_sorting(table: Path) -> None:
    data = load(table)
    assert tuple(data.reviews) == REVIEW_TEXTS
    assert told(data, "review") == {
        "u": ["ub review", "ua review", "uc review"],  # at 1, 2, 4
        "v": ["vb review", ""],  # the tie: as in the file
        "w": ["wc review"],
    }
    assert told(data, "headline")["u"] == ["ub headline", "ua headline", ""]
    assert told(data, "explanation")["v"] == ["vb explanation", ""]  # spaces say nothing
    assert told(data, "feature") == {"u": ["", "ua", "uc"], "v": ["vb", "va"], "w": ["wc"]}
    missing = {name: data.counts[f"{name}s_missing"] for name in REVIEW_TEXTS}
    assert missing == {"review": 1, "headline": 1, "explanation": 2, "feature": 1}
    assert list(data.catalog.fields) == ["title"]  # they say nothing of the item


def test_texts_follow_through_filters_and_renumbering(table: Path) -> None:
    data = load(table, min_user_interactions=2, max_user_interactions=1)
    assert told(data, "review") == {"u": ["uc review"], "v": [""]}
    assert told(data, "feature") == {"u": ["uc"], "v": ["va"]}
    assert data.catalog.ids == ["a", "c"]
    assert data.interactions.items.tolist() == [2, 1]


@pytest.mark.parametrize("limit", [2, 3, "all"])
def test_every_interaction_of_a_sample_keeps_its_own_texts(
    tmp_path: Path, limit: int | str
) -> None:
    rng = np.random.default_rng(0)
    rows = [(user, f"i{item}", rng.integers(9)) for user in range(30) for item in rng.choice(50, 4)]
    rng.shuffle(rows)
    lines = [f"{user},{item},{time},{user} of {item}" for user, item, time in rows]
    path = write(tmp_path / "x.csv", "\n".join(["user_id,item_id,timestamp,review", *lines]))
    data = load(path, sample_users=11, max_user_interactions=limit)
    x = data.interactions
    expected = [
        f"{data.user_ids[user]} of {data.catalog.ids[item - 1]}"
        for user, item in zip(x.users(), x.items, strict=True)
    ]
    assert len(expected) == 11 * (4 if limit == "all" else limit)
    assert data.reviews["review"].tolist() == expected


def test_data_without_such_columns_have_no_reviews_and_count_none(tmp_path: Path) -> None:
    data = load(write(tmp_path / "x.csv", "user_id,item_id,rating\nu,a,3\n"))
    assert dict(data.reviews) == {}
    assert not [name for name in data.counts if name.removesuffix("s_missing") in REVIEW_TEXTS]


def test_line_breaks_commas_and_quotes_in_a_quoted_review_are_its_own(tmp_path: Path) -> None:
    body = 'Two lines,\n"quoted"\n\nand 猫'
    quoted = body.replace('"', '""')
    path = write(
        tmp_path / "x.csv",
        f'user_id,item_id,review,feature\nu,a,"{quoted}",fit\nu,b,plain,\nu,c,"",\n',
    )
    data = load(path)
    assert told(data, "review") == {"u": [body, "plain", ""]}
    assert told(data, "feature") == {"u": ["fit", "", ""]}
    assert data.counts["lines_inside_quoted_values"] == 3


@pytest.mark.parametrize("kind", ["tsv", "parquet", "inter"])
def test_every_format_gives_the_same_texts(table: Path, tmp_path: Path, kind: str) -> None:
    frame = pl.read_csv(table, infer_schema=False)
    path = tmp_path / f"other.{kind}"
    if kind == "parquet":
        frame.write_parquet(path)
    else:
        atomic = {name: f"{name}:token" for name in frame.columns} if kind == "inter" else {}
        frame.rename(atomic).write_csv(path, separator="\t")
    assert load(path).told_fingerprint() == load(table).told_fingerprint()
    assert load(path).fingerprint() == load(table).fingerprint()


def test_texts_stand_in_the_interactions_file_and_the_items_file_has_fields(
    tmp_path: Path,
) -> None:
    write(tmp_path / "interactions.csv", "user_id,item_id,review\nu,a,liked it\n")
    write(tmp_path / "items.csv", "item_id,title,headline\na,A,news\n")
    data = load(tmp_path)
    assert {name: texts.tolist() for name, texts in data.reviews.items()} == {
        "review": ["liked it"]
    }
    assert data.catalog.fields == {"title": ["A"], "headline": ["news"]}


def test_columns_may_have_other_names_and_must_then_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id,reviewText,summary\nu,a,long,short\n")
    data = load(path, review_column="reviewText", headline_column="summary")
    assert (told(data, "review"), told(data, "headline")) == ({"u": ["long"]}, {"u": ["short"]})
    with pytest.raises(UsageError, match=r"no column 'reviewTxt' \(data\.review_column\)"):
        load(path, review_column="reviewTxt")


def test_a_column_named_none_stays_a_field_of_the_item(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id,title,headline\nu,a,A,news\n")
    assert load(path).catalog.fields == {"title": ["A"]}
    data = load(path, headline_column="none")
    assert dict(data.reviews) == {}
    assert data.catalog.fields["headline"] == ["news"]


def test_a_column_that_is_no_text_is_refused_with_the_way_out(tmp_path: Path) -> None:
    rows = {"user_id": ["u"], "item_id": ["a"], "review": [{"body": "x"}]}
    pl.DataFrame(rows).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"'review' \(data\.review_column\) has the type .*none"):
        load(tmp_path / "x.parquet")


def test_the_told_fingerprint_sees_what_the_other_leaves_out(table: Path) -> None:
    data = load(table)
    ratings = data.interactions.ratings
    assert ratings is not None
    louder = replace(data, reviews={**data.reviews, "review": data.reviews["review"] + "!"})
    fewer = replace(data, reviews={"review": data.reviews["review"]})
    renamed = replace(data, reviews={"headline": data.reviews["review"]})
    higher = replace(data, interactions=replace(data.interactions, ratings=ratings + 1))
    none = replace(data, interactions=replace(data.interactions, ratings=None))
    versions = (data, louder, fewer, renamed, higher, none)
    assert len({version.told_fingerprint() for version in versions}) == len(versions)
    assert {version.fingerprint() for version in versions} == {data.fingerprint()}


def prepare(out: Path, config: DataConfig) -> Dataset:
    """What the source gave, once it is written to a folder."""
    data = load_dataset(config)
    write_prepared(out, data, config)
    return data


@pytest.mark.parametrize("source", ["table", "simulated"])
def test_a_prepared_folder_gives_ratings_and_texts_back(
    table: Path, tmp_path: Path, source: str
) -> None:
    shop = SimulatedConfig(users=40, items=240, reviews=True)
    config = (
        DataConfig(simulated=shop)
        if source == "simulated"
        else DataConfig(source=str(table), min_user_interactions=2)
    )
    data = prepare(tmp_path / "folder", config)
    again = load_dataset(DataConfig(source=str(tmp_path / "folder")))
    assert list(again.reviews) == list(data.reviews) == list(REVIEW_TEXTS)
    for name, texts in data.reviews.items():
        np.testing.assert_array_equal(again.reviews[name], texts)
        assert again.reviews[name].dtype == object
    np.testing.assert_array_equal(again.interactions.ratings, data.interactions.ratings)
    assert again.told_fingerprint() == data.told_fingerprint()
    assert again.fingerprint() == data.fingerprint()
    with pytest.raises(KeyError):
        again.reviews["title"]


def test_a_prepared_folder_reads_a_text_when_it_is_asked_for_and_once(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path / "folder", DataConfig(source=str(table), min_user_interactions=2))
    read, plain = [], pl.read_parquet

    def watched(file: Path, **options: Any) -> pl.DataFrame:
        read.append((file.name, options["columns"]))
        return plain(file, **options)

    monkeypatch.setattr(pl, "read_parquet", watched)
    data = load_dataset(DataConfig(source=str(tmp_path / "folder")))
    assert REVIEWS not in dict(read)
    assert data.reviews["feature"] is data.reviews["feature"]
    assert read[-1] == (REVIEWS, ["feature"])
    assert [name for name, _ in read].count(REVIEWS) == 1


def test_reviews_of_another_length_or_kind_are_refused_even_where_the_manifest_agrees(
    table: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    prepare(folder, DataConfig(source=str(table), min_user_interactions=2))
    for values in (["x"], [1] * 5):
        pl.DataFrame({"review": values}).write_parquet(folder / REVIEWS)
        files = [file for file in folder.iterdir() if file.name != MANIFEST]
        write_manifest(folder, {file.name: sha256_of(file) for file in files})
        data = load_dataset(DataConfig(source=str(folder)))
        with pytest.raises(UsageError, match=r"reviews\.parquet does not hold 5 rows of text"):
            data.reviews["review"]
    with pytest.raises(UsageError, match=r"reviews\.parquet cannot be read as parquet"):
        data.reviews["headline"]  # dataset.json says that there is one


def test_a_folder_from_before_there_were_reviews_still_opens(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    plain = write(tmp_path / "plain.csv", "user_id,item_id,rating\nu,a,3\nu,b,4\n")
    before = prepare(folder, DataConfig(source=str(plain), min_user_interactions=1))
    about = json.loads((folder / "dataset.json").read_text())
    del about["reviews"]
    for option in ("review_column", "headline_column", "explanation_column", "feature_column"):
        del about["prepared_with"][option]
    del about["prepared_with"]["simulated"]["reviews"]
    (folder / "dataset.json").write_text(json.dumps(about))
    files = [file for file in folder.iterdir() if file.name != MANIFEST]
    write_manifest(folder, {file.name: sha256_of(file) for file in files})
    again = load_dataset(DataConfig(source=str(folder)))
    assert dict(again.reviews) == {}
    assert again.told_fingerprint() == before.told_fingerprint()
    with pytest.raises(UsageError, match=r"data\.review_column=body but .* with review\."):
        load_dataset(DataConfig(source=str(folder), review_column="body"))


def test_a_review_of_ten_megabytes_is_read_whole(tmp_path: Path) -> None:
    body = "long, long\n" * 900_000
    path = write(tmp_path / "x.csv", f'user_id,item_id,review\nu,a,"{body}"\nu,b,short\n')
    assert told(load(path), "review") == {"u": [body, "short"]}
