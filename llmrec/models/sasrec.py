"""SASRec (Kang and McAuley 2018, arXiv 1808.09781) as TCF and MoRec use it: a causal Transformer.

The modern recipe is three options of it: model.norm=pre, model.feed_forward=gated and
model.positions=rotary or relative.
"""

from __future__ import annotations

from torch import Tensor

from llmrec.models.transformer import Transformer


class SASRec(Transformer):
    """(B, L, D) item vectors -> user states after each position."""

    causal = True

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(B, L, D): what comes after each position."""
        return self.states(x, real, x.shape[1])

    def last(self, x: Tensor, real: Tensor) -> Tensor:
        """(B, D): what comes after the whole history."""
        return self.states(x, real, 1)[:, 0]
