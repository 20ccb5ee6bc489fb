"""DSSM (Huang et al. 2013) as TCF and MoRec use it: a network for users, one for items, a product.

The user is an ID, or, for users that were never trained on, the mean of a history.
"""

from __future__ import annotations

from torch import Tensor, nn

from llmrec.models.config import UserModelConfig
from llmrec.models.user_model import KnownUserModel, SequenceModel, TrainingPairs


def network(config: UserModelConfig) -> nn.Sequential:
    """``config.blocks`` hidden layers of D with GELU, then a linear one: (..., D) -> (..., D).

    The last layer is linear because GELU is hardly ever below 0, and two such vectors could give
    an item no negative score.
    """
    width, layers = config.width, list[nn.Module]()
    for _ in range(config.blocks):
        layers += [nn.Dropout(config.dropout), nn.Linear(width, width), nn.GELU()]
    layers += [nn.Dropout(config.dropout), nn.Linear(width, width)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class HistoryDSSM(SequenceModel):
    """The user is the mean of the items up to each position, in any order."""

    def __init__(self, config: UserModelConfig) -> None:
        """Weights of both networks."""
        super().__init__(config)
        self.user = network(config)
        self.candidates = network(config)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Training states; see `SequenceModel.forward`."""
        counts = real.cumsum(dim=1).clamp(min=1)  # (B, L)
        sums = x.masked_fill(~real[..., None], 0.0).cumsum(dim=1)  # (B, L, D)
        states: Tensor = self.user(sums / counts[..., None])
        return states

    def last(self, x: Tensor, real: Tensor) -> Tensor:
        """User vectors; see `SequenceModel.last`."""
        counts = real.sum(dim=1).clamp(min=1)  # (B,)
        sums = x.masked_fill(~real[..., None], 0.0).sum(dim=1)  # (B, D)
        states: Tensor = self.user(sums / counts[:, None])
        return states


class DSSM(KnownUserModel):
    """The user is an ID of the training data."""

    def __init__(self, config: UserModelConfig, pairs: TrainingPairs) -> None:
        """A vector per user of `pairs`, and the weights of both networks."""
        super().__init__(config, pairs)
        self.users = nn.Embedding(pairs.user_count, config.width)
        nn.init.xavier_normal_(self.users.weight)
        self.user = network(config)
        self.candidates = network(config)

    def forward(self, users: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of the scores; see `KnownUserModel.forward`."""
        return self.user(self.users(users)), self.candidates(vectors)
