"""DSSM, by user ID and by history: parity with plain formulas, and who depends on whom."""

import math

import numpy as np
import pytest
import torch

from llmrec.models.config import UserModelConfig
from llmrec.models.dssm import DSSM, HistoryDSSM
from llmrec.models.user_model import TrainingPairs

WIDTH, USERS = 3, 5
PAIRS = TrainingPairs(USERS, 7, np.array([0, 1, 1]), np.array([1, 2, 3]))


def filled(model):
    """The model in float64, every weight and bias of it random."""
    model = model.double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


@pytest.fixture
def by_id():
    torch.manual_seed(0)
    return filled(DSSM(UserModelConfig(name="dssm", width=WIDTH, blocks=2, dropout=0.5), PAIRS))


@pytest.fixture
def by_history():
    torch.manual_seed(0)
    return filled(HistoryDSSM(UserModelConfig(name="dssm_history", width=WIDTH, dropout=0.5)))


def plain(model, side, value):
    """A network one layer after the other: GELU between two linear layers, none at the end."""
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    layers = [name for name in weights if name.startswith(f"{side}.") and name.endswith("weight")]
    assert len(layers) == model.config.blocks + 1
    for number, name in enumerate(layers, start=1):
        value = weights[name] @ value + weights[name.replace("weight", "bias")]
        if number < len(layers):
            value = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in value])
    return value


def test_a_score_is_the_product_of_both_networks(by_id):
    vectors = torch.randn(4, WIDTH, dtype=torch.float64)
    users, items = (part.detach() for part in by_id(torch.tensor([3, 0]), vectors))
    ids = by_id.users.weight.detach().numpy()
    for row, user in enumerate((3, 0)):
        for column in range(4):
            left = plain(by_id, "user", ids[user])
            right = plain(by_id, "candidates", vectors[column].numpy())
            assert float(users[row] @ items[column]) == pytest.approx(left @ right, rel=1e-10)


def test_each_network_has_as_many_hidden_layers_as_asked_for():
    for blocks in (1, 3):
        model = DSSM(UserModelConfig(name="dssm", width=WIDTH, blocks=blocks), PAIRS)
        for side in (model.user, model.candidates):
            assert sum(isinstance(part, torch.nn.GELU) for part in side) == blocks
            assert sum(isinstance(part, torch.nn.Linear) for part in side) == blocks + 1


def test_there_is_a_vector_for_each_user_of_the_training_data(by_id):
    assert by_id.users.weight.shape == (USERS, WIDTH)


def test_a_user_and_an_item_depend_on_no_other(by_id):
    vectors = torch.randn(4, WIDTH, dtype=torch.float64)
    users, items = by_id(torch.tensor([3, 0, 4]), vectors)
    alone, item = by_id(torch.tensor([0]), vectors[2:3])
    torch.testing.assert_close(alone[0], users[1])
    torch.testing.assert_close(item[0], items[2])
    nobody, _ = by_id(torch.tensor([], dtype=torch.int64), vectors)
    assert nobody.shape == (0, WIDTH)


def test_gradients_reach_every_weight_and_the_users_of_the_batch_alone(by_id):
    vectors = torch.randn(4, WIDTH, dtype=torch.float64)
    users, items = by_id(torch.tensor([3, 0]), vectors)
    (users @ items.T).square().sum().backward()
    for name, weight in by_id.named_parameters():
        assert weight.grad.any(), name
    assert by_id.users.weight.grad.any(dim=1).tolist() == [True, False, False, True, False]


def test_dropout_works_in_training_and_nowhere_else(by_id):
    users, vectors = torch.arange(USERS), torch.randn(4, WIDTH, dtype=torch.float64)
    assert torch.equal(by_id(users, vectors)[0], by_id(users, vectors)[0])
    by_id.train()
    assert not torch.equal(by_id(users, vectors)[0], by_id(users, vectors)[0])
    assert not torch.equal(by_id(users, vectors)[1], by_id(users, vectors)[1])


def test_a_history_is_the_mean_of_its_items_so_far(by_history):
    """Items a, b, c after one of padding: the means a, (a + b) / 2 and (a + b + c) / 3."""
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    real = torch.tensor([[False, True, True, True]])
    a, b, c = x[0, 1:].numpy()
    found = by_history(x, real)[0, 1:].detach().numpy()
    for state, mean in zip(found, (a, (a + b) / 2, (a + b + c) / 3), strict=True):
        np.testing.assert_allclose(state, plain(by_history, "user", mean), rtol=1e-10)


def test_items_pass_their_own_network_before_they_are_scored(by_history):
    item = torch.randn(1, WIDTH, dtype=torch.float64)
    expected = plain(by_history, "candidates", item[0].numpy())
    np.testing.assert_allclose(by_history.candidates(item)[0].detach().numpy(), expected)


def test_the_order_of_a_history_does_not_matter(by_history):
    x, real = torch.randn(1, 6, WIDTH, dtype=torch.float64), torch.ones(1, 6, dtype=torch.bool)
    torch.testing.assert_close(by_history.last(x.flip(1), real), by_history.last(x, real))
