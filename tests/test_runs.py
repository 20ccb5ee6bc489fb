"""The run folder under faults: old or new, never half."""

import errno
import json
import os
from pathlib import Path

import pytest

from llmrec import runs
from llmrec.errors import UsageError
from llmrec.runs import check_folder, new_folder, open_run, remove_others, write_atomically


def failing(monkeypatch, name, code):
    """Let a function of ``os`` fail as the file system would."""

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(runs.os, name, fail)


def checkpoint(path, **files):
    """A whole folder of named files."""
    with new_folder(path) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return path


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_the_old_file(monkeypatch, tmp_path, code):
    path = tmp_path / "result.json"
    path.write_text("old")
    failing(monkeypatch, "fsync", code)
    with pytest.raises(UsageError, match=r"result\.json cannot be written .* Free some space"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_may_not_be_written_is_one_sentence(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(runs.tempfile, "mkstemp", refuse)
    with pytest.raises(UsageError, match=r"cannot be written \(Permission denied\)"):
        write_atomically(tmp_path / "result.json", b"new")
    assert not list(tmp_path.iterdir())


def test_a_path_through_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "result.json", b"new")


def test_a_written_file_can_be_read_by_others(tmp_path):
    write_atomically(tmp_path / "deep" / "result.json", b"new")
    assert (tmp_path / "deep" / "result.json").stat().st_mode & 0o777 == 0o644


def test_a_new_folder_is_invisible_until_it_is_whole(tmp_path):
    path = tmp_path / "epoch-001"
    with new_folder(path) as folder:
        (folder / "model").write_bytes(b"weights")
        assert not path.exists()
        assert not list(tmp_path.glob("epoch-*"))  # the temporary name matches no pattern either
    assert {file.name for file in path.iterdir()} == {"model", "manifest.json"}
    check_folder(path, "")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_new_folder_that_breaks_off_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "epoch-001") as folder:
        (folder / "model").write_bytes(b"half")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_saving_leaves_the_older_folder_alone(monkeypatch, tmp_path):
    older = checkpoint(tmp_path / "epoch-001", model=b"weights")
    failing(monkeypatch, "fsync", errno.ENOSPC)
    with pytest.raises(UsageError, match="No space left on device"):
        checkpoint(tmp_path / "epoch-002", model=b"weights")
    assert list(tmp_path.iterdir()) == [older]
    check_folder(older, "")


def test_a_folder_is_never_replaced(tmp_path):
    path = checkpoint(tmp_path / "epoch-001", model=b"old")
    with pytest.raises(UsageError, match="cannot be written"):
        checkpoint(path, model=b"new")
    assert (path / "model").read_bytes() == b"old"


DAMAGE = {
    "a missing file": (lambda path: (path / "model").unlink(), "model is missing"),
    "a truncated file": (lambda path: (path / "model").write_bytes(b"weight"), "model is damaged"),
    "an empty file": (lambda path: (path / "model").write_bytes(b""), "model is damaged"),
    "a flipped bit": (lambda path: (path / "model").write_bytes(b"veights"), "model is damaged"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "not written to its end"),
    "half a manifest": (
        lambda path: (path / "manifest.json").write_text('{"sha256": {"mo'),
        r"manifest\.json is damaged",
    ),
    "another manifest": (
        lambda path: (path / "manifest.json").write_text("[]"),
        r"manifest\.json is damaged",
    ),
    "a manifest of nothing": (
        lambda path: (path / "manifest.json").write_text('{"sha256": null}'),
        r"manifest\.json is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_the_way_out(tmp_path, damage):
    path = checkpoint(tmp_path / "epoch-001", model=b"weights", other=b"more")
    harm, message = DAMAGE[damage]
    harm(path)
    with pytest.raises(UsageError, match=message + r".* Train again\."):
        check_folder(path, "Train again.")


def test_every_flipped_bit_is_detected(tmp_path):
    path = checkpoint(tmp_path / "epoch-001", model=b"weights")
    for byte in range(7):
        for bit in range(8):
            data = bytearray(b"weights")
            data[byte] ^= 1 << bit
            (path / "model").write_bytes(data)
            with pytest.raises(UsageError):
                check_folder(path, "")


def test_removing_the_others_keeps_this_one_and_other_stages(tmp_path):
    for name in ("fit-epoch-001", "fit-epoch-002", "fit-epoch-010", "refit-epoch-001"):
        checkpoint(tmp_path / name, model=b"weights")
    remove_others(tmp_path / "fit-epoch-002", "fit-epoch-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit-epoch-002", "refit-epoch-001"]


def test_a_journal_is_one_object_per_line_as_soon_as_it_is_added(tmp_path):
    journal = runs.Journal(tmp_path / "journal.jsonl")
    for epoch in (1, 2):
        journal.add(epoch=epoch, loss=1 / epoch)
        lines = (tmp_path / "journal.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, epoch + 1))


def finished_run(folder: Path) -> Path:
    """A folder as a finished run leaves it, and a note of its owner's."""
    open_run(folder, "run: 1\n", overwrite=False)
    for name in ("result.json", "per_user.parquet", "fit-journal.jsonl", "notes.md"):
        (folder / name).write_text("old")
    checkpoint(folder / "checkpoints" / "fit-epoch-001", model=b"weights")
    return folder


def test_a_finished_run_is_refused(tmp_path):
    folder = finished_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"finished run.*--run\.folder.*--run\.overwrite true"):
        open_run(folder, "run: 2\n", overwrite=False)
    assert (folder / "config.yaml").read_text() == "run: 1\n"


def test_overwriting_clears_what_a_run_writes_and_nothing_else(tmp_path):
    folder = finished_run(tmp_path / "run")
    open_run(folder, "run: 2\n", overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "notes.md"}
    assert (folder / "config.yaml").read_text() == "run: 2\n"


def test_an_unfinished_run_is_started_again(tmp_path):
    folder = finished_run(tmp_path / "run")
    (folder / "result.json").unlink()
    open_run(folder, "run: 2\n", overwrite=False)
    assert not (folder / "checkpoints").exists()  # else saving the same epoch would be refused


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty and holds no run"):
        open_run(tmp_path, "run: 1\n", overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UsageError, match=r"is a file\. Name a folder with --run\.folder"):
        open_run(tmp_path / "run", "run: 1\n", overwrite=False)


def test_an_empty_folder_becomes_a_run(tmp_path):
    open_run(tmp_path, "run: 1\n", overwrite=False)
    assert (tmp_path / "config.yaml").read_text() == "run: 1\n"
