"""Killed at any point, a run goes on as if nothing had happened."""

import json
import random
import shutil

import pytest
from faults import KILLED, Fault, run
from small_runs import command, journal, per_user, record

from llmrec import checkpoints
from llmrec.data.prepared import main as prepare
from llmrec.errors import UsageError
from llmrec.runs import alone, sha256_of, write_manifest

OPTIONS = {
    "optim__epochs": 3,
    "optim__accumulate": 2,  # 4 steps of 2 pieces an epoch
    "run__fit_on": "train+valid",  # the refit's weights are those after its last step
    "run__checkpoint_steps": 3,
    "loss__name": "bce",
    "model__dropout": 0.3,
}
PIECES = 3 * 4 * 2 + 4 * 2
"""Forward passes that every run makes: 3 epochs of 4 steps of 2 pieces, and 1 epoch of refit."""


def argv(folder, **changes):
    return command(folder, **OPTIONS | changes)


def found(folder):
    """All that a run found, but for its times and place."""
    result = record(folder)
    for where in (result["cost"], result["config"]["run"]):
        for name in [name for name in where if "seconds" in name or "memory" in name]:
            del where[name]
    del result["config"]["run"]["folder"], result["name"], result["per_user_sha256"]
    weights = {
        path.parent.name: sha256_of(path) for path in folder.glob("checkpoints/*/*.safetensors")
    }
    epochs = [
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in journal(folder, stage)]
        for stage in ("fit", "refit")
    ]
    return result, weights, epochs, per_user(folder).rows()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run finds at 1 and 2 processes when nothing happens to it."""
    known = {}

    def of(processes):
        if processes not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert run(argv(folder), processes=processes)[0] == [0] * processes
            known[processes] = found(folder)
        return known[processes]

    return of


@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_seed_twice_gives_the_same_weights_and_the_same_result(
    undisturbed, tmp_path, processes, figure
):
    assert run(argv(tmp_path / "run"), processes=processes)[0] == [0] * processes
    again = found(tmp_path / "run")
    same = [a == b for a, b in zip(again, undisturbed(processes), strict=True)]
    what = "equal in result.json, weights, epochs and users"
    figure(f"the same seed twice, {processes} processes", f"{what}: {same}")
    assert all(same)


def killed_and_resumed(folder, processes, n):
    """Kill one process before its n-th forward pass, then start the same command again."""
    rank = random.Random(n).randrange(processes)
    codes, _ = run(argv(folder), Fault("forward", n, rank), processes)
    assert codes[rank] == KILLED and not (folder / "result.json").exists()
    codes, _ = run(argv(folder), processes=processes)
    assert codes == [0] * processes
    return found(folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_between_two_pieces_of_a_step_resumes_exactly(
    undisturbed, tmp_path, processes
):
    # Before piece 12 of 8 an epoch: in the middle of step 2 of epoch 2, one step after a state.
    assert killed_and_resumed(tmp_path / "run", processes, 12) == undisturbed(processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_20_random_steps_resume_to_the_same_weights(
    undisturbed, tmp_path, processes, figure
):
    points = random.Random(processes).sample(range(1, PIECES + 1), 20)
    same = [
        killed_and_resumed(tmp_path / str(n), processes, n) == undisturbed(processes)
        for n in points
    ]
    figure(f"kills resumed to equal weights, {processes} processes", f"{sum(same)} of {len(same)}")
    assert all(same)


def test_a_run_killed_again_and_again_still_ends_the_same(undisturbed, tmp_path, figure):
    draws, kills = random.Random(5), 0
    while not (tmp_path / "run" / "result.json").exists():
        codes, _ = run(argv(tmp_path / "run"), Fault("forward", draws.randint(8, 14)))
        kills += codes == [KILLED]
        assert codes in ([0], [KILLED]) and kills < 20
    figure("kills of one run that ended the same", kills)
    assert kills >= 3 and found(tmp_path / "run") == undisturbed(1)


def whole_states(folder):
    """(epoch, step) of the newest state of each stage, after checking it and its best weights."""
    places = {}
    for stage in ("fit", "refit"):
        path = checkpoints.newest_state(folder, stage)
        if path is not None:
            progress, _ = checkpoints.read_state(path)
            places[stage] = (progress.epoch, progress.step)
            if progress.best_epoch:
                weights = checkpoints.weights_path(folder, stage, progress.best_epoch)
                checkpoints.check_folder(weights, "")
    return places


def file_operations(folder):
    """How many operations on files a run makes, by halving: past the end nothing is killed."""
    low, high = 1, 4096
    while low < high:
        middle = (low + high) // 2
        codes, _ = run(argv(folder / f"count-{middle}"), Fault("file", middle))
        low, high = (middle + 1, high) if codes == [KILLED] else (low, middle)
    return low - 1


@pytest.mark.slow
def test_50_kills_while_saving_lose_nothing_and_always_leave_a_whole_state(
    undisturbed, tmp_path, figure
):
    total = file_operations(tmp_path)
    same, whole, before = 0, 0, [(0, 0), (0, 0)]
    early = range(1, 11)  # before there is a state; the others anywhere
    for n in [*early, *sorted(random.Random(7).sample(range(11, total + 1), 40))]:
        folder = tmp_path / str(n)
        assert run(argv(folder), Fault("file", n))[0] == [KILLED]
        finished = (folder / "result.json").exists()
        if not finished:  # a finished run needs no state
            places = whole_states(folder)  # raises where the newest is not whole
            now = [places.get(stage, (0, 0)) for stage in ("fit", "refit")]
            assert now >= before  # a later kill finds no less than an earlier one
            before = now
            assert run(argv(folder))[0] == [0]
        whole += 1
        result, weights, *others = found(folder)
        if finished:  # killed while cleaning up: states may be left
            weights = {name: weights[name] for name in undisturbed(1)[1]}
        same += (result, weights, *others) == undisturbed(1)
        shutil.rmtree(folder)
    figure(f"kills among a run's {total} file operations that left a whole state", f"{whole} of 50")
    figure("of these, runs that ended the same", f"{same} of 50")
    assert same == 50
    epochs = len(undisturbed(1)[2][1])
    assert before[1] == (epochs + 1, 0)  # the last kills came after the refit's last epoch


def refit_begins(folder):
    """The operation on files before which the refit's first checkpoint has just been made."""
    low, high = 1, 512
    while low < high:
        middle = (low + high) // 2
        path = folder / f"look-{middle}"
        run(argv(path, run__checkpoint_steps="epoch"), Fault("file", middle))
        begun = list(path.glob("checkpoints/refit-*")) or (path / "result.json").exists()
        low, high = (low, middle) if begun else (middle + 1, high)
    return low


