"""An item tower, a user model and a loss as one module: batch of item ids in, summed loss out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        parts = (self.inputs, self.targets, self.negatives)
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

    def forward(self, batch: Batch) -> Tensor:
        """Loss summed over the batch's real positions; each distinct item is encoded once."""
        items, inputs, targets, negatives = self._distinct(batch)
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
        return in_batch_softmax(
            states, vectors, target, rows, slots.masked_fill(padded, -1), popularity
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
        """Linear layers of both parts, and the products of states and item vectors."""
        for part, rows in ((self.user_model, positions), (self.tower, items)):
            linear = (module for module in part.modules() if isinstance(module, nn.Linear))
            self.flops += 6 * rows * sum(module.weight.numel() for module in linear)
        rivals = 1 + self.loss.negatives if self.loss.name in NEGATIVE_LOSSES else items
        self.flops += 6 * positions * rivals * self.user_model.config.width

    def _distinct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The items a step needs, ascending and 0 first, and the batch as rows of them."""
        if self.loss.name == "full_softmax":
            return self.all_items, batch.inputs, batch.targets, batch.negatives
        parts = (batch.inputs, batch.targets, batch.negatives)
        flat = torch.cat([batch.inputs.new_zeros(1), *(part.flatten() for part in parts)])
        items, places = torch.unique(flat, return_inverse=True)
        inputs, targets, negatives = places[1:].split([part.numel() for part in parts])
        return (
            items,
            inputs.view_as(batch.inputs),
            targets.view_as(batch.targets),
            negatives.view_as(batch.negatives),
        )

    def item_vectors(self) -> Tensor:
        """(N + 1, D), row 0 zero."""
        return self.tower.vectors(self.all_items)

    def user_vectors(self, histories: Tensor, item_vectors: Tensor) -> Tensor:
        """Left-padded histories (B, L) -> user vectors after their last item, (B, D)."""
        states: Tensor = self.user_model(
            F.embedding(histories, item_vectors), histories > 0, last_only=True
        )
        return states[:, -1]
