"""An item tower, a user model and a loss as one module: batch of item ids in, summed loss out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.data.interactions import Int64
from llmrec.encoders.tower import ItemTower
from llmrec.models.losses import (
    NEGATIVE_LOSSES,
    LossConfig,
    bce,
    full_softmax,
    gbce,
    gbce_beta,
    in_batch_softmax,
    sampled_softmax,
)
from llmrec.models.sasrec import SASRec


@dataclass(frozen=True)
class Batch:
    """Left-padded training windows as item ids; 0 is padding."""

    inputs: Tensor
    """(B, L) int64."""
    targets: Tensor
    """(B, L) int64, the item after each input."""
    negatives: Tensor
    """int64, (B, L, K) or, shared by all positions, (K,); K is 0 where the loss samples none."""
    items: Tensor
    """(M,) int64, the distinct ids of all these and, where processes share items, of what the
    others hold: ascending, 0 first."""
    multiplicity: Tensor
    """(M,) int64, how often each fills a slot, an input or a row's last target, on all of them."""

    @classmethod
    def of(
        cls,
        inputs: Int64,
        targets: Int64,
        negatives: Int64,
        everyone: tuple[Int64, Int64, Int64] | None = None,
    ) -> Batch:
        """A batch of its own, or a process's part of one.

        Args:
            inputs: (B, L).
            targets: (B, L).
            negatives: (B, L, K) or (K,).
            everyone: the same three for all processes together, where they share items.
        """
        all_inputs, all_targets, all_negatives = everyone or (inputs, targets, negatives)
        slots = np.concatenate([all_inputs.ravel(), all_targets[:, -1]])
        items = np.unique(np.concatenate([np.zeros(1, np.int64), slots, all_negatives.ravel()]))
        multiplicity = np.bincount(np.searchsorted(items, slots[slots > 0]), minlength=len(items))
        parts = (inputs, targets, negatives, items, multiplicity)
        return cls(*(torch.from_numpy(part) for part in parts))

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        parts = (self.inputs, self.targets, self.negatives, self.items, self.multiplicity)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


class Recommender(nn.Module):
    """Dot-product recommender: score = user state . item vector."""

    log_popularity: Tensor
    all_items: Tensor

    def __init__(
        self, tower: ItemTower, user_model: SASRec, loss: LossConfig, popularity: Tensor
    ) -> None:
        """`popularity` (N + 1,): training counts of the items, for the in-batch correction."""
        super().__init__()
        self.tower, self.user_model, self.loss = tower, user_model, loss
        share = popularity.clamp(min=1).float()  # an item never trained on is in no batch
        self.register_buffer(
            "log_popularity", (share / popularity.sum().clamp(min=1)).log(), persistent=False
        )
        self.flops = 0
        """Of training steps so far: 6 per weight and row it meets (forward 2, backward 4)."""
        self.register_buffer("all_items", torch.arange(len(popularity)), persistent=False)

    @property
    def shares_items(self) -> bool:
        """Whether a step looks at the items of all processes together.

        In-batch negatives do, and a tuned language model, which each item meets once.
        """
        return self.loss.name == "in_batch" or self.tower.language_model is not None

    def forward(self, batch: Batch) -> Tensor:
        """Loss summed over the batch's real positions; each distinct item is encoded once."""
        items, inputs, targets, negatives = self._places(batch)
        vectors = self.tower.vectors(items)  # (M, D); row 0 is padding
        states = self.user_model(F.embedding(inputs, vectors), batch.inputs > 0)  # (B, L, D)
        real = batch.targets > 0
        states, target = states[real], targets[real]  # (P, D), (P,)
        self._count_flops(len(states), len(items))
        if self.loss.name == "full_softmax":
            return full_softmax(states, vectors[1:], target - 1, self.loss.chunk_megabytes << 20)
        if self.loss.name in NEGATIVE_LOSSES:
            sampled = negatives if self.loss.shares else negatives[real]  # (K,) or (P, K)
            return self._sampled(states, vectors, target, sampled, items)
        slots = torch.cat([inputs, targets[:, -1:]], dim=1)  # (B, L + 1)
        padded = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1) == 0
        rows = torch.arange(len(slots), device=slots.device)[:, None].expand_as(inputs)[real]
        popularity = self.log_popularity[items]
        slots = slots.masked_fill(padded, -1)
        return in_batch_softmax(
            states, vectors, target, rows, slots, batch.multiplicity, popularity
        )

    def _sampled(
        self, states: Tensor, vectors: Tensor, target: Tensor, negatives: Tensor, items: Tensor
    ) -> Tensor:
        """The losses over K negatives; `items` (M,) are the ids behind `vectors`."""
        count, catalogue = negatives.shape[-1], len(self.all_items) - 1
        if self.loss.name == "bce":
            return bce(states, vectors, target, negatives)
        if self.loss.name == "gbce":
            beta = gbce_beta(count, catalogue, self.loss.calibration)
            return gbce(states, vectors, target, negatives, beta)
        share = torch.full_like(self.log_popularity[items], -math.log(catalogue))
        if self.loss.sampler == "popularity":
            share = self.log_popularity[items]
        expected = share + math.log(count)  # (M,)
        return sampled_softmax(
            states, vectors, target, negatives, expected, self.loss.correct_positive
        )

    def _count_flops(self, positions: int, items: int) -> None:
        """Linear layers of both parts, and the products of states and item vectors.

        A language model that learns counts its own.
        """
        language = self.tower.language_model
        inside = set() if language is None else set(language.modules())
        for part, rows in ((self.user_model, positions), (self.tower, items)):
            linear = (m for m in part.modules() if isinstance(m, nn.Linear) and m not in inside)
            self.flops += 6 * rows * sum(module.weight.numel() for module in linear)
        if language is not None:
            self.flops, language.flops = self.flops + language.flops, 0
        rivals = 1 + self.loss.negatives if self.loss.name in NEGATIVE_LOSSES else items
        self.flops += 6 * positions * rivals * self.user_model.config.width

    def _places(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The items a step needs, ascending and 0 first, and the batch as rows of them."""
        parts = (batch.inputs, batch.targets, batch.negatives)
        if self.loss.name == "full_softmax":
            return self.all_items, *parts
        inputs, targets, negatives = (
            torch.searchsorted(batch.items, part.contiguous()) for part in parts
        )
        return batch.items, inputs, targets, negatives

    def item_vectors(self) -> Tensor:
        """(N + 1, D), row 0 zero."""
        return self.tower.vectors(self.all_items)

    def user_vectors(self, histories: Tensor, item_vectors: Tensor) -> Tensor:
        """Left-padded histories (B, L) -> user vectors after their last item, (B, D)."""
        states: Tensor = self.user_model(
            F.embedding(histories, item_vectors), histories > 0, last_only=True
        )
        return states[:, -1]
