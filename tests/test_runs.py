"""The run folder under faults: old or new, never half."""

import errno
import json
import os
from pathlib import Path

import pytest

from llmrec import runs
from llmrec.errors import UsageError
from llmrec.runs import Journal, check_folder, discard, new_folder, open_run, write_atomically


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


def rewrite(file, change):
    """Replace a file's bytes by what `change` makes of them."""
    file.write_bytes(change(file.read_bytes()))


def manifest_of(path, hashes):
    """A well-formed manifest with other contents."""
    runs.write_manifest(path, hashes)


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
    "an empty manifest": (
        lambda path: manifest_of(path, {}),
        r"manifest\.json is damaged",
    ),
    "a manifest without its last newline": (
        lambda path: rewrite(path / "manifest.json", lambda data: data[:-1]),
        r"manifest\.json is damaged",
    ),
    "a manifest with other white space": (
        lambda path: rewrite(path / "manifest.json", lambda data: data.replace(b"  ", b" \t", 1)),
        r"manifest\.json is damaged",
    ),
    "a manifest that names a file twice": (
        lambda path: rewrite(
            path / "manifest.json",
            lambda data: data.replace(b'    "model', b'    "model": 1, "model'),
        ),
        r"manifest\.json is damaged",
    ),
    "a folder in a file's place": (
        lambda path: ((path / "model").unlink(), (path / "model").mkdir()),
        r"model cannot be read \(Is a directory\)",
    ),
    "a folder in the manifest's place": (
        lambda path: ((path / "manifest.json").unlink(), (path / "manifest.json").mkdir()),
        r"manifest\.json cannot be read \(Is a directory\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_the_way_out(tmp_path, damage):
    path = checkpoint(tmp_path / "epoch-001", model=b"weights", other=b"more")
    harm, message = DAMAGE[damage]
    harm(path)
    with pytest.raises(UsageError, match=message + r".* Train again\."):
        check_folder(path, "Train again.")


@pytest.mark.parametrize(
    "name", ["../secret", "/secret", "a/secret", "..", ".", "", "sub/../model", "a\0b"]
)
def test_a_manifest_names_plain_files_only(tmp_path, name):
    path = checkpoint(tmp_path / "epoch-001", model=b"weights")
    (tmp_path / "secret").write_bytes(b"weights")
    manifest_of(path, {name: runs.sha256_of(path / "model")})
    with pytest.raises(UsageError, match=r"manifest\.json is damaged"):
        check_folder(path, "")


@pytest.mark.parametrize("name", ["model", "manifest.json"])
def test_every_flipped_bit_and_every_truncation_is_detected(tmp_path, name):
    path = checkpoint(tmp_path / "epoch-001", model=b"weights")
    whole = (path / name).read_bytes()
    harmed = [whole[:size] for size in range(len(whole))]
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        harmed.append(bytes(data))
    for data in harmed:
        (path / name).write_bytes(data)
        with pytest.raises(UsageError):
            check_folder(path, "")
    (path / name).write_bytes(whole)
    check_folder(path, "")


def test_a_discarded_folder_goes_out_of_sight_before_it_is_deleted(tmp_path, monkeypatch):
    checkpoint(tmp_path / "old", model=b"weights")

    def killed(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            discard(tmp_path / "old")
    (tmp_path / ".old.discarded").mkdir(exist_ok=True)  # what a kill in between leaves
    if (tmp_path / "old").exists():
        discard(tmp_path / "old")
    assert not (tmp_path / "old").exists()


def test_resuming_a_journal_keeps_its_first_lines_and_drops_a_torn_one(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    Journal(path, kept=2).add(epoch=3)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("kept", [2, 3])
def test_a_journal_line_that_is_damaged_or_gone_is_named(tmp_path, kept):
    path = tmp_path / "j.jsonl"
    path.write_text('{"epoch": 1}\n{"ep\n')
    with pytest.raises(UsageError, match="line 2 is missing or damaged"):
        Journal(path, kept)


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
