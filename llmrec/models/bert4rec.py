"""BERT4Rec (Sun et al. 2019, arXiv 1904.06690): a Transformer that fills in masked items.

The mask is a vector of its own and no item: it has no id, so it is never a candidate, a negative
or a column of scores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrec.models.config import UserModelConfig
from llmrec.models.transformer import Transformer


class BERT4Rec(Transformer):
    """(B, L, D) item vectors, some of them hidden -> what each position's item would be."""

    causal = False
    objective = "masked"

    def __init__(self, config: UserModelConfig) -> None:
        """Fresh weights, by Xavier as SASRec's.

        BERT's own N(0, .02) suits a width of 768: at 32, on a planted rule with noise, it named .14
        of the next items after 750 steps, this .24, and both .25-.26 after 2,000 (one seed).
        """
        super().__init__(config)
        self.mask = nn.Parameter(torch.empty(config.width))
        linear = nn.Linear(config.width, config.width)
        self.head = nn.Sequential(linear, nn.GELU(), nn.LayerNorm(config.width))
        nn.init.trunc_normal_(self.mask, std=0.02)  # as large as an ID tower's item vectors
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)

    def hide(self, x: Tensor, masked: Tensor) -> Tensor:
        """The mask's vector in the place of masked items: x (B, L, D), masked (B, L) bool."""
        return torch.where(masked[:, :, None], self.mask, x)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(B, L, D): each position's item, told from all others; see `hide`."""
        states: Tensor = self.head(self.states(x, real, x.shape[1]))
        return states

    def last(self, x: Tensor, real: Tensor) -> Tensor:
        """(B, D): the state of a mask after the history, whose oldest item goes if it is full."""
        kept = self.config.max_length - 1
        start = max(0, x.shape[1] - kept)
        mask = self.mask.expand(len(x), 1, -1)  # (B, 1, D)
        x = torch.cat([x[:, start:], mask], dim=1)
        real = torch.cat([real[:, start:], real.new_ones(len(real), 1)], dim=1)
        states: Tensor = self.head(self.states(x, real, 1)[:, 0])
        return states
