"""Every weight at its own rate and decay; 8-bit moments that survive being written down."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from llmrec import checkpoints
from llmrec.checkpoints import Progress
from llmrec.encoders.tuning import TunableEncoder
from llmrec.errors import UsageError
from llmrec.models.optim import OptimConfig, build_optimizer, rate, set_rate


class Model(nn.Module):
    """A recommender's kinds of weights: a language model's, a table's, a user model's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.language = nn.Sequential(nn.Embedding(80, 64), nn.Linear(64, 64), nn.LayerNorm(64))
        self.language[1].bias.requires_grad_(False)
        self.items = nn.Embedding(7, 64)
        self.projection = nn.Linear(64, 3)

    def forward(self, ids):
        return self.projection(self.language(ids) + self.items(ids % 7))


OPTIM = OptimConfig(lr=1e-2, weight_decay=0.3)
ENCODER = TunableEncoder(tune="full", lr=1e-3, weight_decay=0.2)


def groups(optimizer, model):
    """(name of a weight, its rate, its decay), sorted."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return sorted(
        (names[id(weight)], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    )


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_the_language_model_has_its_own_rate_and_only_matrices_decay(state):
    model = Model()
    optim = OptimConfig(lr=1e-2, weight_decay=0.3, state=state)
    optimizer = build_optimizer(model, optim, model.language, ENCODER)
    assert groups(optimizer, model) == [  # language.1.bias is frozen
        ("items.weight", 1e-2, 0.0),
        ("language.0.weight", 1e-3, 0.0),
        ("language.1.weight", 1e-3, 0.2),
        ("language.2.bias", 1e-3, 0.0),
        ("language.2.weight", 1e-3, 0.0),
        ("projection.bias", 1e-2, 0.0),
        ("projection.weight", 1e-2, 0.3),
    ]


def test_without_a_language_model_there_is_one_rate():
    model = Model()
    rates = {lr for _, lr, _ in groups(build_optimizer(model, OPTIM, None, ENCODER), model)}
    assert rates == {1e-2}


def test_both_rates_rise_and_fall_together():
    model = Model()
    optim = OptimConfig(lr=1e-2, warmup_share=0.1)
    optimizer = build_optimizer(model, optim, model.language, ENCODER)
    for step, share in [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (55, 0.55), (99, None)]:
        share = rate(step, 100, optim) if share is None else share
        set_rate(optimizer, step, 100, optim)
        found = {name: lr for name, lr, _ in groups(optimizer, model)}
        assert found["language.1.weight"] == pytest.approx(1e-3 * share)
        assert found["projection.weight"] == pytest.approx(1e-2 * share)
    # 0.1 + 0.45 (1 + cos(pi 89 / 90)): the last step's
    assert rate(99, 100, optim) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90)))


def trained(model, optimizer, steps):
    """The model after some steps that follow from their numbers."""
    for step in steps:
        ids = torch.from_numpy(np.random.default_rng(step).integers(0, 80, 20))
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_moments_written_down_and_read_again_go_on_to_the_last_bit(tmp_path, state):
    optim = OptimConfig(lr=1e-2, weight_decay=0.3, state=state)

    def new():
        model = Model()
        return model, build_optimizer(model, optim, model.language, ENCODER)

    whole = trained(*new(), range(6))
    model, optimizer = new()
    trained(model, optimizer, range(3))
    checkpoints.save_state(tmp_path, "fit", model, optimizer, Progress(), {}, keep=1)
    again, fresh = new()
    checkpoints.load_state(checkpoints.newest_state(tmp_path, "fit"), again, fresh)
    moments = fresh.state[again.language[0].weight]  # 5120 weights; fewer than 4096 stay float32
    if state == "8bit":
        assert moments["state1"].dtype == torch.uint8
        assert moments["step"] == 3 and isinstance(moments["step"], int)  # as it was
        assert fresh.state[again.language[2].weight]["state1"].dtype == torch.float32
        assert moments["qmap1"].shape == (256,)
    trained(again, fresh, range(3, 6))
    assert not torch.equal(whole.language[0].weight, model.language[0].weight)
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, r"optim\.epochs=0 must be at least 1"),
        ({"accumulate": 0}, r"optim\.accumulate=0 must be at least 1"),
        ({"lr": 0.0}, r"optim\.lr=0\.0 must be above 0"),
        ({"clip": 0.0}, r"optim\.clip=0\.0 must be above 0, or off"),
        ({"weight_decay": -0.1}, r"optim\.weight_decay=-0\.1 must not be below 0"),
        ({"warmup_share": 1.0}, r"optim\.warmup_share=1\.0 must lie in \[0, 1\)"),
    ],
)
def test_values_without_a_meaning_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        OptimConfig(**options)
