"""The run folder, and the only writer of artefacts: under a temporary name, renamed when whole.

runs/NAME/config.yaml                   the resolved config
runs/NAME/fit-journal.jsonl             a line per epoch; refit-journal.jsonl for a refit
runs/NAME/checkpoints/                  see llmrec/checkpoints.py
runs/NAME/per_user.parquet              written after the test evaluation
runs/NAME/result.json                   written last: where it exists, the run is finished
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmrec.errors import UsageError

RESULT, CONFIG, JOURNAL, CHECKPOINTS = "result.json", "config.yaml", "journal.jsonl", "checkpoints"
MANIFEST = "manifest.json"
CARD = "card.md"
NEW = ".config.new"
"""The config of a run that is about to begin."""
LEFTOVERS = (
    RESULT,
    "*.parquet",
    CARD,
    f"*{JOURNAL}",
    "answers.jsonl",
    "chat.json",
    "seconds.json",
    "server.log",
    "indexing.json",
    "tokenizer.json",
    CHECKPOINTS,
    "events.out.tfevents.*",
    ".*.parquet.*",
    f".{CARD}.*",
    ".*.json*",
    ".*.yaml.*",
    ".*.discarded",
    "..config.new.*",
)
"""What a run writes beside its config; the result comes first, for it vouches for the others."""


@dataclass(frozen=True)
class RunOptions:
    """One training run: its name, seed and folder, and what a killed one resumes from."""

    label: str = ""
    """The row's name in tables; runs that differ only in seed share it. Empty: what is trained."""
    seed: int = 0
    """Decides initial weights, batches, dropout, and all else that is drawn."""
    folder: str = ""
    """Where the run is written. Empty: runs/<data>-<label>-s<seed>."""
    overwrite: bool = False
    """Whether a finished run in that folder may be replaced."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the unfinished run in that folder, if there is one; never: start anew.
    --resume for short."""
    checkpoint_steps: int | Literal["epoch"] = "epoch"
    """Optimizer steps between two states that a killed run resumes from, beside those at the end of
    every epoch."""
    keep_states: int = 1
    """States kept at a time, the latest; an older one helps only if the disk damages the newer."""
    fit_on: Literal["train", "train+valid"] = "train"
    """train+valid trains again on both, for the number of epochs that validation selected."""
    select: str = "NDCG@10"
    """Validation measure that picks the epoch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32."""
    tensorboard: bool = False
    """Whether curves are also written for TensorBoard (extra `report`)."""

    def __post_init__(self) -> None:
        """Refuse seeds that not every random generator takes."""
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"run.seed={self.seed} must lie in [0, 2**32).")
        if self.checkpoint_steps != "epoch" and self.checkpoint_steps < 1:
            raise UsageError(f"run.checkpoint_steps={self.checkpoint_steps} must be at least 1.")
        if self.keep_states < 1:
            raise UsageError(f"run.keep_states={self.keep_states} must be at least 1.")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into one sentence."""
    try:
        yield
    except OSError as error:
        remedy = "Free some space or name" if error.errno not in FORBIDDEN else "Name"
        raise UsageError(
            f"{path} cannot be written ({error.strerror or error}). {remedy} another folder."
        ) from error


def _make_folder(folder: Path) -> None:
    """Make a folder so that its name survives a crash of the machine."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: a reader sees the old file or the new one, whole."""
    with _writing(path):
        _make_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, which must not exist yet, when the block ends well.

    On leaving, every file gets its sha256 into ``manifest.json`` (written last), all is forced to
    the disk, and the folder takes its name. Nothing is ever replaced: a newer checkpoint or shard
    has a name of its own, and what it makes superfluous is deleted afterwards, so that a whole one
    exists at every instant.
    """
    with _writing(path):
        _make_folder(path.parent)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            hashes = {file.name: sha256_of(file) for file in sorted(temporary.iterdir())}
            for file in temporary.iterdir():
                sync(file)
            write_manifest(temporary, hashes)
            temporary.chmod(0o755)
            temporary.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _manifest(hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a manifest holds: sha256 by file name, and its own over them."""
    own = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return {"sha256": dict(hashes), "manifest": own}


def write_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write a folder's manifest: sha256 by file name."""
    write_json(folder / MANIFEST, _manifest(hashes))


