"""Full disks, read-only folders and hostile files: one sentence, the old artefact, no litter."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_runs
import yaml
from rich.console import Console

from llmrec import runs
from llmrec.assembly import TrainConfig
from llmrec.errors import UsageError
from llmrec.evaluation import suite
from llmrec.evaluation.result import read_result, write_result
from llmrec.evaluation.suite import read_suite
from llmrec.options import parse
from llmrec.progress import EpochLog
from llmrec.reporting import tables
from llmrec.train_tcf import main as train

# TensorBoard's own thread dies of a full disk; whose turn it is then is chance.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
SENTENCE = ("cannot be written", "another folder.")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in a folder of its own."""
    return small_runs.train(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run's record beside nothing else."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("result.json", "per_user.parquet", "config.yaml", "fit-journal.jsonl"):
        (folder / name).write_bytes((finished / name).read_bytes())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compare(run: Path, title: str = "old") -> None:
    record = tables.build_table([read_result(run)], tables.Question(title=title))
    tables.write_files(record, run / "table.md", run / "table.json")


def other_result(run: Path) -> None:
    """Write a result whose files both differ from those that are there."""
    result = read_result(run)
    ranks = result.per_user["greater"] + 1
    write_result(run, type(result)(result.record, result.per_user.with_columns(greater=ranks)))


WRITES: dict[str, Callable[[Path], object]] = {
    "config.yaml": lambda run: runs.write_atomically(run / "config.yaml", b"seed: 1\n" * 9000),
    "journal": lambda run: runs.Journal(run / "fit-journal.jsonl"),
    "result": other_result,
    "comparison": lambda run: compare(run, "new"),
}
"""What writes artefacts, over ones that are there."""
STEPS = ("write", "fsync", "rename")
CODES = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)


class Disk:
    """Counts the calls that reach the disk and fails the k-th of one kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.step, self.fails_at, self.code = 0, "", 0, 0
        fdopen, fsync, rename = os.fdopen, os.fsync, Path.replace

        def opened(descriptor, *arguments, **options):
            file = fdopen(descriptor, *arguments, **options)
            write = file.write

            def half(data):
                if self.is_due("write"):
                    write(data[: len(data) // 2])
                    self.fail()
                return write(data)

            return Proxy(file, half)

        def synced(descriptor):
            if self.is_due("fsync"):
                self.fail()
            return fsync(descriptor)

        def renamed(path, target):
            if self.is_due("rename"):
                self.fail()
            return rename(path, target)

        monkeypatch.setattr(runs.os, "fdopen", opened)
        monkeypatch.setattr(runs.os, "fsync", synced)
        monkeypatch.setattr(Path, "replace", renamed)

    def is_due(self, step: str) -> bool:
        self.calls += step == self.step
        return step == self.step and self.calls == self.fails_at

    def fail(self) -> None:
        raise OSError(self.code, os.strerror(self.code))


class Proxy:
    """A file whose writes are somebody else's."""

    def __init__(self, file, write) -> None:
        self.file, self.write = file, write
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("artefact", WRITES)
def test_a_disk_that_fails_at_any_call_leaves_old_or_new_files_and_no_others(
    run: Path, monkeypatch: pytest.MonkeyPatch, artefact: str, step: str,
    figure: Callable[[str, object], None],
) -> None:  # fmt: skip
    compare(run)
    before = contents(run)
    disk = Disk(monkeypatch)
    disk.step, survived = step, 0
    WRITES[artefact](run)
    after, calls = contents(run), disk.calls
    assert calls
    for number in range(1, calls + 1):
        for code in CODES:
            for name, content in before.items():
                (run / name).write_bytes(content)
            disk.calls, disk.fails_at, disk.code = 0, number, code
            with pytest.raises(UsageError) as error:
                WRITES[artefact](run)
            disk.fails_at = 0
            for part in (str(run), os.strerror(code), *SENTENCE):
                assert part in str(error.value)
            assert "\n" not in str(error.value)
            found = contents(run)
            assert found.keys() == before.keys()
            for name, content in found.items():
                assert content in (before[name], after[name]), name
            first = number == 1 and step != "fsync"
            assert not first or found == before
            survived += 1
    figure(f"failures at {step} while writing {artefact}", f"{survived} of {survived} survived")


