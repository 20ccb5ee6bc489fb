"""LightGCN against dense numpy in float64: values, gradients, nodes without edges."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmrec.models.config import UserModelConfig
from llmrec.models.lightgcn import LightGCN, graph
from llmrec.models.user_model import TrainingPairs

# Users 0..3 and items 1..4. User 2 and item 4 had nothing; user 0 had item 1 twice.
PAIRS = TrainingPairs(4, 4, np.array([0, 1, 0, 0, 3, 1]), np.array([1, 1, 2, 1, 3, 3]))


def model(steps=2, width=6, dropout=0.0, pairs=PAIRS):
    torch.manual_seed(0)
    config = UserModelConfig(name="lightgcn", width=width, blocks=steps, dropout=dropout)
    return LightGCN(config, pairs)


def dense_graph():
    """(9, 9): users 0..3, then the rows of the item vectors, of which row 0 is padding."""
    had = np.zeros((9, 9))
    for user, item in zip(PAIRS.users, PAIRS.items, strict=True):
        had[user, 4 + item] = had[4 + item, user] = 1
    degrees = had.sum(1)
    return had / np.sqrt(np.outer(degrees, degrees).clip(min=1))


def reference(users, vectors, steps):
    """Both sides of the scores, in float64."""
    layer = np.concatenate([users, vectors]).astype(np.float64)
    layers = [layer]
    for _ in range(steps):
        layer = dense_graph() @ layer
        layers.append(layer)
    mean = np.mean(layers, axis=0)
    return mean[:4], mean[4:]


def test_an_edge_weighs_one_over_the_root_of_both_degrees():
    starts, neighbours, weights = graph(PAIRS)
    # Degrees: users 2, 2, 0, 1; items 1: 2, 2: 1, 3: 2, 4: 0. The repeat is one edge.
    rows = [neighbours[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert rows == [[5, 6], [5, 7], [], [7], [], [0, 1], [0], [1, 3], []]
    root = 2**-0.5
    expected = [0.5, root, 0.5, 0.5, root, 0.5, 0.5, root, 0.5, root]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_vectors_are_the_mean_of_all_layers(steps):
    gcn, vectors = model(steps), torch.randn(5, 6)
    users, items = gcn(torch.tensor([3, 0, 2, 1, 3]), vectors)
    all_users, expected = reference(gcn.users.weight.detach().numpy(), vectors.numpy(), steps)
    wanted = all_users[[3, 0, 2, 1, 3]]
    np.testing.assert_allclose(users.detach().numpy(), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(items.detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_users_and_items_without_training_pairs_keep_their_share_of_the_first_layer():
    gcn, vectors = model(steps=3), torch.randn(5, 6)
    vectors[0] = 0
    users, items = gcn(torch.tensor([2]), vectors)
    torch.testing.assert_close(users[0], gcn.users.weight[2] / 4)
    torch.testing.assert_close(items[4], vectors[4] / 4)
    assert not items[0].any()  # padding


def test_gradients_are_those_of_the_dense_product():
    steps, probe, asked = 3, torch.randn(4 + 5, 6), torch.tensor([0, 3, 2, 1])
    gcn, vectors = model(steps), torch.randn(5, 6, requires_grad=True)
    users, items = gcn(asked, vectors)
    ((users * probe[:4]).sum() + (items * probe[4:]).sum()).backward()

    plain_users = gcn.users.weight.detach().double().requires_grad_()
    plain_vectors = vectors.detach().double().requires_grad_()
    layer = total = torch.cat([plain_users, plain_vectors])
    for _ in range(steps):
        layer = torch.from_numpy(dense_graph()) @ layer
        total = total + layer
    mean = total / (steps + 1)
    ((mean[:4][asked] * probe[:4]).sum() + (mean[4:] * probe[4:]).sum()).backward()
    torch.testing.assert_close(gcn.users.weight.grad.double(), plain_users.grad)
    torch.testing.assert_close(vectors.grad.double(), plain_vectors.grad)
    assert gcn.users.weight.grad.any(dim=1).all()


def test_the_first_layer_drops_out_in_training_alone():
    gcn, vectors = model(dropout=0.5), torch.randn(5, 6)
    first, second = (gcn(torch.arange(4), vectors)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    users, items = gcn(torch.arange(4), vectors)
    torch.manual_seed(5)
    dropped = F.dropout(torch.cat([gcn.users.weight, vectors]), 0.5).detach().numpy()
    expected = reference(dropped[:4], dropped[4:], 2)
    np.testing.assert_allclose(users.detach().numpy(), expected[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(items.detach().numpy(), expected[1], rtol=1e-5, atol=1e-7)
    gcn.eval()
    kept = reference(gcn.users.weight.detach().numpy(), vectors.numpy(), 2)[0]
    found = gcn(torch.arange(4), vectors)[0].detach().numpy()
    np.testing.assert_allclose(found, kept, rtol=1e-5, atol=1e-7)


def test_half_precision_vectors_are_summed_in_full():
    gcn, vectors = model(), torch.randn(5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        users, items = gcn(torch.arange(4), vectors)
    expected, _ = reference(gcn.users.weight.detach().numpy(), vectors.float().numpy(), 2)
    assert users.dtype == items.dtype == torch.float32
    np.testing.assert_allclose(users.detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_holds_no_graph():
    assert list(model().state_dict()) == ["users.weight"]


def test_the_graph_costs_two_a_number_and_direction_and_as_many_backward():
    # 5 distinct pairs x 2 directions x width 6 x 2 steps x (2 forward + 2 backward)
    assert model().graph_flops() == 5 * 2 * 6 * 2 * 4


def test_no_training_pairs_at_all_leave_every_vector_as_it_was():
    nothing = TrainingPairs(2, 3, np.zeros(0, np.int64), np.zeros(0, np.int64))
    gcn, vectors = model(steps=1, pairs=nothing), torch.randn(4, 6)
    users, items = gcn(torch.arange(2), vectors)
    torch.testing.assert_close(users, gcn.users.weight / 2)
    torch.testing.assert_close(items, vectors / 2)
