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

NEGATIVE_LOSSES = ("sampled_softmax", "bce", "gbce")
USED_BY = {
    "negatives": NEGATIVE_LOSSES,
    "share_negatives": ("bce", "gbce"),
    "sampler": ("sampled_softmax",),
    "correct_positive": ("sampled_softmax",),
    "calibration": ("gbce",),
    "chunk_megabytes": ("full_softmax",),
}
"""Option -> the losses that read it; set for another one it is refused, not ignored."""


@dataclass(frozen=True)
class LossConfig:
    """What training minimises, averaged over all positions of a step."""

    name: Literal["full_softmax", "in_batch", "sampled_softmax", "bce", "gbce"] = "full_softmax"
    """full_softmax: cross-entropy over all items; in_batch: debiased softmax over the items that a
    step meets on all processes (TCF, MoRec), or, with optim.accumulate, one of its pieces;
    sampled_softmax: cross-entropy over the target and K negatives shared by the step, corrected by
    logQ; bce: binary cross-entropy with K negatives (SASRec); gbce: the same calibrated to few
    negatives (gSASRec). With many negatives these two start slowly and want more epochs than a
    softmax."""
    negatives: int = 1
    """K: negatives per position, or per step where they are shared; sampled_softmax, bce, gbce."""
    share_negatives: bool = False
    """Whether one draw of K serves all positions of a step; bce and gbce. Else each position has
    its own, never from the user's own training items. sampled_softmax always shares."""
    sampler: Literal["uniform", "popularity"] = "uniform"
    """How sampled_softmax draws its negatives, with replacement: uniformly from all items, or in
    proportion to training counts. Those of bce and gbce are uniform: nothing corrects them."""
    correct_positive: bool = False
    """sampled_softmax: whether the target's score is corrected by logQ as well. Without, the
    negatives' sum estimates the full softmax's without bias."""
    calibration: float = 0.75
    """gbce's t in [0, 1]: 0 is bce, 1 makes the scores those of a model without sampling."""
    chunk_megabytes: int = 8
    """Largest piece of the logits that full_softmax holds at a time; 64 is faster from 100,000
    items on."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed, and what this loss would ignore."""
        for option, losses in USED_BY.items():
            value = getattr(self, option)
            if self.name not in losses and value != LossConfig.__dataclass_fields__[option].default:
                raise UsageError(
                    f"loss.{option}={str(value).lower()} means nothing to loss.name={self.name}. "
                    f"Leave it out, or use {' or '.join(losses)}."
                )
        if self.negatives < 1:
            raise UsageError(f"loss.negatives={self.negatives} must be at least 1.")
        if self.chunk_megabytes < 1:
            raise UsageError(f"loss.chunk_megabytes={self.chunk_megabytes} must be at least 1.")
        if not 0 <= self.calibration <= 1:
            raise UsageError(f"loss.calibration={self.calibration} must lie in [0, 1].")

    @property
    def shares(self) -> bool:
        """Whether the K negatives are one draw for the whole step."""
        return self.share_negatives or self.name == "sampled_softmax"


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
    multiplicity: Tensor,
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
        slots: (B, S) rows of `items` for every slot of these sequences, inputs and targets alike;
            negative where padded.
        multiplicity: (M,) slots of each item in the whole batch, which may be larger: other
            processes' sequences are columns too.
        log_popularity: (M,) log of each item's share of training interactions.

    Returns:
        Scalar.
    """
    real = slots >= 0
    own = torch.zeros(len(slots), len(items) + 1, dtype=torch.bool, device=items.device)
    own.scatter_(1, torch.where(real, slots, len(items)), True)  # the last column takes the padding
    blocked = own[rows, :-1]  # (P, M)
    blocked[:, multiplicity == 0] = True
    blocked.scatter_(1, targets[:, None], False)
    logits = (states @ items.T).float() - log_popularity  # (P, D) x (D, M) -> (P, M)
    label = logits.gather(1, targets[:, None])
    logits = (logits + multiplicity.float().log()).scatter(
        1, targets[:, None], label
    )  # the label counts once
    return F.cross_entropy(logits.masked_fill(blocked, -torch.inf), targets, reduction="sum")


def negative_scores(states: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Scores of sampled items; a shared one that is the target scores -inf and weighs nothing.

    Args:
        states: (P, D) user states.
        items: (M, D) vectors.
        targets: (P,) rows of `items`.
        negatives: rows of `items`: (K,) shared by all positions, or (P, K).

    Returns:
        (P, K).
    """
    vectors = F.embedding(negatives, items)
    if negatives.dim() == 2:
        return torch.einsum("pd,pkd->pk", states, vectors).float()
    scores = (states @ vectors.T).float()  # (P, D) x (D, K) -> (P, K)
    return scores.masked_fill(negatives == targets[:, None], -torch.inf)