def check_folder(path: Path, remedy: str) -> None:
    """Compare a folder's files with its manifest.

    Raises:
        UsageError: A file is missing or its bytes have changed; names the file and `remedy`.
    """
    manifest = path / MANIFEST
    try:
        written = manifest.read_bytes()
        content = json.loads(written)
        expected = dict(content["sha256"])
        # As `write_json` puts it, byte for byte: changed white space is damage as well.
        canonical = json.dumps(_manifest(expected), indent=2, ensure_ascii=False) + "\n"
        whole = written == canonical.encode() and all(
            name != ".." and "\0" not in name and Path(name).name == name != "" for name in expected
        )
    except FileNotFoundError:
        raise UsageError(
            f"{manifest} is missing, so {path} was not written to its end. {remedy}"
        ) from None
    except OSError as error:
        raise UsageError(
            f"{manifest} cannot be read ({error.strerror or error}). {remedy}"
        ) from None
    except (ValueError, LookupError, TypeError):  # no JSON, or not of this shape
        whole = False
    if not whole or not expected:
        raise UsageError(f"{manifest} is damaged. {remedy}")
    for name, digest in expected.items():
        file = path / name
        try:
            found = sha256_of(file)
        except FileNotFoundError:
            raise UsageError(f"{file} is missing. {remedy}") from None
        except OSError as error:
            raise UsageError(
                f"{file} cannot be read ({error.strerror or error}). {remedy}"
            ) from None
        if found != digest:
            raise UsageError(f"{file} is damaged: its sha256 differs from the manifest's. {remedy}")


def discard(path: Path) -> None:
    """Delete a folder so that it is never seen half deleted: it goes out of sight first."""
    hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.discarded")
    if hidden != path:
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
    shutil.rmtree(hidden)


class Journal:
    """One JSON object a line, appended as things happen."""

    def __init__(self, path: Path, kept: int = 0) -> None:
        """Start a journal at `path`, with the first `kept` lines of the one that is there.

        Raises:
            UsageError: One of these lines is missing or no JSON; names its number.
        """
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True)[:kept] if path.exists() else []
        for number in range(1, kept + 1):
            try:
                json.loads(lines[number - 1])
            except (IndexError, ValueError):
                raise UsageError(
                    f"{path} line {number} is missing or damaged, so the run cannot be resumed. "
                    "Start over with --run.resume never."
                ) from None
        write_atomically(path, b"".join(lines))

    def add(self, **values: Any) -> None:
        """Append one line and force it to the disk."""
        with _writing(self.path):
            size = self.path.stat().st_size
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(values) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, size)
                raise


def check_vacant(folder: Path, overwrite: bool) -> None:
    """Ask, before anything costly, whether a run may be written to `folder`.

    Raises:
        UsageError: It holds a finished run, or something that is no run at all.
    """
    if (folder / RESULT).exists() and not overwrite:
        raise UsageError(
            f"{folder} holds a finished run. Name another with --run.folder or replace it with "
            "--run.overwrite true."
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Name a folder with --run.folder.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = {name for name in names if not name.lstrip(".").startswith(NEW.lstrip("."))}
    if foreign and not foreign & {CONFIG, CHECKPOINTS}:
        raise UsageError(
            f"{folder} is not empty and holds no run. Name another folder with --run.folder."
        )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep every other process from training in this folder, which is made if need be.

    Raises:
        UsageError: One does already.
    """
    with _writing(folder):
        _make_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except BlockingIOError:
            raise UsageError(
                f"another process is at work in {folder}. Wait for it, or name another "
                "--run.folder."
            ) from None
        yield
    finally:
        os.close(descriptor)


def open_run(folder: Path, config_yaml: str, overwrite: bool) -> None:
    """Make the run's folder and write its resolved config; what an earlier run left there goes.

    Raises:
        UsageError: See `check_vacant`; or the folder cannot be written.
    """
    check_vacant(folder, overwrite)
    new = folder / NEW
    write_atomically(new, config_yaml.encode())  # a full disk shows before anything is deleted
    with _writing(folder):
        for pattern in LEFTOVERS:
            for path in folder.glob(pattern):
                discard(path) if path.is_dir() else path.unlink()
        new.replace(folder / CONFIG)
        sync(folder)
