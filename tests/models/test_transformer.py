"""SASRec and BERT4Rec under every option: parity with plain loops, no trace of padding."""

import itertools
import math

import numpy as np
import pytest
import torch

from llmrec.errors import UsageError
from llmrec.models.bert4rec import BERT4Rec
from llmrec.models.config import UserModelConfig
from llmrec.models.sasrec import SASRec
from llmrec.models.transformer import rotated

MODELS = {"sasrec": SASRec, "bert4rec": BERT4Rec}
OPTIONS = list(
    itertools.product(MODELS, ("post", "pre"), ("gelu", "gated"), ("learned", "rotary", "relative"))
)
WIDTH, LONGEST = 8, 7
STRANGE = 100.0
"""Stands where nobody may look."""

every_option = pytest.mark.parametrize(("name", "norm", "feed_forward", "positions"), OPTIONS)


def build(name, norm="post", feed_forward="gelu", positions="learned", **options):
    """A model in float64 with two blocks whose every weight, bias and norm matters."""
    config = UserModelConfig(
        name=name, norm=norm, feed_forward=feed_forward, positions=positions, width=WIDTH,
        blocks=2, heads=2, dropout=0.3, max_length=LONGEST, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MODELS[name](config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    return model


def history(lengths, width=None):
    """Left-padded item vectors of some lengths: x (B, L, D) and real (B, L)."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(1)
    x = torch.full((len(lengths), width, WIDTH), STRANGE, dtype=torch.float64)
    real = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    for row, length in enumerate(lengths):
        x[row, width - length :] = torch.randn(
            length, WIDTH, generator=generator, dtype=torch.float64
        )
    return x, real


class Reference:
    """One row without padding, a number at a time where that reads better."""

    def __init__(self, model):
        self.config, self.causal = model.config, model.config.name == "sasrec"
        self.weights = {name: weight.numpy() for name, weight in model.state_dict().items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    @staticmethod
    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def feed_forward(self, block, x):
        if self.config.feed_forward == "gelu":
            inner = self.gelu(self.linear(f"{block}.feed_forward.0", x))
            return self.linear(f"{block}.feed_forward.2", inner)
        gate, value = np.split(self.linear(f"{block}.feed_forward.gate_value", x), 2, axis=1)
        return self.linear(f"{block}.feed_forward.out", gate / (1 + np.exp(-gate)) * value)

    def logit(self, block, head, query, key, i, j):
        """How much position i wants of j, counted from the left."""
        if self.config.positions == "rotary":  # pairs as complex numbers, turned by the distance
            half = len(query) // 2
            turn = np.exp(1j * (i - j) * 10_000.0 ** -(np.arange(half) / half))
            query, key = (part[:half] + 1j * part[half:] for part in (query, key))
            return (query * turn * key.conj()).real.sum() / math.sqrt(2 * half)
        product = query @ key / math.sqrt(len(query))
        if self.config.positions == "relative":
            row = i - j if self.causal else i - j + LONGEST - 1
            product += self.weights[f"{block}.distances.weight"][row, head]
        return product

    def attention(self, block, x):
        query = self.linear(f"{block}.query", x)
        key, value = np.split(self.linear(f"{block}.key_value", x), 2, axis=1)
        gathered = np.zeros_like(x)
        for head, part in enumerate((slice(0, 4), slice(4, 8))):
            for i in range(len(x)):
                seen = range(i + 1) if self.causal else range(len(x))
                odds = [
                    math.exp(self.logit(block, head, query[i, part], key[j, part], i, j))
                    for j in seen
                ]
                for j, odd in zip(seen, odds, strict=True):
                    gathered[i, part] += odd / sum(odds) * value[j, part]
        return self.linear(f"{block}.out", gathered)

    def states(self, x):
        """(L, D) -> (L, D)."""
        if self.config.positions == "learned":
            x = x + self.weights["positions.weight"][: len(x)][::-1]
        x = self.norm("norm", x)
        for block in ("blocks.0", "blocks.1"):
            attend, feed = f"{block}.norm_attention", f"{block}.norm_feed_forward"
            if self.config.norm == "post":
                x = self.norm(attend, x + self.attention(block, x))
                x = self.norm(feed, x + self.feed_forward(block, x))
            else:
                x = x + self.attention(block, self.norm(attend, x))
                x = x + self.feed_forward(block, self.norm(feed, x))
        if self.config.norm == "pre":
            x = self.norm("last_norm", x)
        if self.causal:
            return x
        return self.norm("head.2", self.gelu(self.linear("head.0", x)))


@torch.no_grad()
@every_option
def test_a_forward_pass_equals_plain_loops(name, norm, feed_forward, positions):
    model = build(name, norm, feed_forward, positions)
    x, real = history([5, 3])
    reference = Reference(model)
    states = model(x, real)
    for row, length in ((0, 5), (1, 3)):
        expected = reference.states(x[row, 5 - length :].numpy())
        np.testing.assert_allclose(states[row, 5 - length :], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@every_option
def test_neither_padding_nor_its_content_changes_an_output(name, norm, feed_forward, positions):
    model = build(name, norm, feed_forward, positions)
    short, padded = history([4, 2]), history([4, 2], LONGEST)
    padded[0][~padded[1]] *= -2
    states, wide = model(*short), model(*padded)
    torch.testing.assert_close(wide[padded[1]], states[short[1]])
    torch.testing.assert_close(model.last(*padded), model.last(*short))


@torch.no_grad()
@every_option
def test_the_last_state_alone_equals_the_last_of_all(name, norm, feed_forward, positions):
    model = build(name, norm, feed_forward, positions)
    x, real = history([5, 2])
    asked, known = x, real
    if name == "bert4rec":  # a mask appended
        asked = torch.cat([x, model.mask.expand(2, 1, WIDTH)], dim=1)
        known = torch.cat([real, torch.ones(2, 1, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(model.last(x, real), model(asked, known)[:, -1])


@every_option
def test_gradients_reach_every_weight(name, norm, feed_forward, positions):
    model = build(name, norm, feed_forward, positions).train()
    x, real = history([LONGEST, 3])
    if name == "bert4rec":
        x = model.hide(x, torch.eye(LONGEST, dtype=torch.bool)[[2, 5]])
    states = model(x, real)
    (states[real] * torch.randn(int(real.sum()), WIDTH, dtype=torch.float64)).sum().backward()
    without = [n for n, w in model.named_parameters() if w.grad is None or not w.grad.any()]
    assert without == []
    if positions == "relative":  # every distance of a full row is met
        assert model.blocks[0].distances.weight.grad.ne(0).all()


@torch.no_grad()
@every_option
def test_a_row_without_items_gives_finite_numbers(name, norm, feed_forward, positions):
    model = build(name, norm, feed_forward, positions)
    x, real = history([0, 3])
    assert model(x, real).isfinite().all()
    assert model.last(x, real).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
def test_the_order_of_the_history_matters(name, positions):
    model = build(name, positions=positions)
    x, real = history([4])
    swapped = x[:, [1, 0, 2, 3]]
    assert (model.last(swapped, real) - model.last(x, real)).abs().max() > 1e-6


@torch.no_grad()
def test_a_model_that_reads_both_ways_tells_order_by_distances_alone():
    model = build("bert4rec", positions="relative")
    for block in model.blocks:
        block.distances.weight.fill_(0.7)  # all alike
    x, real = history([4])
    torch.testing.assert_close(model.last(x[:, [1, 0, 2, 3]], real), model.last(x, real))


def test_products_of_rotated_vectors_depend_on_their_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 5, 6, dtype=torch.float64)
    places = torch.tensor([4, 3, 2, 1, 0])
    products = rotated(query, places) @ rotated(key, places).mT
    shifted = rotated(query, places + 30) @ rotated(key, places + 30).mT
    torch.testing.assert_close(shifted, products, rtol=1e-4, atol=1e-5)
    assert (products - query @ key.mT).abs().max() > 0.1
    torch.testing.assert_close(
        products.diagonal(dim1=2, dim2=3), (query * key).sum(-1)
    )  # distance 0


def test_a_gated_layer_has_as_many_weights_as_a_plain_one():
    plain, gated = (
        sum(
            weight.numel()
            for weight in SASRec(UserModelConfig(width=64, feed_forward=kind))
            .blocks[0]
            .feed_forward.parameters()
        )
        for kind in ("gelu", "gated")
    )
    assert plain == 64 * 256 + 256 + 256 * 64 + 64
    assert gated == 64 * 336 + 336 + 168 * 64 + 64  # 8/3 of 64 is 170.7, the nearest by 8 is 168
    assert 0.97 < gated / plain < 1.03


def test_heads_of_odd_width_cannot_be_rotated():
    with pytest.raises(UsageError, match=r"model\.positions=rotary turns pairs of numbers"):
        UserModelConfig(width=6, heads=2, positions="rotary")


def test_mixed_precision_runs_through_every_option():
    for name, norm, feed_forward, positions in OPTIONS:
        model = build(name, norm, feed_forward, positions).float().train()
        x, real = history([5, 3])
        with torch.autocast("cpu", torch.bfloat16):
            states = model(x.float(), real)
        states[real].float().square().sum().backward()
        assert states[real].isfinite().all()
