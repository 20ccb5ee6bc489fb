"""Runs that tune their language model: 1 process or 2, killed or short of memory, all the same."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import KILLED, Fault, run
from safetensors.torch import load, load_file
from small_runs import command, journal, per_user, record, refusal, train
from still_models import save_still_model

from llmrec import checkpoints, train_tcf
from llmrec.encoders.text import out_of_memory
from llmrec.encoders.tower import TunedTextTower
from llmrec.encoders.tuned import TunedEncoder
from llmrec.evaluation.result import differing, flatten, identity
from llmrec.models.recommender import Recommender
from llmrec.options import as_dict
from llmrec.train_tcf import main

LOSSES = {"in_batch": {}, "full_softmax": {}, "sampled_softmax": {"loss__negatives": 16}}
TUNED = {
    "tower__name": "text",
    "tower__projection_dropout": 0,
    "model__dropout": 0,
    "encoder__lr": 1e-3,  # an LM that moves as far in 8 steps as a larger one in many
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Options of a run that tunes a tiny BERT without dropout; its frozen vectors are shared."""
    folder = tmp_path_factory.mktemp("tuned")
    model = save_still_model("bert", folder / "bert")
    return TUNED | {"encoder__model": str(model), "run__store": str(folder / "store")}


def weights(folder, stage="fit"):
    """Of the selected epoch."""
    (path,) = folder.glob(f"checkpoints/{stage}-epoch-*/model.safetensors")
    return load_file(path)


def moved_apart(one, two):
    """The largest difference of two runs' weights, and whose it is.

    But for the biases of the user model's keys: attention does not depend on them, so their
    gradient is nothing but rounding, which AdamW makes steps of.
    """
    assert one.keys() == two.keys()
    gaps = {}
    for name in one:
        gap = (one[name] - two[name]).abs()
        if name.endswith("key_value.bias"):
            gap = gap[len(gap) // 2 :]
        gaps[name] = float(gap.max())
    name = max(gaps, key=gaps.__getitem__)
    return gaps[name], name


def check_two_processes_equal_one(tmp_path, figure, what, **options):
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, **options)
    codes, words = run(command(two, **options), processes=2)
    assert codes == [0, 0], words
    losses = [np.array([entry["loss"] for entry in journal(folder)]) for folder in (one, two)]
    furthest = float(np.abs(losses[1] / losses[0] - 1).max())
    gap, name = moved_apart(weights(one), weights(two))
    figure(f"1 and 2 processes, relative loss difference, {what}", f"{furthest:.1e}")
    figure(f"1 and 2 processes, largest difference of a weight, {what}", f"{gap:.1e} ({name})")
    assert losses[0][0] != losses[0][1] and furthest < 1e-5 and gap < 1e-5
    assert per_user(one).equals(per_user(two))  # ranks among them


@pytest.mark.parametrize(
    ("tune", "loss"),
    [
        ("full", "in_batch"),
        ("lora", "in_batch"),
        pytest.param("full", "full_softmax", marks=pytest.mark.slow),
        pytest.param("lora", "full_softmax", marks=pytest.mark.slow),
        pytest.param("full", "sampled_softmax", marks=pytest.mark.slow),
        pytest.param("lora", "sampled_softmax", marks=pytest.mark.slow),
        pytest.param("top:1", "in_batch", marks=pytest.mark.slow),
    ],
)
def test_two_processes_tune_as_one(tuned, tmp_path, tune, loss, figure):
    options = tuned | LOSSES[loss] | {"encoder__tune": tune, "loss__name": loss}
    check_two_processes_equal_one(tmp_path, figure, f"{tune} {loss}", **options)


def test_two_processes_share_the_negatives_of_an_id_tower(tmp_path, figure):
    options = {"loss__name": "in_batch", "model__dropout": 0}
    check_two_processes_equal_one(tmp_path, figure, "id in_batch", **options)