def sampled_softmax(
    states: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_expected: Tensor,
    correct_positive: bool,
) -> Tensor:
    """Sum of cross-entropies between the target and K sampled items, corrected by logQ.

    A negative drawn from q with replacement counts e^s / (K q), so the sum over the K estimates,
    without bias, that of e^s over all items but the target (Bengio and Senecal 2008). Some
    libraries correct the target's score too, as if it had been sampled: `correct_positive`.

    Args:
        states: (P, D) user states.
        items: (M, D) vectors.
        targets: (P,) rows of `items`.
        negatives: (K,) rows of `items`, drawn with replacement; equal to the target: masked.
        log_expected: (M,) log of how often each item is expected among K draws, log(K q).
        correct_positive: whether `log_expected` is taken from the target's score.

    Returns:
        Scalar.
    """
    positive = (states * F.embedding(targets, items)).sum(-1, keepdim=True).float()  # (P, 1)
    if correct_positive:
        positive = positive - log_expected[targets, None]
    negative = negative_scores(states, items, targets, negatives) - log_expected[negatives]
    logits = torch.cat([positive, negative], dim=1)  # (P, 1 + K)
    return F.cross_entropy(logits, torch.zeros_like(targets), reduction="sum")


def bce(states: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Sum over positions of -log s(positive) - sum over K of log(1 - s(negative)), as in SASRec.

    s is the logistic function.

    Args:
        states: (P, D) user states.
        items: (M, D) vectors.
        targets: (P,) rows of `items`.
        negatives: rows of `items`: (K,) shared, but for a position's own target; or (P, K).

    Returns:
        Scalar.
    """
    positive = (states * F.embedding(targets, items)).sum(-1)  # (P,)
    negative = negative_scores(states, items, targets, negatives)
    return F.softplus(-positive.float()).sum() + F.softplus(negative).sum()


def gbce_beta(negatives: int, item_count: int, calibration: float) -> float:
    """GSASRec's beta = alpha (t (1 - 1 / alpha) + 1 / alpha), where alpha = K / (N - 1).

    At t = 0 it is 1, which is plain bce; at t = 1 it is alpha, the share of negatives sampled.
    """
    alpha = min(1.0, negatives / max(1, item_count - 1))
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def gbce(states: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, beta: float) -> Tensor:
    """Sum over positions of (-beta log s(positive) - sum over K of log(1 - s(negative))) / (K + 1).

    Raising s(positive) to beta undoes the overconfidence that few negatives teach (Petrov and
    Macdonald 2023).

    Args:
        states: (P, D) user states.
        items: (M, D) vectors.
        targets: (P,) rows of `items`.
        negatives: rows of `items`: (K,) shared, but for a position's own target; or (P, K).
        beta: see `gbce_beta`.

    Returns:
        Scalar.
    """
    positive = (states * F.embedding(targets, items)).sum(-1)  # (P,)
    negative = negative_scores(states, items, targets, negatives)
    total = beta * F.softplus(-positive.float()).sum() + F.softplus(negative).sum()
    return total / (negatives.shape[-1] + 1)