def test_a_kill_between_the_refits_first_weights_and_its_first_state_is_no_dead_end(tmp_path):
    options = {"run__checkpoint_steps": "epoch"}
    whole = tmp_path / "whole"
    assert run(argv(whole, **options))[0] == [0]
    n = refit_begins(tmp_path)
    folder = tmp_path / "run"
    assert run(argv(folder, **options), Fault("file", n))[0] == [KILLED]
    names = {path.name for path in (folder / "checkpoints").glob("refit-*")}
    assert names == {"refit-epoch-001"}
    assert run(argv(folder, **options))[0] == [0]
    assert found(folder) == found(whole)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_kill_while_a_new_folder_is_opened_leaves_one_that_can_be_used(tmp_path, n):
    assert run(argv(tmp_path / "run"), Fault("file", n))[0] == [KILLED]
    assert run(argv(tmp_path / "run"))[0] == [0]
    assert not list((tmp_path / "run").glob(".*"))


def test_two_runs_never_train_in_one_folder(tmp_path):
    with alone(tmp_path / "run"):
        words = refusal(tmp_path / "run")
    assert "another process is at work in" in words and "--run.folder" in words
    assert run(argv(tmp_path / "run"))[0] == [0]


def test_a_state_of_another_version_is_refused_by_name(unfinished):
    state = checkpoints.newest_state(unfinished, "fit")
    record = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(record | {"format": 99}))
    hashes = {p.name: sha256_of(p) for p in state.iterdir() if p.name != "manifest.json"}
    write_manifest(state, hashes)
    words = refusal(unfinished)
    assert "state.json has format 99" in words and "--run.resume never" in words