@pytest.mark.slow
def test_a_last_batch_of_one_user_tunes_alike_on_two_processes(tuned, tmp_path, figure):
    # 61 users in batches of 20: the last step has one, so the other process has none.
    changes = {"encoder__tune": "full", "loss__name": "in_batch", "optim__batch_size": 20}
    check_two_processes_equal_one(tmp_path, figure, "last step of 1 user", **tuned | changes)


@pytest.mark.slow
def test_pieces_of_a_step_that_are_read_again_tune_alike_on_two_processes(tuned, tmp_path, figure):
    changes = {
        "encoder__tune": "full", "loss__name": "full_softmax", "optim__accumulate": 2,
        "encoder__batch_tokens": 64, "encoder__step_tokens": 256, "encoder__checkpointing": True,
    }  # fmt: skip
    check_two_processes_equal_one(tmp_path, figure, "in pieces", **tuned | changes)


@pytest.fixture
def few_texts(tmp_path):
    """A data set of 24 users and 48 items, of which every tenth has a text: (source, of data)."""
    folder, draws = tmp_path / "few-texts", np.random.default_rng(0)
    folder.mkdir()
    rows = [f"u{u},i{i},{t}" for u in range(24) for t, i in enumerate(draws.permutation(48)[:5])]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    titles = ["Camp Stove", "Pasta Recipes", "Ghost Film Premium", "Racing", "Jungle Friends Film"]
    items = [f"i{i},{'' if i % 10 else titles[i // 10]}" for i in range(48)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]))
    return {"data__source": str(folder)}


def test_a_process_that_gets_no_text_to_read_joins_in(
    tuned, few_texts, tmp_path, monkeypatch, figure
):
    texts, real = [], TunedTextTower._own
    monkeypatch.setattr(
        TunedTextTower,
        "_own",
        lambda tower, rows, lengths: (
            texts.append(np.count_nonzero(lengths)) or real(tower, rows, lengths)
        ),
    )
    # Two users a step: where their 8 to 10 items have one text, one process gets none.
    changes = {"encoder__tune": "full", "loss__name": "in_batch", "optim__batch_size": 2}
    options = tuned | few_texts | changes
    check_two_processes_equal_one(tmp_path, figure, "shares without text", **options)
    assert {0, 1, 2} <= set(texts)


def hungry(monkeypatch, tokens, when="at once"):
    """Reading more than so many tokens at a time runs out of memory.

    `when`: at once; back: on the way back; later: there, once a piece of the step (see
    optim.accumulate) has left its gradients.
    """
    real = TunedEncoder._read

    def read(self, rows):
        back = torch._C._current_graph_task_id() != -1
        left = any(weight.grad is not None for weight in self.parameters())
        now = {"at once": True, "back": back, "later": back and left}[when]
        if now and len(rows) * int(self.lengths[rows].max()) > tokens:
            raise torch.OutOfMemoryError("a GPU says more")
        return real(self, rows)

    monkeypatch.setattr(TunedEncoder, "_read", read)


def epoch_losses(folder):
    return [entry["loss"] for entry in journal(folder)]


@pytest.mark.parametrize(("when", "accumulate"), [("at once", 1), ("back", 1), ("later", 2)])
def test_where_memory_runs_out_pieces_are_halved_and_the_batch_stays(
    tuned, tmp_path, monkeypatch, when, accumulate, figure
):
    options = tuned | {"encoder__tune": "full", "loss__name": "in_batch"}
    options |= {"optim__accumulate": accumulate}
    small = {"encoder__batch_tokens": 64, "encoder__step_tokens": 32}
    train(tmp_path / "undisturbed", **options, **small)
    hungry(monkeypatch, 64, when)
    large = {"encoder__batch_tokens": 256, "encoder__step_tokens": 128}
    train(tmp_path / "starved", **options, **large)
    known, found = (weights(tmp_path / name) for name in ("undisturbed", "starved"))
    gap, name = moved_apart(known, found)
    figure(f"difference of weights after memory ran out ({when})", gap)
    assert gap == 0, name  # to the last bit
    assert epoch_losses(tmp_path / "starved") == epoch_losses(tmp_path / "undisturbed")
    cost = record(tmp_path / "starved")["cost"]
    assert cost["memory_halvings"] == 2  # 256 -> 128 -> 64
    assert (cost["encoder_batch_tokens"], cost["encoder_step_tokens"]) == (64, 32)
    assert record(tmp_path / "undisturbed")["cost"]["memory_halvings"] == 0


