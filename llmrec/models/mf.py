"""Matrix factorisation: a learned vector for each user, whose products with items' are scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.models.config import UserModelConfig
from llmrec.models.user_model import KnownUserModel, TrainingPairs


class MatrixFactorisation(KnownUserModel):
    """User and item vectors as they are; with loss bpr, that of Rendle et al. (2009)."""

    def __init__(self, config: UserModelConfig, pairs: TrainingPairs) -> None:
        """A vector per user, its initial standard deviation that of the items' (`IdTower`)."""
        super().__init__(config, pairs)
        self.users = nn.Embedding(pairs.user_count, config.width)
        nn.init.trunc_normal_(self.users.weight, std=0.02)

    def forward(self, users: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(B,), (M, D) -> (B, D), (M, D)."""
        share = self.config.dropout
        return (
            F.dropout(self.users(users), share, self.training),
            F.dropout(vectors, share, self.training),
        )
