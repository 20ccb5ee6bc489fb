"""An item tower, a user model and a loss as one module: batch of item ids in, summed loss out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.data.batches import Examples
from llmrec.data.interactions import Int64
from llmrec.encoders.tower import ItemTower
from llmrec.errors import UsageError
from llmrec.models.losses import (
    NEGATIVE_LOSSES,
    LossConfig,
    bce,
    bpr,
    full_softmax,
    gbce,
    gbce_beta,
    in_batch_softmax,
    sampled_softmax,
)
from llmrec.models.user_model import KnownUserModel, SequenceModel


@dataclass(frozen=True)
class Batch:
    """Training examples as tensors of item ids, left padded; 0 is padding."""

    users: Tensor
    """(B,) int64, from 0 on."""
    inputs: Tensor
    """(B, L) int64; 0 behind a mask too."""
    targets: Tensor
    """(B, L) int64, what is asked for at each place; 0 where nothing is."""
    masked: Tensor
    """(B, L) bool, where a mask stands."""
    sequences: Tensor
    """(B, S) int64, the rows' own items: every input and target once."""
    negatives: Tensor
    """int64, (B, L, K) or, shared by all positions, (K,); K is 0 where the loss samples none."""
    items: Tensor
    """(M,) int64, the distinct ids of all these and, where processes share items, of what the
    others hold: ascending, 0 first."""
    multiplicity: Tensor
    """(M,) int64, how often each fills a place of a sequence, on all of them."""

    @classmethod
    def of(
        cls, examples: Examples, negatives: Int64, everyone: tuple[Int64, Int64] | None = None
    ) -> Batch:
        """A batch of its own, or a process's part of one.

        Args:
            examples: B of them.
            negatives: (B, L, K) or (K,).
            everyone: sequences and negatives of all processes together, where they share items.
        """
        sequences, sampled = everyone or (examples.sequences, negatives)
        slots = sequences.ravel()
        width = 1 + max(int(slots.max(initial=0)), int(sampled.max(initial=0)))
        times = np.bincount(slots, minlength=width)
        times[0] = 0  # padding
        held = (times + np.bincount(sampled.ravel(), minlength=width)) > 0
        held[0] = True
        items = np.flatnonzero(held)
        multiplicity = times[items]
        known = (examples.users, examples.inputs, examples.targets, examples.masked)
        parts = (*known, examples.sequences, negatives, items, multiplicity)
        return cls(*(torch.from_numpy(part) for part in parts))

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        parts = (getattr(self, field.name) for field in fields(self))
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


