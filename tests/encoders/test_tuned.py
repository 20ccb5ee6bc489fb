"""A tuned encoder's step: cheap by arrangement, its gradients those of the plain computation."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from still_models import save_still_model
from tuned_parts import (
    TEXTS,
    WIDTH,
    batch,
    furthest,
    gradients,
    plain_loss,
    plain_vectors,
    recommender,
    scatter_adapters,
)

from llmrec.encoders.tower import TowerConfig, build_tower, prepare_features
from llmrec.encoders.tuning import LoraOptions

ARCHITECTURES = ("bert", "opt", "qwen3", "t5")
TOLERANCE = 3e-5
"""Of a gradient, by the largest of its weight: float32's rounding, over other paths of sums."""
LORA = {"tune": "lora"}
TOP = {"tune": "top:1", "cache_states": False}
FULL = {"tune": "full"}
QLORA = {"tune": "qlora"}


@pytest.fixture(scope="module")
def still_models(tmp_path_factory):
    """Architecture -> folder of a model without dropout."""
    folder = tmp_path_factory.mktemp("still")
    return {name: save_still_model(name, folder / name) for name in ARCHITECTURES}


def differences(model, loss):
    """Of our loss and gradients from the plain ones."""
    data = batch(loss)
    model.train()
    plain = plain_loss(model, data)
    expected = gradients(model, plain)
    ours = model(data)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    return furthest(gradients(model, ours), expected)


@pytest.mark.parametrize("loss", ["in_batch", "full_softmax", "bce", "sampled_softmax"])
def test_each_item_read_once_gives_the_gradients_of_every_slot_read_alone(
    still_models, tmp_path, loss, figure
):
    model = recommender(still_models["bert"], tmp_path, loss, **FULL)
    found = differences(model, loss)
    figure(f"relative gradient difference from the plain step, {loss}", f"{found:.1e}")
    assert found < TOLERANCE


