"""SASRec: no peeking, no trace of padding or trimming, and a step against a few lines of numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmrec.errors import UsageError
from llmrec.models.config import UserModelConfig
from llmrec.models.sasrec import SASRec

CONFIG = UserModelConfig(width=16, blocks=2, heads=2, dropout=0.3, max_length=12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SASRec(CONFIG).eval()


def states(model, x, real=None):
    with torch.inference_mode():
        return model(x, torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("feed_forward", ["gelu", "gated"])
@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
def test_changing_a_later_item_never_changes_an_earlier_output(norm, feed_forward, positions):
    torch.manual_seed(0)
    model = SASRec(
        replace(CONFIG, norm=norm, feed_forward=feed_forward, positions=positions)
    ).eval()
    x = torch.randn(3, 10, 16)
    before = states(model, x)
    for position in range(10):
        changed = x.clone()
        changed[:, position:] = torch.randn(3, 10 - position, 16)
        torch.testing.assert_close(
            states(model, changed)[:, :position], before[:, :position], rtol=0, atol=0
        )
    assert not torch.equal(states(model, changed)[:, -1], before[:, -1])


def test_what_stands_in_the_padding_changes_no_real_output(model):
    x, real = torch.randn(2, 8, 16), torch.ones(2, 8, dtype=torch.bool)
    real[0, :5] = False
    other = x.clone()
    other[0, :5] = 100.0
    torch.testing.assert_close(
        states(model, x, real)[real], states(model, other, real)[real], rtol=0, atol=0
    )


def test_trimming_or_padding_a_batch_changes_no_output(model):
    short = torch.randn(2, 4, 16)
    padded = torch.cat([torch.randn(2, 8, 16), short], dim=1)
    real = torch.arange(12).expand(2, 12) >= 8
    torch.testing.assert_close(
        states(model, padded, real)[:, 8:], states(model, short), rtol=1e-5, atol=1e-6
    )


def test_the_last_position_alone_equals_the_last_of_all(model):
    x, real = torch.randn(3, 9, 16), torch.ones(3, 9, dtype=torch.bool)
    real[1, :6] = False
    with torch.inference_mode():
        last = model.last(x, real)  # (3, 16)
    torch.testing.assert_close(last, states(model, x, real)[:, -1], rtol=1e-5, atol=1e-6)


def test_a_forward_pass_equals_a_few_lines_of_numpy(model):
    weights = {
        name: weight.numpy().astype(np.float64) for name, weight in model.state_dict().items()
    }
    x = torch.randn(1, 5, 16)

    def linear(name, value):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, value):
        centred = value - value.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    h = norm(
        "norm", x[0].numpy().astype(np.float64) + weights["positions.weight"][4::-1]
    )  # (5, 16)
    for block in ("blocks.0", "blocks.1"):
        query = linear(f"{block}.query", h)
        key, value = np.split(linear(f"{block}.key_value", h), 2, axis=1)
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            scores = np.where(
                np.tril(np.ones((5, 5))), query[:, part] @ key[:, part].T / np.sqrt(8), -np.inf
            )
            odds = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(odds / odds.sum(1, keepdims=True) @ value[:, part])
        h = norm(f"{block}.norm_attention", h + linear(f"{block}.out", np.hstack(heads)))
        inner = linear(f"{block}.feed_forward.0", h)
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / np.sqrt(2)))
        h = norm(f"{block}.norm_feed_forward", h + linear(f"{block}.feed_forward.2", inner))
    np.testing.assert_allclose(states(model, x)[0].numpy(), h, rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UsageError, match=r"model\.width=64 is not divisible by model\.heads=5"):
        UserModelConfig(width=64, heads=5)


def test_no_heads_are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        UserModelConfig(heads=0)