def limited(work: Callable[[], object], limit: int) -> str:
    """The sentence that `work` is refused with while the system lets no file exceed `limit` bytes.

    In this process and not a forked one: polars' threads do not survive a fork.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write says EFBIG
    said = io.StringIO()  # pytest's own files are limited too
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            work()
    except UsageError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    raise AssertionError(f"nothing was refused: {said.getvalue()}")


@pytest.mark.parametrize("limit", [0, 1, 60])
@pytest.mark.parametrize("artefact", ["config.yaml", "result", "comparison"])
def test_a_file_that_the_system_cuts_short_is_never_seen(
    run: Path, artefact: str, limit: int
) -> None:
    compare(run)
    before = contents(run)
    said = limited(lambda: WRITES[artefact](run), limit)
    for part in (str(run), "File too large", *SENTENCE):
        assert part in said
    assert contents(run) == before


def test_whole_lines_of_a_journal_outlive_a_full_disk(run: Path) -> None:
    path = run / "fit-journal.jsonl"
    journal = runs.Journal(path)
    journal.add(epoch=1, loss=0.5)
    whole = path.read_bytes()
    said = limited(lambda: journal.add(epoch=2, loss=0.25), len(whole) + 5)
    for part in (str(path), "File too large", *SENTENCE):
        assert part in said
    assert path.read_bytes().startswith(whole)
    assert json.loads(path.read_bytes().splitlines()[0]) == {"epoch": 1, "loss": 0.5}


def test_a_result_whose_second_file_cannot_be_written_is_none(run: Path) -> None:
    old = contents(run)
    replace = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if target.name == "result.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(UsageError, match=r"result\.json cannot be written"):
            other_result(run)
    (run / "result.json").unlink()
    with pytest.raises(UsageError, match="no finished run"):
        read_result(run)
    (run / "result.json").write_bytes(old["result.json"])
    with pytest.raises(UsageError, match="sha256 differs"):  # old record, new values: never mixed
        read_result(run)


def test_curves_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    quiet = Console(file=io.StringIO())

    def work() -> None:
        log = EpochLog(tmp_path, "fit", "NDCG@10", quiet, tensorboard=True, data="")
        for epoch in range(1, 2000):
            log.journal.path.write_bytes(b"")  # it is the curves that grow
            log.add(epoch, 0.1, 0.5, 0.1, 0.2)
        log.close()

    said = limited(work, 500)
    for part in (str(tmp_path), "File too large", "leave out --run.tensorboard"):
        assert part in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("artefact", WRITES)
def test_a_folder_without_the_right_to_write_is_one_sentence(run: Path, artefact: str) -> None:
    compare(run)
    before = contents(run)
    run.chmod(0o555)
    try:
        with pytest.raises(UsageError, match=r"cannot be written \(Permission denied\)"):
            WRITES[artefact](run)
    finally:
        run.chmod(0o755)
    assert contents(run) == before


# The commands.


def said_by(command: Callable[[], int], limit: int) -> str:
    """What a command says on stderr, where no file may exceed `limit` bytes; it exits with 2."""

    def work() -> None:
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            code = command()
        assert code == 2, stderr.getvalue()
        raise UsageError(stderr.getvalue())

    return limited(work, limit)


def test_compare_on_a_full_disk_keeps_the_old_table(run: Path) -> None:
    compare(run)
    before = contents(run)
    table = run / "table.md"
    said = said_by(lambda: tables.main([str(run), "--markdown", str(table)]), 60)
    assert said.startswith(f"llmrec: {table} cannot be written (File too large).")
    assert said.count("\n") == 1
    assert contents(run) == before


def test_a_suite_whose_table_cannot_be_written_keeps_its_runs_and_the_old_table(
    tmp_path: Path,
) -> None:
    path = tmp_path / "suite.yaml"
    options = small_runs.SMALL | {"model.name": "popularity"}
    path.write_text(yaml.safe_dump({"rows": {"popularity": options}, "out": str(tmp_path / "o")}))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert suite.main([str(path)]) == 0
    before = contents(tmp_path)
    said = said_by(lambda: suite.main([str(path)]), 60)
    assert said.startswith(f"llmrec: {tmp_path / 'o' / 'table.md'} cannot be written")
    assert said.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("limit", [0, 600])
def test_training_on_a_full_disk_exits_with_2_and_leaves_no_finished_run(
    tmp_path: Path, limit: int
) -> None:
    folder = tmp_path / "run"
    said = said_by(lambda: train(small_runs.command(folder)), limit)
    last = said.splitlines()[-1]
    assert last.startswith("llmrec: ")
    assert "cannot be written (File too large)" in last
    assert not (folder / "result.json").exists()
    assert not [path for path in tmp_path.rglob(".*")]
    assert small_runs.train(folder) == folder  # space was freed


# Hostile files, outside the encoders.


class Attack:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def attack(tmp_path: Path):
    """Bytes of a pickle, and the file that opening it would make."""
    marker = tmp_path / "marker"
    content = pickle.dumps(Attack(marker))
    pickle.loads(content)
    assert marker.exists()
    marker.unlink()
    return content, marker


def array_of_objects(content: bytes) -> bytes:
    """A .npy file whose one object is a pickle's."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|O", "fortran_order": False, "shape": (1,)}
    )
    return buffer.getvalue() + content


