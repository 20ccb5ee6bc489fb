"""Every loss against its plain formula, in value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from llmrec.errors import UsageError
from llmrec.models.losses import LossConfig, bce, full_softmax, in_batch_softmax


def with_gradients(function, *tensors):
    """The value of a function and its gradients, in float64 copies of the tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    "chunk_bytes", [1, 4 * 300 * 7, 1 << 30]
)  # one row, seven rows, all rows at once
def test_full_softmax_equals_cross_entropy_for_any_chunk(chunk_bytes):
    torch.manual_seed(0)
    states, items = torch.randn(50, 16), torch.randn(300, 16)
    targets = torch.randint(0, 300, (50,))
    plain, plain_grads = with_gradients(
        lambda s, v: F.cross_entropy(s @ v.T, targets, reduction="sum") / 50,
        states.double(),
        items.double(),
    )
    ours, our_grads = with_gradients(
        lambda s, v: full_softmax(s, v, targets, chunk_bytes) / 50, states, items
    )
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, reference in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-6)


def test_full_softmax_of_large_scores_does_not_overflow():
    states, items = torch.full((1, 1), 1000.0), torch.tensor([[1.0], [0.999]])
    # scores 1000 and 999: loss of the second is log(1 + e)
    assert full_softmax(states, items, torch.tensor([1])).item() == pytest.approx(
        math.log(1 + math.e), rel=1e-4
    )


def slot_softmax(states, items, targets, rows, slots, log_popularity, places):
    """TCF's and MoRec's form: a column per slot, the own sequence's masked but for the label."""
    total = states.new_zeros(())
    flat = slots.flatten()
    columns = torch.nonzero(flat >= 0)[:, 0]
    for p in range(len(states)):
        label = places[p]  # the label's own slot
        own = set(slots[rows[p]][slots[rows[p]] >= 0].tolist())
        kept = [c for c in columns.tolist() if c == label or flat[c].item() not in own]
        logits = torch.stack([states[p] @ items[flat[c]] - log_popularity[flat[c]] for c in kept])
        total = total + F.cross_entropy(
            logits[None], torch.tensor([kept.index(label)]), reduction="sum"
        )
    return total


def test_in_batch_softmax_over_distinct_items_equals_the_duplicated_columns():
    torch.manual_seed(1)
    # Two users: item 2 is shared, item 4 occurs twice in one sequence, the second is padded.
    slots = torch.tensor([[0, 2, 4, 4], [-1, 1, 2, 3]])
    rows = torch.tensor([0, 0, 0, 1, 1])
    targets = torch.tensor([2, 4, 4, 2, 3])
    places = [1, 2, 3, 6, 7]
    states, items = torch.randn(5, 8).double(), torch.randn(6, 8).double()  # item 5 is in no slot
    log_popularity = torch.rand(6).double().log()
    plain, plain_grads = with_gradients(
        lambda s, v: slot_softmax(s, v, targets, rows, slots, log_popularity, places), states, items
    )
    ours, our_grads = with_gradients(
        lambda s, v: in_batch_softmax(s, v, targets, rows, slots, log_popularity.float()),
        states.float(),
        items.float(),
    )
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, reference in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-6)


def test_bce_is_the_sum_of_log_odds():
    states = torch.tensor([[1.0, 0.0]])
    items = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 5.0]])
    # -log s(2) - log(1 - s(-1)) - log(1 - s(0)) = log(1 + e^-2) + log(1 + e^-1) + log 2
    expected = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log(2)
    loss = bce(states, items, torch.tensor([1]), torch.tensor([[2, 0]]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_bce_gradient_equals_autograd_of_the_plain_formula():
    torch.manual_seed(2)
    states, items = torch.randn(20, 8).double(), torch.randn(30, 8).double()
    targets, negatives = torch.randint(0, 30, (20,)), torch.randint(0, 30, (20, 3))

    def plain(s, v):
        positive = torch.sigmoid((s * v[targets]).sum(1)).log()
        negative = (1 - torch.sigmoid((s[:, None] * v[negatives]).sum(2))).log()
        return -positive.sum() - negative.sum()

    value, grads = with_gradients(plain, states, items)
    ours, our_grads = with_gradients(
        lambda s, v: bce(s, v, targets, negatives), states.float(), items.float()
    )
    assert ours.item() == pytest.approx(value.item(), rel=1e-6)
    for mine, reference in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=1e-5)


def test_a_loss_without_negatives_is_refused():
    with pytest.raises(UsageError, match=r"loss\.negatives=0"):
        LossConfig(name="bce", negatives=0)
