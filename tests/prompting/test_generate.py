"""Prompts in files: equal rows in both formats, whole or not at all; one shown to a person."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.errors import UsageError
from llmrec.prompting import generate, show
from llmrec.prompting.p5 import Example, PromptGenerator
from llmrec.runs import sha256_of

SMALL = [
    *("--data.source", "simulated", "--data.simulated.users", "60"),
    *("--data.simulated.items", "250", "--prompts.candidates", "20"),
]
TOLD = [*SMALL, "--data.simulated.reviews", "true"]


def written(out: Path, *options: str) -> list[dict[str, str]]:
    assert generate.main([*SMALL, "--out", str(out), *options]) == 0
    if out.suffix == ".parquet":
        return pl.read_parquet(out).to_dicts()
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def manifest(out: Path) -> dict[str, Any]:
    return json.loads(out.with_name(out.name + ".manifest.json").read_text())


def test_both_formats_hold_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    lines = written(tmp_path / "p.jsonl")
    assert lines == written(tmp_path / "p.parquet")
    assert list(lines[0]) == ["input", "target", "family", "template", "user", "item", "split"]
    assert len(lines) == 60 * 35  # next 5, choose 5, judge 10, direct 10 and 5 of each visitor
    assert {row["split"] for row in lines} == {"train"}
    assert all(row["user"].startswith("u0") and row["item"].startswith("i0") for row in lines)


def test_the_same_options_write_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for file, seed in zip(files, ("4", "4", "5"), strict=True):
        written(file, "--seed", seed)
    hashes = [sha256_of(file) for file in files]
    assert hashes[0] == hashes[1] != hashes[2]


def test_epochs_follow_each_other_and_differ(tmp_path: Path) -> None:
    two = written(tmp_path / "two.jsonl", "--epochs", "2")
    one = written(tmp_path / "one.jsonl")
    assert two[: len(one)] == one
    assert len(two) == 2 * len(one)
    assert two[len(one) :] != one


def test_the_manifest_tells_what_the_file_is_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.jsonl"
    rows = written(out, "--data.simulated.reviews", "true", "--indexing.seed", "3")
    about = manifest(out)
    assert (
        about["prompts"] == len(rows) == sum(sum(n.values()) for n in about["by_family"].values())
    )
    assert about["sha256"] == sha256_of(out)
    assert set(about["by_family"]) == {"rating", "sequential", "explanation", "review", "direct"}
    assert set(about["templates"]) == {row["template"] for row in rows}
    assert about["templates"]["2-3"]["version"] == 1
    assert about["config"]["indexing"]["seed"] == 3
    names = json.loads((tmp_path / "p.jsonl.indexing.json").read_text())
    assert names["fingerprint"] == about["indexing_fingerprint"]
    assert {row["target"] for row in rows if row["template"] == "2-3"} <= set(names["mentions"])
    assert f"{len(rows):,} prompts (train) written to {out}" in capsys.readouterr().out


def test_families_left_out_are_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "p.jsonl")
    assert set(manifest(tmp_path / "p.jsonl")["left_out"]) == {"rating", "explanation", "review"}
    assert "rating left out: prompts.families: rating needs ratings" in capsys.readouterr().out


def test_too_many_candidates_for_the_items_are_said_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "p.jsonl")
    assert manifest(tmp_path / "p.jsonl")["users_with_more_than_half_called_wrong"] == 0
    assert "lower prompts.candidates" not in capsys.readouterr().out
    written(tmp_path / "q.jsonl", "--prompts.candidates", "150")
    assert manifest(tmp_path / "q.jsonl")["users_with_more_than_half_called_wrong"] == 60
    assert "60 users are told that more than half of the items" in capsys.readouterr().out


def test_a_test_file_asks_every_case_with_every_template_held_out_ones_too(
    tmp_path: Path,
) -> None:
    rows = written(tmp_path / "p.parquet", "--part", "test")
    asked = {row["template"] for row in rows}
    assert {"2-13", "5-8", "2-1"} <= asked
    for template in ("2-13", "5-8"):
        assert sum(row["template"] == template for row in rows) == 60
    some = written(tmp_path / "some.jsonl", "--part", "valid", "--only", "2-13, 2-1")
    assert [row["template"] for row in some] == ["2-13"] * 60 + ["2-1"] * 60
    assert {row["split"] for row in some} == {"valid"}


def mistakes() -> list[tuple[list[str], str]]:
    return [
        ([], "--out is missing"),
        (["--out", "p.csv"], r"--out p.csv must end in .jsonl or .parquet"),
        (["--out", "p.jsonl", "--epochs", "0"], "use 1 epoch or more"),
        (["--out", "p.jsonl", "--part", "test", "--epochs", "2"], "--epochs 2 counts training"),
        (["--out", "p.jsonl", "--seed", "-1"], "a seed that is not negative"),
        (["--out", "p.jsonl", "--only", "2-1"], "--only names templates for --part valid or test"),
        (["--out", "p.jsonl", "--part", "test", "--only", "2-99"], "did you mean 2-9?"),
        (["--out", "p.jsonl", "--part", "test", "--only", "1-1"], "rating needs ratings"),
        (["--out", "p.jsonl", "--prompts.families", "review"], "review needs"),
        (["--out", "p.jsonl", "--prompts.candidates", "9000"], "Use fewer"),
        (["--out", "p.jsonl", "--prompts.templates", "nowhere"], "nowhere"),
        (["--out", "p.jsonl", "--indexing.leaf", "9"], "read by indexing.name=collaborative alone"),
    ]


@pytest.mark.parametrize(("options", "message"), mistakes())
def test_mistakes_are_one_sentence_and_write_nothing(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main([*SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_where_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.jsonl"
    written(out)
    before = sha256_of(out)
    assert generate.main([*SMALL, "--out", str(out), "--seed", "1"]) == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert sha256_of(out) == before
    written(out, "--seed", "1", "--overwrite", "true")
    assert sha256_of(out) == manifest(out)["sha256"] != before


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_that_cannot_be_finished_is_not_there(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., Iterator[Example]] = PromptGenerator.train

    def breaks_off(self: PromptGenerator, seed: int, epoch: int = 1) -> Iterator[Example]:
        for number, prompt in enumerate(whole(self, seed, epoch)):
            if number == 500:
                raise UsageError("something is wrong.")
            yield prompt

    monkeypatch.setattr(PromptGenerator, "train", breaks_off)
    out = tmp_path / f"p{suffix}"
    assert generate.main([*SMALL, "--out", str(out)]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_full_disk_is_one_sentence(
    suffix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(dir: Path, prefix: str) -> tuple[int, str]:
        path = dir / f"{prefix}new"
        path.symlink_to("/dev/full")
        return os.open(os.devnull, os.O_RDONLY), str(path)

    monkeypatch.setattr(generate.tempfile, "mkstemp", full)
    out = tmp_path / f"p{suffix}"
    assert generate.main([*SMALL, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Free some space" in error
    assert not list(tmp_path.iterdir())


def test_own_templates_are_asked_instead_of_the_shipped(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "sequential"
    folder.mkdir(parents=True)
    header = "{# id: my-1 | version: 1 | inputs: history | target: item | part: seen #}"
    (folder / "my-1.jinja").write_text(f"{header}\n{{{{ history }}}} | and then\n")
    rows = written(tmp_path / "p.jsonl", "--prompts.templates", str(tmp_path / "mine"))
    assert {row["template"] for row in rows} == {"my-1"}
    assert all(re.fullmatch(r"item_\d+(, item_\d+)* \| and then", row["input"]) for row in rows)


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert show.main([*TOLD, *options]) == 0
    return capsys.readouterr().out


def test_one_prompt_is_shown_as_the_file_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = written(tmp_path / "p.jsonl", "--part", "test", "--only", "2-7,2-13,5-2")
    capsys.readouterr()
    for row in rows[::45]:
        text = shown(capsys, "--template", row["template"], "--user", row["user"])
        assert f"\n{row['input']}\n--- answer\n{row['target']}\n" in text
        assert f"template {row['template']} " in text
        assert f"user {row['user']}, item {row['item']}\n" in text
    assert "2-13 (sequential, held out), test" in shown(
        capsys, "--template", "2-13", "--user", "u00003"
    )


def test_a_training_prompt_is_shown_about_the_last_fitting_interaction(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys, "--template", "4-1", "--user", "u00003", "--part", "train")
    assert "template 4-1 (review), train, user u00003" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template", "2-3"], "--template and --user are both needed"),
        (["--template", "2-3", "--user", "u3"], "--user u3 is not in the data; did you mean"),
        (["--template", "2-33", "--user", "u00003"], "--template 2-33: no template has this id"),
        (["--template", "1-1", "--user", "u00003"], "rating needs ratings"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([*SMALL, *options]) == 2
    assert message in capsys.readouterr().err