@pytest.mark.parametrize("options", [LORA, QLORA, TOP, FULL], ids=lambda options: options["tune"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradients_of_every_mode_are_the_plain_ones(
    still_models, tmp_path, name, options, figure
):
    model = recommender(still_models[name], tmp_path, **options)
    scatter_adapters(model)
    found = differences(model, "in_batch")
    figure(f"relative gradient difference, {name} {options['tune']}", f"{found:.1e}")
    assert found < TOLERANCE


def reads(model, monkeypatch):
    """Rows of every piece that the model reads from now on."""
    language, rows = model.tower.language_model, []
    real = language._read
    monkeypatch.setattr(language, "_read", lambda piece: rows.append(len(piece)) or real(piece))
    return rows


PIECES = {"batch_tokens": 16, "step_tokens": 40}
"""At 3 to 10 tokens a text: pieces of 1 to 5 texts, of which the first few are held."""


@pytest.mark.parametrize("options", [LORA, TOP, FULL], ids=lambda options: options["tune"])
def test_a_step_in_pieces_that_are_read_again_has_the_same_gradients(
    still_models, tmp_path, monkeypatch, options, figure
):
    model = recommender(still_models["qwen3"], tmp_path, **options, **PIECES)
    scatter_adapters(model)
    data, rows = batch("in_batch"), reads(model, monkeypatch)
    model(data).backward()
    texts = len(data.items) - 2  # but for the padding and item 7, which has no text
    pieces = len(rows) - np.flatnonzero(np.cumsum(rows) == texts)[0] - 1  # read on the way back
    assert 0 < pieces < len(rows) / 2 and sum(rows) > texts and max(rows) <= 5
    found = differences(model, "in_batch")
    figure(f"relative gradient difference in pieces, {options['tune']}", f"{found:.1e}")
    assert found < TOLERANCE


@pytest.mark.parametrize("options", [LORA, TOP, FULL], ids=lambda options: options["tune"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_checkpointing_runs_the_tuned_blocks_again_and_changes_no_gradient(
    still_models, tmp_path, name, options, figure
):
    model = recommender(still_models[name], tmp_path, **options, checkpointing=True)
    scatter_adapters(model)
    runs, blocks = [], list(model.tower.encoder.encoder.blocks)
    for number, block in enumerate(blocks):
        attention = next(part for path, part in block.named_modules() if "att" in path.lower())
        attention.register_forward_hook(lambda *_, number=number: runs.append(number))
    model.train()
    model(batch("in_batch")).backward()
    tuned = model.tower.encoder.tuned_blocks
    assert all(runs.count(number) == 2 for number in range(3 - tuned, 3))
    found = differences(model, "in_batch")
    figure(f"relative gradient difference, checkpointing {name}", f"{found:.1e}")
    assert found < TOLERANCE


@pytest.mark.parametrize(
    "again",
    [{"step_tokens": 1}, {"checkpointing": True}, {"step_tokens": 1, "checkpointing": True}],
)
@pytest.mark.parametrize("options", [LORA | {"lora": LoraOptions(dropout=0.3)}, TOP, FULL])
def test_what_is_read_again_drops_out_the_same(tiny_models, tmp_path, options, again):
    found = []
    for extra in ({}, again):
        model = recommender(
            tiny_models["bert"], tmp_path, dropout=0.2, batch_tokens=64, **options, **extra
        )
        scatter_adapters(model)
        model.train()
        torch.manual_seed(7)
        loss = model(batch("in_batch"))
        found.append((loss.item(), gradients(model, loss)))
    torch.manual_seed(8)
    assert abs(model(batch("in_batch")).item() - found[0][0]) > 1e-3  # dropout is at work
    assert found[0][0] == found[1][0]
    assert furthest(found[1][1], found[0][1]) < TOLERANCE


@pytest.mark.parametrize("thrift", [{}, PIECES | {"checkpointing": True}])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_lower_blocks_leave_the_gradients_as_they_are(
    still_models, tmp_path, name, thrift, figure
):
    cached = recommender(still_models[name], tmp_path, tune="top:1", **thrift)
    whole = recommender(still_models[name], tmp_path, **TOP)
    data, found = batch("in_batch"), []
    for model in (cached, whole):
        model.train()
        found.append(gradients(model, model(data)))
    assert cached.tower.encoder.cached is not None and whole.tower.encoder.cached is None
    difference = furthest(*found)
    figure(f"relative gradient difference, cached {name}", f"{difference:.1e}")
    assert difference < TOLERANCE


MODES = [LORA, LORA | {"lora": LoraOptions(dora=True, layers=2), "cache_states": False}, TOP, FULL]


@pytest.mark.parametrize("options", [*MODES, QLORA])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_before_the_first_step_the_vectors_are_those_of_the_frozen_tower(
    tiny_models, tmp_path, name, options
):
    model = recommender(tiny_models[name], tmp_path, batch_tokens=30, dropout=0.2, **options).eval()
    plain = plain_vectors(model.tower.encoder.config)
    torch.manual_seed(0)
    config = TowerConfig(projection_dropout=0.2)
    frozen = build_tower(config, len(TEXTS), WIDTH, prepare_features(plain, config, 0)).eval()
    frozen.projection.load_state_dict(model.tower.projection.state_dict())
    with torch.inference_mode():
        ids = torch.arange(len(TEXTS) + 1)
        ours, expected = model.item_vectors(), frozen.vectors(ids)
    assert expected[1:].std() > 1e-3 and not ours[0].any()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def own_name(name):
    """A weight's name in the model's file; adapters have none."""
    return "" if "lora_" in name else name.replace(".base_layer.", ".")


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loaded_weights_are_those_of_the_file_to_the_last_bit(tiny_models, tmp_path, name, options):
    file = load_file(tiny_models[name] / "model.safetensors")
    if name == "t5":
        file = {key: value for key, value in file.items() if not key.startswith("decoder.")}
    model = recommender(tiny_models[name], tmp_path, **options)
    same = set()
    for path, weight in model.tower.encoder.model.named_parameters():
        mine = own_name(path)
        if mine == "embed_tokens.weight" and name == "t5":
            mine = "shared.weight"
        known = mine if mine in file else f"encoder.{mine}"  # T5's encoder is a part of its model
        if mine:
            assert torch.equal(weight, file[known])
            same.add(known)
    assert same == file.keys()
