"""Losses as pure functions of states, item vectors and indices.

Each returns the sum over positions, not the mean: only the caller knows how many positions all
processes and accumulated pieces hold together.

P positions, N items, M distinct items of a batch, K negatives, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.errors import UsageError


@dataclass(frozen=True)
class LossConfig:
    """What training minimises, averaged over all positions of a step."""

    name: Literal["full_softmax", "in_batch", "bce"] = "full_softmax"
    """full_softmax: cross-entropy over all items; in_batch: debiased softmax over the items that a
    process meets in one piece of a step (TCF, MoRec), so optim.accumulate and the number of
    processes change it; bce: binary cross-entropy with uniform negatives per position (SASRec)."""
    negatives: int = 1
    """K, uniform negatives per position; used by bce alone."""
    chunk_megabytes: int = 8
    """Largest piece of the logits that full_softmax holds at a time; 64 is faster from 100,000
    items on."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        if self.negatives < 1:
            raise UsageError(f"loss.negatives={self.negatives} must be at least 1.")
        if self.chunk_megabytes < 1:
            raise UsageError(f"loss.chunk_megabytes={self.chunk_megabytes} must be at least 1.")


class _FullSoftmax(torch.autograd.Function):
    """Cross-entropy over all items in chunks of positions; gradients are made in the forward pass.

    With E = exp(S - max) and Z its row sums, d/d states = E V / Z - V[target] and d/d items =
    E' (states / Z) - ..., so the (P, N) matrix is neither stored nor normalised: a chunk's (c, N)
    piece is read once for each product.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, items: Tensor, targets: Tensor, chunk_bytes: int
    ) -> Tensor:
        rows = min(len(states), max(1, chunk_bytes // (4 * len(items))))
        grad_states = torch.empty_like(states)
        grad_items = torch.zeros_like(items)
        logits_buffer = states.new_empty(rows, len(items))
        total = states.new_zeros((), dtype=torch.float64)
        for start in range(0, len(states), rows):
            piece, target = states[start : start + rows], targets[start : start + rows, None]
            logits = logits_buffer[: len(piece)]
            torch.mm(piece, items.T, out=logits)  # (c, D) x (D, N) -> (c, N)
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, target)  # (c, 1)
            normaliser = logits.exp_().sum(dim=1, keepdim=True)
            total += (normaliser.log() - chosen).sum()
            torch.mm(logits, items, out=grad_states[start : start + rows])
            grad_states[start : start + rows] /= normaliser
            grad_items.addmm_(logits.T, piece / normaliser)
        grad_states -= items[targets]
        grad_items.index_add_(0, targets, states, alpha=-1)
        ctx.save_for_backward(grad_states, grad_items)
        return total.to(states.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_states, grad_items = ctx.saved_tensors  # scaled in place: no second (N, D)
        return grad_states.mul_(grad_output), grad_items.mul_(grad_output), None, None


def full_softmax(
    states: Tensor, items: Tensor, targets: Tensor, chunk_bytes: int = 8 << 20
) -> Tensor:
    """Sum of cross-entropies over all N items, in memory bounded by a chunk however large N is.

    Args:
        states: (P, D) user states.
        items: (N, D) vectors of all candidates.
        targets: (P,) rows of `items`.
        chunk_bytes: size of the largest piece of the logits.

    Returns:
        Scalar; first derivatives only, and one backward pass.
    """
    with torch.autocast(states.device.type, enabled=False):
        loss: Tensor = _FullSoftmax.apply(states.float(), items.float(), targets, chunk_bytes)
    return loss


def in_batch_softmax(
    states: Tensor,
    items: Tensor,
    targets: Tensor,
    rows: Tensor,
    slots: Tensor,
    log_popularity: Tensor,
) -> Tensor:
    """Sum of debiased in-batch cross-entropies (TCF and MoRec), over distinct items, not slots.

    There, every slot of the batch is a column: logit = score - log p(item), and columns that hold
    an item of the position's own sequence are masked, but for the label. An item outside the own
    sequence therefore stands in as many columns as the batch has slots of it: here one column with
    + log(slots). The label counts once. Loss and gradient equal the duplicated form's.

    Args:
        states: (P, D) user states.
        items: (M, D) vectors of the batch's distinct items.
        targets: (P,) rows of `items`.
        rows: (P,) the sequence of each position.
        slots: (B, S) rows of `items` for every slot, inputs and targets alike; negative where
            padded.
        log_popularity: (M,) log of each item's share of training interactions.

    Returns:
        Scalar.
    """
    real = slots >= 0
    multiplicity = torch.zeros(len(items), device=items.device)
    multiplicity.index_add_(0, slots[real], torch.ones_like(slots[real], dtype=multiplicity.dtype))
    own = torch.zeros(len(slots), len(items) + 1, dtype=torch.bool, device=items.device)
    own.scatter_(1, torch.where(real, slots, len(items)), True)  # the last column takes the padding
    blocked = own[rows, :-1]  # (P, M)
    blocked[:, multiplicity == 0] = True
    blocked.scatter_(1, targets[:, None], False)
    logits = (states @ items.T).float() - log_popularity  # (P, D) x (D, M) -> (P, M)
    label = logits.gather(1, targets[:, None])
    logits = (logits + multiplicity.log()).scatter(
        1, targets[:, None], label
    )  # the label counts once
    return F.cross_entropy(logits.masked_fill(blocked, -torch.inf), targets, reduction="sum")


def bce(states: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Sum over positions of -log s(positive) - sum over K of log(1 - s(negative)), as in SASRec.

    s is the logistic function.

    Args:
        states: (P, D) user states.
        items: (M, D) vectors.
        targets: (P,) rows of `items`.
        negatives: (P, K) rows of `items`.

    Returns:
        Scalar.
    """
    positive = (states * F.embedding(targets, items)).sum(-1)  # (P,)
    negative = torch.einsum("pd,pkd->pk", states, F.embedding(negatives, items))  # (P, K)
    return F.softplus(-positive.float()).sum() + F.softplus(negative.float()).sum()
