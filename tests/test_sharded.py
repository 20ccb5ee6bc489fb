"""Weights shared out among two processes (FSDP2): the run is that of one process that holds all."""

import json
import os

import faults
import numpy as np
import pytest
import torch
from faults import KILLED, NOTHING, Fault, run
from safetensors.torch import load_file
from small_runs import command, journal, per_user, train
from still_models import save_still_model

from llmrec.assembly import restore
from llmrec.errors import UsageError
from llmrec.models.sharding import refuse_unshardable
from llmrec.train_tcf import configure

STILL = {
    "tower__name": "text",
    "tower__projection_dropout": 0,
    "model__dropout": 0,
    "loss__name": "in_batch",
    "encoder__lr": 1e-3,
}
IN_PIECES = {"encoder__batch_tokens": 64, "encoder__step_tokens": 256}
CHECKPOINTED = IN_PIECES | {"encoder__checkpointing": True}


def train_sharded(argv, rank, processes, *others):
    """Body of a process: as in `faults`, but sharded, and telling what it holds of the weights."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    from llmrec import checkpoints

    real = checkpoints.save_state

    def save_state(folder, stage, model, optimizer, *more):
        real(folder, stage, model, optimizer, *more)
        held = {}
        for name, weight in model.named_parameters():
            moments = optimizer.state.get(weight, {})
            parts = [weight, *(moments[key] for key in ("exp_avg", "exp_avg_sq") if moments)]
            held[name] = [[part.to_local().numel(), part.numel()] for part in parts]
        (folder / f"held-{rank}.json").write_text(json.dumps(held))

    checkpoints.save_state = save_state
    faults._train(argv, rank, processes, *others)


@pytest.fixture
def sharded(monkeypatch):
    """A command line -> exit codes of two processes that share out its weights, and words."""

    def start(argv, fault=NOTHING):
        with monkeypatch.context() as patch:
            patch.setattr(faults, "_train", train_sharded)
            return run(argv, fault, processes=2)

    return start


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """Architecture -> options of a run that tunes a tiny model without dropout."""
    folder = tmp_path_factory.mktemp("still")

    def options(name, tune, **changes):
        if not (folder / name).exists():
            save_still_model(name, folder / name)
        own = {
            "encoder__model": str(folder / name), "run__store": str(folder / f"store-{name}"),
            "encoder__tune": tune,
        }  # fmt: skip
        return STILL | own | changes

    return options


def weights(folder, stage="fit"):
    """Of the selected epoch."""
    (path,) = folder.glob(f"checkpoints/{stage}-epoch-*/model.safetensors")
    return load_file(path)


def furthest_weight(one, two):
    """The largest difference, and whose. Biases of keys move no attention: rounding moves them."""
    assert one.keys() == two.keys()
    gaps = {}
    for name in one:
        gap = (one[name] - two[name]).abs()
        if name.endswith("key_value.bias"):
            gap = gap[len(gap) // 2 :]
        gaps[name] = float(gap.max())
    return max((gap, name) for name, gap in gaps.items())


def losses(folder):
    """Of the epochs."""
    return np.array([entry["loss"] for entry in journal(folder)])


def check_alike(one, two, what, figure):
    """Loss curve, weights and test ranks of two runs."""
    loss = float(np.abs(losses(two) / losses(one) - 1).max())
    gap, name = furthest_weight(weights(one), weights(two))
    figure(f"relative loss difference with shared weights, {what}", f"{loss:.1e}")
    figure(f"largest difference of a weight, {what}", f"{gap:.1e} ({name})")
    assert losses(one)[0] != losses(one)[1]
    assert loss < 1e-5 and gap < 1e-5
    assert per_user(one).equals(per_user(two))  # ranks among them


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("model", "tune", "changes"),
    [
        ("bert", "full", {}),
        pytest.param("bert", "lora", {}, marks=SLOW),
        pytest.param("bert", "full", IN_PIECES, marks=SLOW),
        pytest.param("bert", "full", CHECKPOINTED | {"optim__accumulate": 2}, marks=SLOW),
        pytest.param("qwen3", "lora", CHECKPOINTED, marks=SLOW),
        pytest.param("bert", "top:1", {}, marks=SLOW),
        pytest.param("bert", "full", {"loss__name": "full_softmax"}, marks=SLOW),
    ],
)
def test_two_processes_that_share_out_the_weights_train_as_one(
    still, sharded, tmp_path, model, tune, changes, figure
):
    options = still(model, tune, **changes)
    one, two = train(tmp_path / "one", **options), tmp_path / "two"
    codes, words = sharded(command(two, **options))
    assert codes == [0, 0], words
    check_alike(one, two, f"{model} {tune} {' '.join(changes)}", figure)
    check_shares(two, figure)
    check_vectors(*(restore(folder, torch.device("cpu")) for folder in (one, two)))


def check_shares(folder, figure):
    """Each process holds its part of every weight and of its moments, together the whole."""
    both = [json.loads((folder / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0].keys() == both[1].keys()
    for name in both[0]:
        for (mine, whole), (others, _) in zip(both[0][name], both[1][name], strict=True):
            assert mine + others == whole, name
            assert mine < whole or whole == 1, name
    held, whole = (sum(part[i] for parts in both[0].values() for part in parts) for i in (0, 1))
    figure("share of weights and moments on process 0", f"{held / whole:.3f}")
    assert held < 0.52 * whole


def check_vectors(one, two):
    """Of all items, by one process that read what was written."""
    with torch.inference_mode():
        gap = (one.recommender.item_vectors() - two.recommender.item_vectors()).abs().max()
    assert gap < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_killed_between_two_states_a_sharded_run_goes_on_as_if_nothing_had_happened(
    still, sharded, tmp_path, tune, figure
):
    # 4 steps an epoch, a state after each 3: killed before the 8th forward pass, on rank 1, it goes
    # on from step 3 of epoch 2.
    options = still("bert", tune, run__checkpoint_steps=3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert sharded(command(whole, **options))[0] == [0, 0]
    assert KILLED in sharded(command(cut, **options), Fault("forward", 8, rank=1))[0]
    assert [path.name for path in cut.glob("checkpoints/fit-state-*")] == [
        "fit-state-0002-000003-best-001"
    ]
    codes, words = sharded(command(cut, **options))
    assert codes == [0, 0] and "1 epochs and 3 steps are done" in words
    gap, name = furthest_weight(weights(whole), weights(cut))
    figure(f"largest difference of a weight after a resumed sharded run, {tune}", f"{gap} ({name})")
    assert gap == 0 and (losses(whole) == losses(cut)).all()  # to the last bit
    assert per_user(whole).equals(per_user(cut))


@pytest.mark.slow
def test_a_state_does_not_depend_on_how_the_run_was_distributed(still, sharded, tmp_path, figure):
    options = still("bert", "full", run__checkpoint_steps=3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(command(whole, **options), processes=2)[0] == [0, 0]
    assert KILLED in sharded(command(cut, **options), Fault("forward", 8, rank=1))[0]
    codes, words = run(command(cut, **options), processes=2)  # each now holds all weights
    assert codes == [0, 0] and "1 epochs and 3 steps are done" in words
    check_alike(whole, cut, "begun sharded and ended whole", figure)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("bert", {"run__precision": "bf16"}),
        # Against one process AdamW moves 2 of T5's embeddings by rounding alone, however the two
        # are distributed.
        ("t5", {"run__fit_on": "train+valid"}),
    ],
)
def test_two_processes_learn_alike_whether_they_share_out_the_weights_or_hold_all(
    still, sharded, tmp_path, model, changes, figure
):
    options = still(model, "full", **changes)
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert run(command(whole, **options), processes=2)[0] == [0, 0]
    codes, words = sharded(command(shared, **options))
    assert codes == [0, 0], words
    check_alike(whole, shared, f"{model} {' '.join(changes)}, 2 processes that hold all", figure)
    assert {weight.dtype for weight in weights(shared).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder__tune": "qlora"}, "encoder.tune=qlora"),
        ({"encoder__placement": "spread"}, "encoder.placement=spread"),
        ({"optim__state": "8bit"}, "optim.state=8bit"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes, named):
    words = [f"--{name.replace('__', '.')}={value}" for name, value in changes.items()]
    config = configure(["--encoder.tune=full", *words])
    with pytest.raises(UsageError, match=f"^{named} does not go with weights sharded by FSDP"):
        refuse_unshardable(config.encoder, config.optim)
    plain = configure(["--encoder.tune=full"])
    refuse_unshardable(plain.encoder, plain.optim)
