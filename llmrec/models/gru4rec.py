"""GRU4Rec (Hidasi et al. 2016, arXiv 1511.06939) over item vectors, trained at every position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.models.config import UserModelConfig
from llmrec.models.user_model import SequenceModel


class GRU4Rec(SequenceModel):
    """Recurrent layers of D units and a linear one, whose output is the user.

    Hidden units stay within -1 and 1. The paper's output layer has weights of its own; here items
    are scored by the vectors that are read, so the linear layer stands in for them, as in NineRec's
    GRU4Rec. ML-1M (L 30, D 64, full softmax, lr 4e-3, one seed), valid NDCG@10 after 8 epochs:
    .114 with it, .101 without.
    """

    def __init__(self, config: UserModelConfig) -> None:
        """Weights of the whole model; the GRU's as it draws them, uniform within 1 / sqrt(D)."""
        super().__init__(config)
        between = config.dropout if config.blocks > 1 else 0.0  # there is none behind the last
        self.layers = nn.GRU(config.width, config.width, config.blocks, dropout=between)
        self.out = nn.Linear(config.width, config.width)
        nn.init.xavier_normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Training states; see `SequenceModel.forward`."""
        states, lengths = self._from_the_start(x, real)
        length, batch = states.shape[:2]
        places = (torch.arange(length, device=x.device) + lengths[:, None]) % length  # (B, L)
        rows = torch.arange(batch, device=x.device)[:, None]
        turned_back = F.embedding(places * batch + rows, states.flatten(0, 1))  # (B, L, D)
        users: Tensor = self.out(turned_back)
        return users

    def last(self, x: Tensor, real: Tensor) -> Tensor:
        """User vectors; see `SequenceModel.last`."""
        states, lengths = self._from_the_start(x, real)
        ends = states[lengths - 1, torch.arange(len(x), device=x.device)]  # (B, D)
        users: Tensor = self.out(ends)
        return users

    def _from_the_start(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """States with each row turned so that its first real item stands at place 0.

        Padding then comes after all that is real, and a recurrence never looks ahead. Packed
        sequences, the usual way, take 2 to 3 times as long on a CPU (B 128, D 64 to 256, histories
        of 50 to 200, one thread).

        Returns:
            (L, B, D), time first, and how many real items each row has, (B,); a row without any
            counts one, its last padding, so that its state depends on no amount of padding.
        """
        batch, length, _ = x.shape
        lengths = real.sum(dim=1).clamp(min=1)  # (B,)
        places = (torch.arange(length, device=x.device)[:, None] - lengths) % length  # (L, B)
        rows = torch.arange(batch, device=x.device) * length
        turned = F.embedding(rows + places, x.flatten(0, 1))  # (L, B, D)
        turned = F.dropout(turned, self.config.dropout, self.training)
        states, _ = self.layers(turned)
        return F.dropout(states, self.config.dropout, self.training), lengths
