"""What user models have in common: how they are trained, and how a recommender asks them.

A user model meets items as vectors alone, so that any item tower goes with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from llmrec.data.batches import Objective
from llmrec.data.interactions import Int64, Interactions
from llmrec.models.config import UserModelConfig


@dataclass(frozen=True)
class TrainingPairs:
    """Who had what: all that a model without order learns from."""

    user_count: int
    """U."""
    item_count: int
    """N."""
    users: Int64
    """Of each training interaction, (T,), from 0 on."""
    items: Int64
    """Its item, (T,), 1..N."""

    @classmethod
    def of(cls, interactions: Interactions, train_end: Int64, item_count: int) -> TrainingPairs:
        """The interactions before `train_end` (U,), repeats included."""
        users = interactions.users().astype(np.int64)
        trained = np.arange(len(users)) < train_end[users]
        items = interactions.items[trained].astype(np.int64)
        return cls(interactions.user_count, item_count, users[trained], items)


class SequenceModel(nn.Module, ABC):
    """Reads histories, so it serves users it was never trained on."""

    objective: ClassVar[Objective] = "next"
    """What a training row asks for: the item after each one, or masked ones."""
    candidates: nn.Module
    """What item vectors pass before they are scored, (M, D) -> (M, D): most models leave them as
    they are."""

    def __init__(self, config: UserModelConfig) -> None:
        """Items are scored as the tower gives them."""
        super().__init__()
        self.config = config
        self.candidates = nn.Identity()

    @abstractmethod
    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Training states.

        Args:
            x: (B, L, D) item vectors, left padded, L at most ``max_length``.
            real: (B, L) bool, False where padded.

        Returns:
            (B, L, D), the state whose product with an item's vector is its score at that position;
            states of padded positions mean nothing.
        """

    @abstractmethod
    def last(self, x: Tensor, real: Tensor) -> Tensor:
        """User vectors after the whole of each history, (B, D); arguments as of `forward`."""

    def hide(self, x: Tensor, masked: Tensor) -> Tensor:
        """Put the mask's vector in the place of masked items: x (B, L, D), masked (B, L) bool."""
        raise NotImplementedError(f"{type(self).__name__} is not trained on masked items.")


class KnownUserModel(nn.Module, ABC):
    """Knows a user by ID alone, whatever the history; serves users of its training data only.

    A user of the data without a training interaction, as a temporal split may have, is nobody to
    it: all items then score the same, so that such a case does as well as at random.
    """

    objective: ClassVar[Objective] = "user"
    whole_catalogue: ClassVar[bool] = False
    """Whether a user's vector depends on all items', so that a step needs them all."""
    known: Tensor
    """(U,) bool, who has a training interaction."""
    candidates: nn.Module
    """What item vectors pass on their way to a score, (M, D) -> (M, D)."""

    def __init__(self, config: UserModelConfig, pairs: TrainingPairs) -> None:
        """The options, and the U users there are to know; items are scored as they come."""
        super().__init__()
        self.config = config
        known = torch.zeros(pairs.user_count, dtype=torch.bool)
        known[torch.from_numpy(pairs.users)] = True
        self.register_buffer("known", known, persistent=False)
        self.candidates = nn.Identity()

    @abstractmethod
    def forward(self, users: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of the scores.

        Args:
            users: (B,) int64, users of the training data from 0 on.
            vectors: (M, D) item vectors; of the whole catalogue, row 0 padding, where
                `whole_catalogue`.

        Returns:
            (B, D) user vectors and (M, D) what their products with are the scores.
        """

    def graph_flops(self) -> int:
        """Of one training step, beyond linear layers."""
        return 0