def test_memory_that_does_not_suffice_for_one_text_stops_the_run_in_a_sentence(
    tuned, tmp_path, monkeypatch
):
    hungry(monkeypatch, 0)
    words = refusal(tmp_path / "run", **tuned, encoder__tune="full")
    assert "not even suffice for one item text" in words
    assert "Lower encoder.max_item_tokens, set encoder.checkpointing true" in words


def test_a_step_without_tuned_model_that_runs_out_of_memory_names_its_own_option(
    tmp_path, monkeypatch
):
    def forward(self, batch):
        raise torch.OutOfMemoryError("a GPU says more")

    monkeypatch.setattr(Recommender, "forward", forward)
    words = refusal(tmp_path / "run")
    assert "memory ran out in a training step. Raise optim.accumulate" in words


def test_only_a_lack_of_memory_is_taken_for_one(tuned, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError) as machine:
        torch.empty(2**55)
    assert out_of_memory(machine.value)

    def read(self, rows):
        raise RuntimeError("something else")

    monkeypatch.setattr(TunedEncoder, "_read", read)
    with pytest.raises(RuntimeError, match="something else"):
        main(command(tmp_path / "run", **tuned, encoder__tune="full"))


RESUMED = {
    "encoder__tune": "full",
    "model__dropout": 0.2,
    "tower__projection_dropout": 0.2,
    "run__checkpoint_steps": 1,
    "loss__name": "in_batch",
}
ADAPTERS = {"encoder__tune": "lora", "encoder__lora__dropout": 0.2, "encoder__lora__rank": 1}