class Recommender(nn.Module):
    """Dot-product recommender: score = user state . item vector."""

    log_popularity: Tensor
    all_items: Tensor

    def __init__(
        self,
        tower: ItemTower,
        user_model: SequenceModel | KnownUserModel,
        loss: LossConfig,
        popularity: Tensor,
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
        """Loss summed over the batch's targets; each distinct item is encoded once."""
        items, places = self._places(batch)
        vectors = self.tower.vectors(items)  # (M, D); row 0 is padding
        states, candidates = self._states(batch, places(batch.inputs), vectors)
        asked = batch.targets > 0
        states, target = states[asked], places(batch.targets[asked])  # (P, D), (P,)
        self._count_flops(batch, len(states), len(items))
        if self.loss.name == "full_softmax":
            return full_softmax(states, candidates[1:], target - 1, self.loss.chunk_megabytes << 20)
        if self.loss.name in NEGATIVE_LOSSES:
            sampled = batch.negatives if self.loss.shares else batch.negatives[asked]
            return self._sampled(states, candidates, target, places(sampled), items)
        rows = torch.arange(len(asked), device=asked.device)[:, None].expand_as(asked)[asked]
        slots = places(batch.sequences).masked_fill(batch.sequences == 0, -1)
        multiplicity = batch.multiplicity
        if items is self.all_items:
            multiplicity = torch.zeros_like(items).index_copy(0, batch.items, multiplicity)
        return in_batch_softmax(
            states, candidates, target, rows, slots, multiplicity, self.log_popularity[items]
        )

    def _states(self, batch: Batch, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, L, D), whose products with the candidates' vectors (M, D) are scores."""
        model = self.user_model
        if isinstance(model, KnownUserModel):
            users, candidates = model(batch.users, vectors)  # (B, D), (M, D)
            return users[:, None].expand(*batch.targets.shape, -1), candidates
        x = F.embedding(inputs, vectors)
        if model.objective == "masked":
            x = model.hide(x, batch.masked)
        return model(x, (batch.inputs > 0) | batch.masked), model.candidates(vectors)

    def _sampled(
        self, states: Tensor, vectors: Tensor, target: Tensor, negatives: Tensor, items: Tensor
    ) -> Tensor:
        """The losses over K negatives; `items` (M,) are the ids behind `vectors`."""
        count, catalogue = negatives.shape[-1], len(self.all_items) - 1
        chunk = self.loss.chunk_megabytes << 20
        if self.loss.name == "bce":
            return bce(states, vectors, target, negatives, chunk)
        if self.loss.name == "bpr":
            return bpr(states, vectors, target, negatives, chunk)
        if self.loss.name == "gbce":
            beta = gbce_beta(count, catalogue, self.loss.calibration)
            return gbce(states, vectors, target, negatives, beta, chunk)
        share = torch.full_like(self.log_popularity[items], -math.log(catalogue))
        if self.loss.sampler == "popularity":
            share = self.log_popularity[items]
        expected = share + math.log(count)  # (M,)
        return sampled_softmax(
            states, vectors, target, negatives, expected, self.loss.correct_positive
        )

    def _count_flops(self, batch: Batch, positions: int, items: int) -> None:
        """Matrices of both parts by what passes them, and the products with item vectors.

        A language model that learns counts its own. Attention's products, which are small beside
        these, are left out.
        """
        language, model = self.tower.language_model, self.user_model
        inside = set() if language is None else set(language.modules())
        rows = int(((batch.inputs > 0) | batch.masked).sum())
        if isinstance(model, KnownUserModel):
            rows = len(batch.users)
            self.flops += model.graph_flops()
        passed: list[tuple[nn.Module, int, set[nn.Module]]] = [
            (self.tower, items, inside),
            (model, rows, set(model.candidates.modules())),
            (model.candidates, items, set()),
        ]
        for part, count, other in passed:
            self.flops += 6 * count * matrix_weights(part, other)
        if language is not None:
            self.flops, language.flops = self.flops + language.flops, 0
        rivals = 1 + self.loss.negatives if self.loss.name in NEGATIVE_LOSSES else items
        self.flops += 6 * positions * rivals * model.config.width

    def _places(self, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The items a step needs, ascending and 0 first, and ids -> rows of them."""
        model = self.user_model
        whole = isinstance(model, KnownUserModel) and model.whole_catalogue
        if whole or self.loss.name == "full_softmax":
            return self.all_items, lambda ids: ids
        rows = torch.empty_like(
            self.all_items
        )  # a search among sorted ids takes nine times as long
        rows[batch.items] = self.all_items[: len(batch.items)]
        return batch.items, lambda ids: rows[ids]

    def item_vectors(self) -> Tensor:
        """What the user model reads of each item: (N + 1, D), row 0 zero."""
        return self.tower.vectors(self.all_items)

    def candidates(self, item_vectors: Tensor) -> Tensor:
        """What a user vector's products with are the scores, (N + 1, D)."""
        model = self.user_model
        if isinstance(model, KnownUserModel):
            found: Tensor = model(self.all_items[:0], item_vectors)[1]
            return found
        found = model.candidates(item_vectors)
        return found

    def user_vectors(
        self, histories: Tensor, item_vectors: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """User vectors after the last item of each history, (B, D).

        Args:
            histories: (B, L) item ids, left padded.
            item_vectors: as `item_vectors` gives them.
            users: (B,), users of the data; None: histories of others. Of a user whom the model
                knows by ID and never met in training, the vector is 0.

        Raises:
            UsageError: The model knows users by ID alone, and there is none.
        """
        model = self.user_model
        if isinstance(model, SequenceModel):
            return model.last(F.embedding(histories, item_vectors), histories > 0)
        if users is None:
            raise UsageError(
                f"model.name={model.config.name} knows the users of its training data by ID and "
                "reads no history, so it cannot serve a new one. Use model.name=dssm_history, or "
                "another model that reads histories."
            )
        needed = item_vectors if model.whole_catalogue else item_vectors[:0]
        found: Tensor = model(users, needed)[0]
        return found.masked_fill(~model.known[users, None], 0.0)


def matrix_weights(module: nn.Module, other: Collection[nn.Module] = ()) -> int:
    """Weights of the matrices that a row meets once each: linear, recurrent, convolutional.

    Args:
        module: what the row passes.
        other: modules in it that are left out.
    """
    kinds = (nn.Linear, nn.GRU, nn.Conv2d)
    parts = [part for part in module.modules() if isinstance(part, kinds) and part not in other]
    return sum(w.numel() for part in parts for w in part.parameters() if w.dim() > 1)