def test_damaged_best_weights_are_found_before_training_goes_on(unfinished):
    (weights,) = (unfinished / "checkpoints").glob("fit-epoch-*")
    (weights / "model.safetensors").unlink()
    before = journal(unfinished)
    words = refusal(unfinished)
    assert "model.safetensors is missing" in words and "--run.resume never" in words
    assert journal(unfinished) == before
    assert run([*argv(unfinished), "--resume", "never"])[0] == [0]


def test_a_run_goes_on_without_its_config_file(undisturbed, unfinished):
    (unfinished / "config.yaml").unlink()
    assert run(argv(unfinished))[0] == [0]
    assert found(unfinished) == undisturbed(1)


def test_the_same_data_from_a_prepared_folder_resume_the_run(undisturbed, unfinished, tmp_path):
    data = [word for word in argv(unfinished) if word.startswith("--data.")]
    assert prepare([*data, "--out", str(tmp_path / "prepared")]) == 0
    others = [word for word in argv(unfinished) if not word.startswith("--data.")]
    codes, words = run([*others, f"--data.source={tmp_path / 'prepared'}"])
    assert codes == [0] and "resuming fit" in words
    assert found(unfinished)[1:] == undisturbed(1)[1:]


def test_the_journal_of_a_resumed_run_has_every_epoch_once(undisturbed, tmp_path):
    run(argv(tmp_path / "run"), Fault("forward", 20))
    with (tmp_path / "run" / "fit-journal.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')  # a torn line is trained again
    run(argv(tmp_path / "run"))
    assert found(tmp_path / "run")[2] == undisturbed(1)[2]
    assert [entry["epoch"] for entry in journal(tmp_path / "run")] == [1, 2, 3]


@pytest.fixture
def unfinished(tmp_path):
    """A run killed in its second epoch."""
    assert run(argv(tmp_path / "run"), Fault("forward", 13))[0] == [KILLED]
    return tmp_path / "run"


def refusal(folder, processes=1, **changes):
    codes, words = run(argv(folder, **changes), processes=processes)
    assert codes == [2] * processes
    return words.splitlines()[-1]


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim__lr": 0.01}, "optim.lr 0.003, now 0.01"),
        ({"run__seed": 1}, "run.seed 0, now 1"),
        ({"data__simulated__users": 62}, "unfinished run with data fingerprint"),
    ],
)
def test_another_config_does_not_resume_the_run_and_harms_nothing(unfinished, changes, said):
    before = everything(unfinished)
    words = refusal(unfinished, **changes)
    assert said in words and "--run.resume never" in words
    assert everything(unfinished) == before


def test_another_number_of_processes_does_not_resume_the_run(unfinished):
    words = refusal(unfinished, processes=2)
    assert "unfinished run of 1 processes, now 2" in words


def test_what_moves_no_number_may_change_on_resuming(undisturbed, unfinished):
    changes = {"run__checkpoint_steps": "epoch", "run__keep_states": 2}
    assert run(argv(unfinished, **changes))[0] == [0]
    again = found(unfinished)
    assert again[1:] == undisturbed(1)[1:]
    assert record(unfinished)["config"]["run"]["keep_states"] == 2


