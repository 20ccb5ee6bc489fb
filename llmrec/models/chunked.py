"""Losses over many scores, a chunk of positions at a time, with gradients made in the forward pass.

So memory is bounded by a chunk, and a chunk's scores are made once. First derivatives only, and one
backward pass: it scales the gradients in place.

P positions, N items, K negatives, D width, c positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ScoresLoss = Callable[[Tensor, Tensor], Tensor]
"""Scores of the targets (P,) and of their negatives (P, K) -> scalar, a sum over P."""


class FullSoftmax(torch.autograd.Function):
    """Cross-entropy over all items in chunks of positions; gradients are made in the forward pass.

    With E = exp(S - max) and Z its row sums, d/d states = E V / Z - V[target] and d/d items =
    E' (states / Z) - ..., so the (P, N) matrix is neither stored nor normalised: a chunk's (c, N)
    piece is read once for each product.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, items: Tensor, targets: Tensor, chunk_bytes: int
    ) -> Tensor:
        """See `losses.full_softmax`."""
        rows = max(1, min(len(states), chunk_bytes // (4 * len(items))))
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
        """Of states and items."""
        grad_states, grad_items = ctx.saved_tensors  # scaled in place: no second (N, D)
        return grad_states.mul_(grad_output), grad_items.mul_(grad_output), None, None


class OwnNegatives(torch.autograd.Function):
    """A loss over K negatives of each position's own, in chunks, its gradients made in the forward.

    Either a chunk's (c, N) scores of all items are made, 1 + K of each row picked, and the loss's
    derivatives put back among zeros, so that every step is a matrix product; or its (c, 1 + K, D)
    vectors are gathered, which is less work where items are many and negatives few.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        items: Tensor,
        chosen: Tensor,
        loss: ScoresLoss,
        chunk_bytes: int,
        dense: bool,
    ) -> Tensor:
        """The loss of P positions.

        Args:
            ctx: autograd's.
            states: (P, D) user states.
            items: (N, D) vectors.
            chosen: (P, 1 + K) rows of `items`, each position's target and its negatives.
            loss: of their scores.
            chunk_bytes: size of the largest piece of scores or vectors.
            dense: whether all items are scored.

        Returns:
            Scalar.
        """
        row_floats = len(items) if dense else chosen.shape[1] * items.shape[1]
        rows = max(1, min(len(states), chunk_bytes // (4 * row_floats)))
        grad_states = torch.empty_like(states)
        grad_items = torch.zeros_like(items)
        buffer = states.new_empty(rows if dense else 0, len(items))
        total = states.new_zeros((), dtype=torch.float64)
        for start in range(0, len(states), rows):
            piece, places = states[start : start + rows], chosen[start : start + rows]
            grad = grad_states[start : start + rows]
            if dense:
                all_scores = torch.mm(piece, items.T, out=buffer[: len(piece)])  # (c, N)
                value, slopes = _slopes(all_scores.gather(1, places), loss)
                all_scores.zero_().scatter_add_(1, places, slopes)  # an item drawn twice counts so
                torch.mm(all_scores, items, out=grad)
                grad_items.addmm_(all_scores.T, piece)
            else:
                vectors = F.embedding(places, items)  # (c, 1 + K, D)
                value, slopes = _slopes((vectors @ piece[:, :, None])[:, :, 0], loss)
                torch.bmm(slopes[:, None], vectors, out=grad[:, None])
                torch.mul(slopes[:, :, None], piece[:, None], out=vectors)
                grad_items.index_add_(0, places.flatten(), vectors.flatten(0, 1))
            total += value
        ctx.save_for_backward(grad_states, grad_items)
        return total.to(states.dtype)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Of states and items."""
        grad_states, grad_items = ctx.saved_tensors
        return grad_states.mul_(grad_output), grad_items.mul_(grad_output), None, None, None, None


def _slopes(scores: Tensor, loss: ScoresLoss) -> tuple[Tensor, Tensor]:
    """A loss of scores (c, 1 + K), the targets' first, and its derivative by them."""
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        value = loss(leaf[:, 0], leaf[:, 1:])
    return value.detach(), torch.autograd.grad(value, leaf)[0]