def check_resumed_equals_undisturbed(tmp_path, **options):
    """Killed in the second of 4 steps of epoch 2."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, **options)
    assert run(command(killed, **options), Fault("forward", 6))[0] == [KILLED]
    state = checkpoints.newest_state(killed, "fit")
    assert state.name == "fit-state-0002-000001-best-001"
    kept = {path.name: path.read_bytes() for path in state.iterdir()}
    train(killed, **options)
    one, two = weights(whole), weights(killed)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert epoch_losses(whole) == epoch_losses(killed)
    assert per_user(whole).equals(per_user(killed))
    assert record(whole)["metrics"] == record(killed)["metrics"]
    assert record(whole)["cost"]["flops"] == record(killed)["cost"]["flops"]
    return kept


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"optim__state": "8bit"}, marks=pytest.mark.slow)],
    ids=["full", "full 8bit"],
)
def test_a_killed_run_resumes_to_the_same_weights(tuned, tmp_path, changes):
    check_resumed_equals_undisturbed(tmp_path, **tuned | RESUMED | changes)


def test_adapters_resume_alike_from_states_without_the_language_model(tuned, tmp_path, figure):
    options = tuned | RESUMED | ADAPTERS
    kept = check_resumed_equals_undisturbed(tmp_path, **options)
    saved, moments = (load(kept[f"{name}.safetensors"]) for name in ("model", "optimizer"))
    language = {name for name in saved if ".encoder." in name}
    assert language and all("lora_A" in name or "lora_B" in name for name in language)
    # Rank 1 beside 6 linear layers of 3 blocks: 4 of (32, 32), one (32, 64) and one (64, 32).
    assert sum(saved[name].numel() for name in language) == 3 * (4 * 64 + 2 * 96)
    learned = sum(saved[n].numel() for n in saved if not n.endswith((".mean", ".directions")))
    steps = sum(name.endswith(".step") for name in moments)
    assert sum(value.numel() for value in moments.values()) == 2 * learned + steps
    size = (Path(options["encoder__model"]) / "model.safetensors").stat().st_size
    adapters = sum(4 * saved[name].numel() for name in language)
    figure("bytes of a state's adapters and of the model's file", f"{adapters} and {size}")


@pytest.fixture
def built(monkeypatch):
    """(recommender, its weights before training) of every stage that is trained from now on."""
    found, real = [], train_tcf.build

    def build(*args):
        model = real(*args)
        found.append((model, {name: w.clone() for name, w in model.state_dict().items()}))
        return model

    monkeypatch.setattr(train_tcf, "build", build)
    return found


OF_THE_MODES = {  # options -> which of the tiny BERT's weights may move
    "full": ({}, lambda name: not name.startswith("pooler")),
    "top:1": ({}, lambda name: name.startswith("encoder.layer.2.")),
    "top:2": ({"encoder__cache_states": False}, lambda name: name[:15] in TOP_2),
    "lora": ({}, lambda name: "lora_" in name),
    "qlora": ({"encoder__lora__layers": 1}, lambda name: "lora_" in name and ".2." in name),
}
TOP_2 = ("encoder.layer.1", "encoder.layer.2")


@pytest.mark.parametrize("tune", OF_THE_MODES)
def test_a_run_moves_what_its_mode_says_and_nothing_else(tuned, tmp_path, built, tune):
    changes, moves = OF_THE_MODES[tune]
    train(tmp_path / "run", **tuned | changes, encoder__tune=tune, encoder__weight_decay=0.1)
    ((model, before),) = built
    prefix = "tower.encoder.model."
    for name, now in model.state_dict().items():
        # A key's bias moves no attention, so its gradient may be 0 to the last bit.
        if name.endswith("key.bias"):
            continue
        inside = name.startswith(prefix)
        buffer = name in ("tower.mean", "tower.directions")
        expected = moves(name.removeprefix(prefix)) if inside else not buffer
        assert torch.equal(now, before[name]) != expected, name
    learned = {name for name, weight in model.named_parameters() if weight.requires_grad}
    inside = {name for name in learned if name.startswith(prefix)}
    assert inside == {n for n in dict(model.named_parameters()) if n.startswith(prefix)
                      and moves(n.removeprefix(prefix))}  # fmt: skip
    assert record(tmp_path / "run")["cost"]["trainable_parameters"] == sum(
        model.get_parameter(name).numel() for name in learned
    )


def test_a_run_starts_from_the_files_weights(tuned, tmp_path, built):
    file = load_file(Path(tuned["encoder__model"]) / "model.safetensors")
    train(tmp_path / "run", **tuned, encoder__tune="lora")
    ((_, before),) = built
    prefix = "tower.encoder.model."
    loaded = {
        name.removeprefix(prefix).replace(".base_layer.", "."): value
        for name, value in before.items()
        if name.startswith(prefix) and "lora_" not in name
    }
    assert loaded.keys() == file.keys()
    assert all(torch.equal(loaded[name], file[name]) for name in file)


def test_the_run_gives_each_part_its_own_rate(tuned, tmp_path, monkeypatch):
    optimizers, real = [], train_tcf.build_optimizer
    monkeypatch.setattr(
        train_tcf, "build_optimizer", lambda *a: optimizers.append(real(*a)) or optimizers[-1]
    )
    changes = {"encoder__tune": "full", "encoder__lr": 2e-4, "optim__schedule": "constant"}
    train(tmp_path / "run", **tuned | changes, optim__lr=3e-3)
    (optimizer,) = optimizers
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [2e-4, 3e-3]
    # The journal's rate is the recommender's.
    assert {entry["lr"] for entry in journal(tmp_path / "run")} == {3e-3}


def test_a_mode_is_part_of_the_label_and_of_the_folder(tmp_path):
    words = ["--encoder.tune=top:1", "--data.source=simulated"]
    config = train_tcf.configure(words)
    assert config.run.label == "sasrec-text-top-1"
    assert config.run.folder == "runs/simulated-sasrec-text-top-1-s0"


def who(**options):
    """What decides the numbers of a run with these options."""
    return told(tuple(command(Path("run"), **options)))


@functools.cache
def told(words):
    """The same of a command line."""
    return identity(as_dict(train_tcf.configure(words)), "data", "weights")


TEXT = {"tower__name": "text"}


def test_a_frozen_run_is_the_one_it_was_before_anything_could_be_tuned(repository):
    kept = repository / "eval" / "results" / "amazon-beauty-2014" / "SASRec-text-0.json"
    before = flatten(json.loads(kept.read_text())["config"])
    assert "encoder.model" in before and "encoder.tune" not in before
    parts = ("encoder.", "optim.", "tower.", "run.")  # the losses have grown options since
    now = {name for name in who(**TEXT) if name.startswith(parts)}
    assert "encoder.model" in now and now - before.keys() == set()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder__tune": "full"}, "encoder.tune"),
        ({"encoder__lr": 1e-3}, "encoder.lr"),
        ({"encoder__weight_decay": 0.0}, "encoder.weight_decay"),
        ({"encoder__lora__rank": 4}, "encoder.lora.rank"),
        ({"encoder__lora__alpha": 4.0}, "encoder.lora.alpha"),
        ({"encoder__lora__dropout": 0.5}, "encoder.lora.dropout"),
        ({"encoder__lora__targets": "attention"}, "encoder.lora.targets"),
        ({"encoder__lora__layers": 1}, "encoder.lora.layers"),
        ({"encoder__lora__dora": True}, "encoder.lora.dora"),
        ({"encoder__lora__rslora": True}, "encoder.lora.rslora"),
        ({"optim__state": "8bit"}, "optim.state"),
        ({"encoder__lora__layers": 1, "encoder__cache_dtype": "float16"}, "encoder.cache_dtype"),
    ],
)
def test_what_moves_a_tuned_runs_numbers_tells_it_from_others(changes, named):
    lora = TEXT | {"encoder__tune": "lora"}
    assert named in differing(who(**lora), who(**lora | changes))
    assert "encoder.tune" in differing(who(**TEXT), who(**lora | changes))


def test_what_only_saves_memory_or_time_does_not_tell_runs_apart():
    lora = TEXT | {"encoder__tune": "lora", "encoder__lora__layers": 1}
    thrifty = {
        "encoder__step_tokens": 64, "encoder__batch_tokens": 64, "encoder__checkpointing": True,
    }  # fmt: skip
    for cache in ({"encoder__cache_states": False}, {"encoder__cache_gigabytes": 1.0}):
        assert differing(who(**lora), who(**lora | thrifty | cache)) == []


@pytest.mark.parametrize("quantisation", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_adapters_over_a_quantised_model_learn_on_a_cpu(tuned, tmp_path, built, quantisation):
    changes = {"encoder__tune": "qlora", "encoder__quantisation": quantisation, "optim__epochs": 4}
    train(tmp_path / "run", **tuned | changes, encoder__lora__layers="all")
    ((model, _),) = built
    kind = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantisation]
    names = [type(module).__name__ for module in model.tower.encoder.model.modules()]
    assert names.count(kind) >= 6 * 3
    losses = epoch_losses(tmp_path / "run")
    assert losses[-1] < losses[0]
    result = record(tmp_path / "run")
    assert result["config"]["encoder"]["quantisation"] == quantisation
    weights_of = weights(tmp_path / "run")
    assert not any("base_layer" in name for name in weights_of)
