"""What every causal user model promises, whatever is inside: order, padding, the last state."""

import pytest
import torch

from llmrec.models.config import UserModelConfig
from llmrec.models.dssm import HistoryDSSM
from llmrec.models.gru4rec import GRU4Rec
from llmrec.models.nextitnet import NextItNet

MODELS = {"gru4rec": GRU4Rec, "nextitnet": NextItNet, "dssm_history": HistoryDSSM}
OPTIONS = [
    ("gru4rec", {"blocks": 1}),
    ("gru4rec", {"blocks": 2}),
    ("nextitnet", {"blocks": 1}),
    ("nextitnet", {"blocks": 2, "kernel": 2, "dilations": (1, 2)}),
    ("dssm_history", {"blocks": 2}),
]
WIDTH, STRANGE = 4, 100.0
"""STRANGE stands where nobody may look."""

every_model = pytest.mark.parametrize(("name", "options"), OPTIONS)


def build(name, options):
    """A model in float64 whose every weight and bias matters."""
    torch.manual_seed(0)
    config = UserModelConfig(name=name, width=WIDTH, dropout=0.3, max_length=12, **options)
    model = MODELS[name](config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    return model


def history(lengths, width):
    """Left-padded item vectors of some lengths: x (B, L, D) and real (B, L)."""
    generator = torch.Generator().manual_seed(1)
    items = torch.randn(len(lengths), 12, WIDTH, generator=generator, dtype=torch.float64)
    real = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return items[:, 12 - width :].masked_fill(~real[..., None], STRANGE), real


@every_model
def test_changing_a_later_item_never_changes_an_earlier_state(name, options):
    model = build(name, options)
    x, real = history([10, 7], 10)
    before = model(x, real)
    for position in range(10):
        changed = x.clone()
        changed[:, position:] += 1.0
        after = model(changed, real)
        assert torch.equal(after[:, :position][real[:, :position]],
                           before[:, :position][real[:, :position]])  # fmt: skip
        moved = (after[:, position] != before[:, position]).any(dim=1)
        assert moved[real[:, position]].all()


@every_model
def test_what_stands_in_the_padding_changes_no_real_state_and_learns_nothing(name, options):
    model = build(name, options)
    x, real = history([9, 4, 1], 9)
    other = x.masked_fill(~real[..., None], -3.0).requires_grad_()
    states = model(other, real)
    assert torch.equal(states[real], model(x, real)[real])
    assert torch.equal(model.last(other, real), model.last(x, real))
    states[real].square().sum().backward()
    assert not other.grad[~real].any()
    assert other.grad[real].any(dim=1).all()


@every_model
def test_trimming_or_padding_a_batch_changes_no_state(name, options):
    model = build(name, options)
    short, short_real = history([5, 2], 5)
    padded, padded_real = history([5, 2], 12)
    torch.testing.assert_close(
        model(padded, padded_real)[padded_real], model(short, short_real)[short_real]
    )
    torch.testing.assert_close(model.last(padded, padded_real), model.last(short, short_real))


@every_model
def test_the_last_state_alone_equals_the_last_of_all(name, options):
    model = build(name, options)
    x, real = history([12, 5, 1, 0], 12)
    torch.testing.assert_close(model.last(x, real), model(x, real)[:, -1])


@every_model
def test_a_row_knows_nothing_of_the_others(name, options):
    model = build(name, options)
    x, real = history([8, 3, 6], 8)
    together = model(x, real)
    for row in range(3):
        alone = model(x[row : row + 1], real[row : row + 1])[0]
        torch.testing.assert_close(alone[real[row]], together[row][real[row]])


@every_model
def test_an_empty_history_has_one_state_whatever_its_padding(name, options):
    model = build(name, options)
    empty = torch.zeros(1, 12, WIDTH, dtype=torch.float64)
    nothing = torch.zeros(1, 12, dtype=torch.bool)
    torch.testing.assert_close(model.last(empty, nothing), model.last(empty[:, :1], nothing[:, :1]))


@every_model
def test_gradients_reach_every_weight(name, options):
    model = build(name, options)
    x, real = history([12, 6], 12)
    states, items = model(x, real)[real], model.candidates(x[real])
    (states @ items.T).square().sum().backward()
    for weight_name, weight in model.named_parameters():
        assert weight.grad is not None, weight_name
        assert weight.grad.any(), weight_name


@every_model
def test_dropout_works_in_training_and_nowhere_else(name, options):
    model = build(name, options)
    x, real = history([12], 12)
    assert torch.equal(model(x, real), model(x, real))
    model.train()
    assert not torch.equal(model(x, real), model(x, real))
    still = MODELS[name](UserModelConfig(name=name, width=WIDTH, dropout=0.0, **options)).double()
    assert torch.equal(still.train()(x, real), still.eval()(x, real))