def test_never_starts_anew_and_the_short_option_says_the_same(undisturbed, unfinished):
    epochs = checkpoints.newest_state(unfinished, "fit").name
    assert epochs.startswith("fit-state-0002")
    codes, words = run([*argv(unfinished), "--resume", "never"])
    assert codes == [0] and "resuming" not in words
    assert found(unfinished)[1:] == undisturbed(1)[1:]


def test_auto_says_where_it_goes_on(unfinished):
    codes, words = run([*argv(unfinished), "--resume=auto"])
    assert codes == [0] and "resuming fit: 1 epochs and 0 steps are done" in words


def test_a_damaged_journal_line_is_named(unfinished):
    (unfinished / "fit-journal.jsonl").write_text("{\n")
    words = refusal(unfinished)
    assert "fit-journal.jsonl line 1 is missing or damaged" in words and "never" in words


def test_a_finished_run_keeps_its_weights_and_no_state(undisturbed, tmp_path):
    run(argv(tmp_path / "run"))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(names) == 2 and names[0].startswith("fit-epoch") and "refit-epoch" in names[1]


def test_more_states_are_kept_on_request_and_a_damaged_newest_falls_back(undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert run(argv(folder, run__keep_states=3), Fault("forward", 23))[0] == [KILLED]
    states = sorted((folder / "checkpoints").glob("fit-state-*"))
    assert len(states) == 3
    (states[-1] / "state.json").write_text("{}")
    words = refusal(folder, run__keep_states=3)
    assert "state.json is damaged" in words
    assert f"Delete the folder {states[-1]} to resume from {states[-2].name}" in words
    shutil.rmtree(states[-1])
    assert run(argv(folder, run__keep_states=3))[0] == [0]
    assert found(folder)[1:] == undisturbed(1)[1:]


def damage(path, draws):
    """Flip one bit of a file or cut it short; returns what was done."""
    data = bytearray(path.read_bytes())
    if draws.random() < 0.3:
        path.write_bytes(data[: draws.randrange(len(data))])
        return "cut"
    place = draws.randrange(len(data))
    data[place] ^= 1 << draws.randrange(8)
    path.write_bytes(data)
    return "flipped"


def test_100_damaged_files_of_checkpoints_are_all_named(unfinished, figure):
    state = checkpoints.newest_state(unfinished, "fit")
    (weights,) = (unfinished / "checkpoints").glob("fit-epoch-*")
    files = sorted([*state.iterdir(), *weights.iterdir()])
    assert len(files) == 4 + 2
    draws, named = random.Random(11), 0
    for number in range(100):
        path = files[number % len(files)]
        whole = path.read_bytes()
        damage(path, draws)
        with pytest.raises(UsageError) as caught:
            checkpoints.read_state(state)
            checkpoints.load_weights(unfinished, "fit", 1, model=None)
        words = str(caught.value)
        named += str(path) in words and ("--run.resume never" in words or "overwrite" in words)
        path.write_bytes(whole)
    figure("damaged checkpoint files named with a remedy", f"{named} of 100")
    assert named == 100


@pytest.mark.parametrize("fault", ["no space", "small files"])
def test_a_full_disk_stops_the_run_in_one_sentence_and_it_resumes(undisturbed, tmp_path, fault):
    folder = tmp_path / "run"
    assert run(argv(folder), Fault("forward", 13))[0] == [KILLED]
    before = whole_states(folder)
    codes, words = run(argv(folder), Fault(fault, {"no space": 11, "small files": 20_000}[fault]))
    assert codes == [2]
    (line,) = [line for line in words.splitlines() if line.startswith("llmrec: ")]
    assert "cannot be written" in line and "Free some space" in line
    after = whole_states(folder)
    assert after["fit"] >= before["fit"]
    hidden = [path for path in folder.rglob(".*") if not path.name.endswith(".discarded")]
    assert not hidden
    assert run(argv(folder))[0] == [0]
    assert found(folder) == undisturbed(1)
