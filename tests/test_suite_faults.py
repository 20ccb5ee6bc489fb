"""A suite that is killed, starved of disk or run by two processes trains every cell once."""

import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from faults import KILLED, NOTHING, Fault, _before, _die, _install, free_port
from small_runs import SMALL, journal, per_user

ROWS = {
    "ID": {},
    "BCE": {"loss.name": "bce", "loss.negatives": 4},
    "TF-IDF": {"tower.name": "text", "tower.control": "tfidf"},
}
FEW = [f"{label}-0" for label in ROWS]
CELLS = [f"{label}-{seed}" for label in ROWS for seed in (0, 1)]
PIECES = 2 * 4
"""Forward passes of a cell: 2 epochs of 4 steps."""
NO_DROPOUT = {"model.dropout": 0, "tower.projection_dropout": 0}
"""Processes draw their own."""


@dataclass(frozen=True)
class Call:
    """What one call of the suite did, by process."""

    codes: list[int]
    out: list[str]
    err: list[str]
    forward: list[int]
    """Forward passes in training."""
    finished: list[list[str]]
    """Cells in the order that the process wrote their results."""
    tables: list[int]
    """How many tables the process wrote."""
    synced: list[int]
    """How often the process forced something to the disk."""


def write_suite(folder, seeds=(0, 1), **options):
    """A suite of 3 rows that keeps a state after every step."""
    content = {
        "baseline": "ID", "seeds": list(seeds), "out": str(folder / "out"), "rows": ROWS,
        "base": SMALL | {"run.checkpoint_steps": 1} | options,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def evaluate(path, fault=NOTHING, processes=1, limit=150, options=()):
    """``llmrec evaluate`` in processes of its own; one that waits for a dead one is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmrec.train_tcf", "llmrec.evaluation.suite"])
    logs, port = path.parent / f"log-{time.monotonic_ns()}", free_port()
    logs.mkdir()
    started = [
        context.Process(
            target=_evaluate,
            args=([str(path), *options], rank, processes, port, fault, logs / str(rank)),
        )
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    until = time.monotonic() + limit
    while any(process.exitcode is None for process in started):
        if any(process.exitcode not in (None, 0) for process in started):
            until = min(until, time.monotonic() + 2)
        if time.monotonic() > until:
            for process in started:
                process.kill()
        for process in started:
            process.join(0.01)
    said = [
        {kind: _text(logs / f"{rank}.{kind}") for kind in ("out", "err", "did")}
        for rank in range(processes)
    ]
    did = [words["did"].split() for words in said]
    return Call(
        codes=[int(process.exitcode or 0) for process in started],
        out=[words["out"] for words in said],
        err=[words["err"] for words in said],
        forward=[words.count("forward") for words in did],
        finished=[[word for word in words if word in CELLS] for words in did],
        tables=[words.count("table") for words in did],
        synced=[words.count("sync") for words in did],
    )


def _exhausted():
    raise RuntimeError("out of memory")


def _text(path):
    return path.read_text() if path.exists() else ""


def _evaluate(argv, rank, processes, port, fault, log):
    """Body of a process: what it does is in a file at once, so that a kill does not lose it."""
    if processes > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    from llmrec import train_tcf, training
    from llmrec.evaluation import suite
    from llmrec.models.recommender import Recommender

    did = Path(f"{log}.did").open("a", buffering=1)

    def noting(owner, name, word):
        real = getattr(owner, name)

        def noted(*args, **named):
            found = real(*args, **named)
            did.write(f"{word(*args)}\n")
            return found

        setattr(owner, name, noted)

    noting(Recommender, "forward", lambda *_: "forward")
    noting(train_tcf, "write_result", lambda folder, *_: folder.name)
    noting(suite, "write_files", lambda *_: "table")
    noting(os, "fsync", lambda *_: "sync")
    if rank == fault.rank:
        _install(fault)
        if fault.kind == "out of memory":
            _before(Recommender, "forward", fault.n, _exhausted)
        if fault.kind == "sync":
            _before(os, "fsync", fault.n, _die)
        if fault.kind == "opening":
            _before(training, "open_run", 2, lambda: _before(os, "fsync", fault.n, _die))
    with (
        Path(f"{log}.out").open("w", buffering=1) as out,
        Path(f"{log}.err").open("w", buffering=1) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = suite.main(argv)
    did.close()
    os._exit(code)


def table(path):
    """table.json but for times, memory and place."""
    record = json.loads((path.parent / "out" / "table.json").read_text())
    for row in record["rows"]:
        row["folders"] = [Path(folder).name for folder in row["folders"]]
        row["cost"] = {
            name: value
            for name, value in row["cost"].items()
            if "seconds" not in name and "memory" not in name
        }
    return record


def results(path):
    """When each finished cell's result was written."""
    return {
        result.parent.name: result.stat().st_mtime_ns
        for result in (path.parent / "out").glob("*/result.json")
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What suites that nothing happened to did, and their tables, by their cells."""
    known = {}

    def of(cells):
        if len(cells) not in known:
            seeds = range(len(cells) // len(ROWS))
            path = write_suite(tmp_path_factory.mktemp("undisturbed"), seeds)
            call = evaluate(path)
            total = PIECES * len(cells)
            assert (call.codes, call.forward, call.finished) == ([0], [total], [cells])
            known[len(cells)] = (call, table(path))
        return known[len(cells)]

    return of


def killed_and_resumed(path, fault):
    """Kill the suite, start the same command again; both calls."""
    first = evaluate(path, fault)
    assert first.codes == [KILLED]
    before = results(path)
    second = evaluate(path)
    assert second.codes == [0]
    after = results(path)
    assert {cell: after[cell] for cell in before} == before  # a finished cell is not touched
    assert second.out[0].count("finished before, kept") == len(before)
    return first, second


def trains_every_step_once(path, n, cells):
    """Kill the suite before its n-th step: the second call makes that one and all after it."""
    first, second = killed_and_resumed(path, Fault("forward", n))
    assert first.finished[0] + second.finished[0] == cells
    assert (first.forward[0], second.forward[0]) == (n - 1, PIECES * len(cells) - n + 1)
    assert second.err[0].count("resuming fit") == ((n - 1) % PIECES > 0)


def test_a_killed_suite_trains_every_step_of_every_cell_once(undisturbed, tmp_path):
    path = write_suite(tmp_path, seeds=[0])
    trains_every_step_once(path, PIECES + 6, FEW)
    assert table(path) == undisturbed(FEW)[1]


def test_a_suite_changed_after_a_kill_says_so_before_it_trains_and_starts_anew_on_request(tmp_path):
    path = write_suite(tmp_path, seeds=[0])
    assert evaluate(path, Fault("forward", PIECES + 6)).codes == [KILLED]
    rows = ROWS | {"BCE": {"loss.name": "bce", "loss.negatives": 5}}
    content = yaml.safe_load(path.read_text()) | {"rows": rows}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    refused = evaluate(path)
    assert (refused.codes, refused.forward) == ([2], [0])
    assert "1 run comes from another config" in refused.err[0]
    assert "loss.negatives 4 -> 5" in refused.err[0] and "--overwrite" in refused.err[0]
    again = evaluate(path, options=["--overwrite"])
    assert (again.codes, again.finished) == ([0], [["BCE-0", "TF-IDF-0"]])
    assert "resuming" not in again.err[0]


@pytest.mark.slow
def test_a_suite_killed_at_5_steps_trains_every_step_of_every_cell_once(
    undisturbed, tmp_path, figure
):
    same = 0
    for n in random.Random(3).sample(range(1, PIECES * len(CELLS) + 1), 5):
        path = write_suite(tmp_path / str(n))
        trains_every_step_once(path, n, CELLS)
        same += table(path) == undisturbed(CELLS)[1]
    figure("suites killed at a step that trained each step once, same table", f"{same} of 5")
    assert same == 5


@pytest.mark.slow
def test_a_suite_killed_5_times_finishes_every_cell_once(undisturbed, tmp_path, figure):
    path, draws = write_suite(tmp_path), random.Random(8)
    calls = [evaluate(path, Fault("forward", draws.randint(5, 10))) for _ in range(5)]
    assert [call.codes for call in calls] == [[KILLED]] * 5
    calls.append(evaluate(path))
    assert [cell for call in calls for cell in call.finished[0]] == CELLS
    assert sum(call.forward[0] for call in calls) == PIECES * len(CELLS)
    assert table(path) == undisturbed(CELLS)[1]
    figure("kills of one suite that finished each of its cells once", 5)


@pytest.mark.slow
def test_a_suite_killed_at_5_points_while_writing_keeps_what_was_finished(
    undisturbed, tmp_path, figure
):
    same, draws = 0, random.Random(5)
    (total,) = undisturbed(CELLS)[0].synced
    for n in draws.sample(range(1, total), 5):
        path = write_suite(tmp_path / str(n))
        first, second = killed_and_resumed(path, Fault("sync", n))
        done = first.finished[0] + second.finished[0]
        # Killed between a result and the note of it, a cell lacks the note.
        assert len(set(done)) == len(done) >= len(CELLS) - 1
        assert sorted(results(path)) == sorted(CELLS)
        same += table(path) == undisturbed(CELLS)[1]
    figure("suites killed while writing that kept what was finished, same table", f"{same} of 5")
    assert same == 5


@pytest.mark.slow
def test_a_suite_killed_while_it_opens_its_second_run_goes_on(undisturbed, tmp_path, figure):
    same = 0
    for n in range(1, 6):  # before and after the folder holds anything, and a config
        path = write_suite(tmp_path / str(n), seeds=[0])
        killed_and_resumed(path, Fault("opening", n))
        same += table(path) == undisturbed(FEW)[1]
    figure("suites killed while opening a run that ended the same", f"{same} of 5")
    assert same == 5


def test_a_cell_that_failed_is_told_and_a_later_call_runs_it_alone(undisturbed, tmp_path, figure):
    path = write_suite(tmp_path, seeds=[0])
    first = evaluate(path, Fault("out of memory", PIECES + 3))  # once, in the second cell
    assert (first.codes, first.finished) == ([1], [["ID-0", "TF-IDF-0"]])
    assert "Failed and not in the table: BCE, seed 0" in first.out[0]
    assert table(path)["failed"] == ["BCE, seed 0"]
    second = evaluate(path)
    assert (second.codes, second.finished) == ([0], [["BCE-0"]])
    assert second.out[0].count("finished before, kept") == 2
    assert table(path) == undisturbed(FEW)[1]
    figure("cells that a later call ran after 1 of 3 had failed", len(second.finished[0]))


def same_numbers(one, two, cells, figure):
    """Two suites found the same losses and per-user values."""
    furthest, equal = 0.0, 0
    for cell in cells:
        folders = [path.parent / "out" / cell for path in (one, two)]
        losses = [np.array([entry["loss"] for entry in journal(folder)]) for folder in folders]
        furthest = max(furthest, float(np.abs(losses[1] / losses[0] - 1).max()))
        equal += per_user(folders[0]).equals(per_user(folders[1]))
    figure("relative loss difference between suites of 1 and 2 processes", f"{furthest:.1e}")
    figure("cells judged alike by suites of 1 and 2 processes", f"{equal} of {len(cells)}")
    return furthest < 1e-5 and equal == len(cells)


def test_two_processes_train_a_suite_as_one_does(tmp_path, figure):
    one, two = (write_suite(tmp_path / name, [0], **NO_DROPOUT) for name in ("one", "two"))
    assert evaluate(one).codes == [0]
    call = evaluate(two, processes=2)
    assert call.codes == [0, 0], call.err
    assert call.forward == [PIECES * len(FEW)] * 2  # both take part in every step
    assert call.finished == [FEW, []] and call.tables == [1, 0]  # the first alone writes
    assert call.out[0].count("Written to") == 1 and call.out[1] == call.err[1] == ""
    assert same_numbers(one, two, FEW, figure)
    again = evaluate(two, processes=2)
    assert (again.codes, again.forward, again.tables) == ([0, 0], [0, 0], [1, 0])


@pytest.mark.slow
def test_a_suite_of_two_processes_goes_on_after_either_is_killed(tmp_path, figure):
    one, two = (write_suite(tmp_path / name, **NO_DROPOUT) for name in ("one", "two"))
    assert evaluate(one).codes == [0]
    calls = []
    for rank in (0, 1):
        calls.append(evaluate(two, Fault("forward", PIECES + 6, rank), processes=2))
        assert calls[-1].codes[rank] == KILLED
    calls.append(evaluate(two, processes=2))
    assert calls[-1].codes == [0, 0]
    assert [cell for call in calls for cell in call.finished[0]] == CELLS
    assert all("resuming fit: " in call.err[0] for call in calls[1:])
    assert same_numbers(one, two, CELLS, figure)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_of_two_processes_fails_the_suite_ends_and_goes_on_later(tmp_path, rank):
    path = write_suite(tmp_path, [0], **NO_DROPOUT)
    first = evaluate(path, Fault("out of memory", PIECES + 3, rank), processes=2)
    assert first.codes[rank] == 1 and first.tables == [0, 0]  # nobody waits for ever
    assert "BCE, seed 0 failed" in first.out[rank] and "The suite ends here" in first.out[rank]
    second = evaluate(path, processes=2)
    assert second.codes == [0, 0]
    assert first.finished[0] + second.finished[0] == FEW


@pytest.mark.slow
def test_torchrun_runs_a_suite(tmp_path):
    path = write_suite(tmp_path, [0])
    named = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *words, "-m", "llmrec", "evaluate", str(path)],
        env=named, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(results(path)) == sorted(FEW)
    assert done.stdout.count("Written to") == 1