@pytest.mark.parametrize("wrap", [bytes, array_of_objects])
@pytest.mark.parametrize("name", ["result.json", "per_user.parquet"])
@pytest.mark.parametrize("vouched", [False, True])
def test_a_pickle_in_a_run_folder_is_refused_and_not_opened(
    run: Path, attack, name: str, wrap, vouched: bool
) -> None:
    content, marker = attack
    (run / name).write_bytes(wrap(content))
    if vouched and name == "per_user.parquet":  # who made the file can make its hash
        record = json.loads((run / "result.json").read_text())
        record["per_user_sha256"] = hashlib.sha256(wrap(content)).hexdigest()
        (run / "result.json").write_text(json.dumps(record))
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert tables.main([str(run)]) == 2
    assert name in stderr.getvalue()
    assert stderr.getvalue().count("\n") == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000, '{"a":' * 200_000, "[]", "null", "3", "{}", '"text"', "\0", "\ufeff{}",
        '{"label": 1, "seed": 1, "metrics": 1, "protocol": 1, "data": 1, "cases": 1, "config": 1,'
        ' "cost": 1, "per_user_sha256": 1}',
    ],
)  # fmt: skip
def test_a_record_of_another_shape_is_one_sentence(run: Path, content: str) -> None:
    (run / "result.json").write_text(content)
    with pytest.raises(UsageError, match=r"result\.json|per_user\.parquet"):
        read_result(run)


def test_values_without_their_columns_are_one_sentence(run: Path) -> None:
    result = read_result(run)
    write_result(run, type(result)(result.record, result.per_user.drop("greater")))
    with pytest.raises(UsageError, match="no parquet file of users and ranks"):
        read_result(run)


YAML_ATTACKS = [
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/apply:subprocess.check_call [['touch', '{marker}']]",
    "!!python/object/new:os.system ['touch {marker}']",
    "!!python/name:os.system",
    "!!python/module:antigravity",
]


@pytest.mark.parametrize("body", YAML_ATTACKS)
@pytest.mark.parametrize("where", ["config", "config value", "option", "suite", "suite value"])
def test_yaml_that_names_python_is_refused_and_not_run(
    tmp_path: Path, body: str, where: str
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.yaml"
    value = body.format(marker=marker)
    argv = [str(path)]
    if where == "option":
        argv = [f"--optim.epochs={value}"]
    elif where.startswith("config"):
        argv = ["--config", str(path)]
        path.write_text(value if where == "config" else f"data:\n  source: {value}\n")
    else:
        path.write_text(value if where == "suite" else f"rows:\n  A: {value}\n")
    with pytest.raises(UsageError) as error:
        if where.startswith("suite"):
            read_suite(path)
        else:
            parse(TrainConfig, argv, "llmrec train", "")
    assert "\n" not in str(error.value)
    assert ("evil.yaml" if where != "option" else "optim.epochs") in str(error.value)
    assert not marker.exists()
