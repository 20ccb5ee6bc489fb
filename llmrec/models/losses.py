"""Losses as pure functions of states, item vectors and indices.

Each returns the sum over positions, not the mean: only the caller knows how many positions all
processes and accumulated pieces hold together.

P positions, N items, M distinct items of a batch, K negatives, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.errors import UsageError
from llmrec.models.chunked import FullSoftmax, OwnNegatives, ScoresLoss

OWN_NEGATIVES = ("bce", "gbce", "bpr")
"""The losses that may give each position negatives of its own."""
NEGATIVE_LOSSES = ("sampled_softmax", *OWN_NEGATIVES)
USED_BY = {
    "negatives": NEGATIVE_LOSSES,
    "share_negatives": OWN_NEGATIVES,
    "sampler": ("sampled_softmax",),
    "correct_positive": ("sampled_softmax",),
    "calibration": ("gbce",),
    "chunk_megabytes": ("full_softmax", *OWN_NEGATIVES),
}
"""Option -> the losses that read it; set for another one it is refused, not ignored."""
CHUNK_BYTES = 8 << 20
DENSE_ITEMS_PER_NEGATIVE = 24
"""Up to so many items for each of a position's negatives, scoring all of them is the faster way.

The two are equal at 15 to 20 for D 16, 23 to 28 for D 64, 37 to 48 for D 256 (one CPU thread,
1,000 to 12,101 items).
"""


@dataclass(frozen=True)
class LossConfig:
    """What training minimises, averaged over all positions of a step."""

    name: Literal["full_softmax", "in_batch", "sampled_softmax", "bce", "gbce", "bpr"] = (
        "full_softmax"
    )
    """full_softmax: cross-entropy over all items; in_batch: debiased softmax over the items that a
    step meets on all processes (TCF, MoRec), or, with optim.accumulate, one of its pieces;
    sampled_softmax: cross-entropy over the target and K negatives shared by the step, corrected by
    logQ; bce: binary cross-entropy with K negatives (SASRec); gbce: the same calibrated to few
    negatives (gSASRec), both from the odds of K negatives on; bpr: the target before each of K
    negatives (BPR)."""
    positions: Literal["all", "last"] = "all"
    """Of a training row: whether each item is predicted from those before it, or the last one
    alone (CPC)."""
    negatives: int = 1
    """K: negatives per position, or per step where they are shared; sampled_softmax, bce, gbce,
    bpr."""
    share_negatives: bool = False
    """Whether one draw of K serves all positions of a step; bce, gbce, bpr. Else each position has
    its own, never from the user's own training items. sampled_softmax always shares."""
    sampler: Literal["uniform", "popularity"] = "uniform"
    """How sampled_softmax draws its negatives, with replacement: uniformly from all items, or in
    proportion to training counts. Those of bce, gbce and bpr are uniform: nothing corrects them."""
    correct_positive: bool = False
    """sampled_softmax: whether the target's score is corrected by logQ as well. Without, the
    negatives' sum estimates the full softmax's without bias."""
    calibration: float = 0.75
    """gbce's t in [0, 1]: 0 is bce, 1 makes the scores those of a model without sampling."""
    chunk_megabytes: int = CHUNK_BYTES >> 20
    """Largest piece of the logits that full_softmax holds at a time, and of scores or item vectors
    that bce, gbce and bpr hold for negatives of each position's own; 64 is faster for full_softmax
    from 100,000 items on."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed, and what this loss would ignore."""
        for option, losses in USED_BY.items():
            value = getattr(self, option)
            if self.name not in losses and value != LossConfig.__dataclass_fields__[option].default:
                raise UsageError(
                    f"loss.{option}={str(value).lower()} means nothing to loss.name={self.name}. "
                    f"Leave it out, or use {' or '.join(losses)}."
                )
        if self.share_negatives and self.chunk_megabytes != CHUNK_BYTES >> 20:
            raise UsageError(
                f"loss.chunk_megabytes={self.chunk_megabytes} means nothing to negatives that the "
                "step shares. Leave it out, or set loss.share_negatives=false."
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


def full_softmax(
    states: Tensor, items: Tensor, targets: Tensor, chunk_bytes: int = CHUNK_BYTES
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
        loss: Tensor = FullSoftmax.apply(states.float(), items.float(), targets, chunk_bytes)
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


def shared_scores(states: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Scores of K items for all positions; the one that is the target scores -inf: no weight.

    Args:
        states: (P, D) user states.
        items: (M, D) vectors.
        targets: (P,) rows of `items`.
        negatives: (K,) rows of `items`.

    Returns:
        (P, K).
    """
    scores = (states @ F.embedding(negatives, items).T).float()  # (P, D) x (D, K) -> (P, K)
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
    negative = shared_scores(states, items, targets, negatives) - log_expected[negatives]
    logits = torch.cat([positive, negative], dim=1)  # (P, 1 + K)
    return F.cross_entropy(logits, torch.zeros_like(targets), reduction="sum")


def _over_negatives(
    states: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    loss: ScoresLoss,
    chunk_bytes: int,
) -> Tensor:
    """A loss of the scores of targets and negatives; these shared (K,), or (P, K) in chunks."""
    if negatives.dim() == 1:
        positive = (states * F.embedding(targets, items)).sum(-1).float()  # (P,)
        return loss(positive, shared_scores(states, items, targets, negatives))
    dense = len(items) <= DENSE_ITEMS_PER_NEGATIVE * negatives.shape[1]
    chosen = torch.cat([targets[:, None], negatives], dim=1)  # (P, 1 + K)
    with torch.autocast(states.device.type, enabled=False):
        total: Tensor = OwnNegatives.apply(
            states.float(), items.float(), chosen, loss, chunk_bytes, dense
        )
    return total


def bce(
    states: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Sum over positions of -log s(positive) - sum over K of log(1 - s(negative)), as in SASRec.

    s is the logistic function of a score, which starts at the prior's odds of 1 / K.

    Args:
        states: (P, D) user states.
        items: (M, D) vectors.
        targets: (P,) rows of `items`.
        negatives: rows of `items`: (K,) shared, but for a position's own target; or (P, K).
        chunk_bytes: of (P, K) negatives, size of the largest piece of scores or vectors.

    Returns:
        Scalar; with (P, K) negatives first derivatives only, and one backward pass.
    """
    prior = _prior(1.0, negatives)

    def loss(positive: Tensor, negative: Tensor) -> Tensor:
        return F.softplus(-prior - positive).sum() + F.softplus(prior + negative).sum()

    return _over_negatives(states, items, targets, negatives, loss, chunk_bytes)


def _prior(weight: float, negatives: Tensor) -> float:
    """What bce and gbce add to all scores: the log odds of a target that weighs so much among K.

    A model that tells no items apart then begins at its optimum. Else all scores are driven below 0
    first, by a direction that all items and states come to share, and what tells items apart grows
    late: after six epochs on MovieLens 1M (256 negatives, length 50, batches of 64) gbce stood at
    popularity's validation NDCG@10, .021, without this and at .134 with it (one seed). A constant
    moves no ranking, and with one negative bce has none.
    """
    return math.log(weight / negatives.shape[-1])


def gbce_beta(negatives: int, item_count: int, calibration: float) -> float:
    """GSASRec's beta = alpha (t (1 - 1 / alpha) + 1 / alpha), where alpha = K / (N - 1).

    At t = 0 it is 1, which is plain bce; at t = 1 it is alpha, the share of negatives sampled.
    """
    alpha = min(1.0, negatives / max(1, item_count - 1))
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def gbce(
    states: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    beta: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Sum over positions of (-beta log s(positive) - sum over K of log(1 - s(negative))) / (K + 1).

    Raising s(positive) to beta undoes the overconfidence that few negatives teach (Petrov and
    Macdonald 2023).

    Args:
        states: (P, D) user states.
        items: (M, D) vectors.
        targets: (P,) rows of `items`.
        negatives: rows of `items`: (K,) shared, but for a position's own target; or (P, K).
        beta: see `gbce_beta`.
        chunk_bytes: of (P, K) negatives, size of the largest piece of scores or vectors.

    Returns:
        Scalar, as of `bce`.
    """
    prior = _prior(beta, negatives)

    def loss(positive: Tensor, negative: Tensor) -> Tensor:
        total = beta * F.softplus(-prior - positive).sum() + F.softplus(prior + negative).sum()
        return total / (negatives.shape[-1] + 1)

    return _over_negatives(states, items, targets, negatives, loss, chunk_bytes)


def bpr(
    states: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Sum over positions of the mean over K of -log s(positive - negative).

    Bayesian personalised ranking (Rendle et al. 2009), without its penalty on the vectors. A shared
    negative that is the target weighs nothing, and still counts among the K.

    Args:
        states: (P, D) user states.
        items: (M, D) vectors.
        targets: (P,) rows of `items`.
        negatives: rows of `items`: (K,) shared, but for a position's own target; or (P, K).
        chunk_bytes: of (P, K) negatives, size of the largest piece of scores or vectors.

    Returns:
        Scalar, as of `bce`.
    """

    def loss(positive: Tensor, negative: Tensor) -> Tensor:
        return F.softplus(negative - positive[:, None]).sum() / negatives.shape[-1]

    return _over_negatives(states, items, targets, negatives, loss, chunk_bytes)
