"""Matrix factorisation: its vectors are the tables, and it learns who had what."""

import numpy as np
import torch

from llmrec.models.config import UserModelConfig
from llmrec.models.losses import bpr
from llmrec.models.mf import MatrixFactorisation
from llmrec.models.user_model import TrainingPairs


def model(users=3, items=4, width=6, dropout=0.0):
    torch.manual_seed(0)
    pairs = TrainingPairs(users, items, np.zeros(0, np.int64), np.zeros(0, np.int64))
    return MatrixFactorisation(UserModelConfig(name="mf", width=width, dropout=dropout), pairs)


def test_scores_are_products_of_the_two_tables():
    mf, vectors = model(), torch.randn(5, 6)
    users, items = mf(torch.tensor([2, 0, 2]), vectors)
    table = mf.users.weight.detach().numpy()
    expected = table[[2, 0, 2]] @ vectors.numpy().T
    np.testing.assert_allclose((users @ items.T).detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_both_vectors_drop_out_in_training_alone():
    mf, vectors = model(users=500, width=20, dropout=0.25), torch.ones(300, 20)
    torch.nn.init.ones_(mf.users.weight)
    users, items = mf(torch.arange(500), vectors)
    for side, count in ((users, 10_000), (items, 6_000)):
        zeros = int((side == 0).sum())
        # Standard deviation sqrt(n x 1/4 x 3/4): 43 and 34; what is left is 1 / (1 - 1/4).
        assert abs(zeros - count / 4) < 4 * (count * 3 / 16) ** 0.5
        torch.testing.assert_close(side[side > 0], torch.full((count - zeros,), 4 / 3))
    mf.eval()
    users, items = mf(torch.arange(500), vectors)
    assert (users == 1).all() and (items == 1).all()


def test_the_gradient_reaches_both_tables():
    mf, vectors = model(), torch.randn(5, 6, requires_grad=True)
    users, items = mf(torch.tensor([1]), vectors)
    bpr(users, items, torch.tensor([2]), torch.tensor([[4]])).backward()
    assert torch.nonzero(mf.users.weight.grad.any(dim=1)).flatten().tolist() == [1]
    assert torch.nonzero(vectors.grad.any(dim=1)).flatten().tolist() == [2, 4]


def test_bpr_ranks_what_a_user_had_first():
    # Users 0 and 1 had items 1 and 2, user 2 had 3 and 4.
    users, had = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 2, 1, 2, 3, 4])
    others = torch.tensor([[3, 4], [3, 4], [3, 4], [3, 4], [1, 2], [1, 2]])
    mf = model()
    table = torch.nn.Parameter(torch.randn(5, 6) * 0.02)
    weights = [mf.users.weight, table]
    for _ in range(60):
        gradients = torch.autograd.grad(bpr(*mf(users, table), had, others), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.5 * gradient
    found, items = mf(torch.arange(3), table)
    first = (found @ items[1:].T).topk(2).indices.sort().values + 1
    assert first.tolist() == [[1, 2], [1, 2], [3, 4]]
