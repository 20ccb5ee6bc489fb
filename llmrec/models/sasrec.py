"""SASRec (Kang and McAuley 2018, arXiv 1808.09781) as TCF and MoRec use it.

A causal Transformer over item vectors. Left-padded rows; learned positions counted from the right
end, so that trimming a batch to its longest row, or padding it further, changes no output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.errors import UsageError


@dataclass(frozen=True)
class UserModelConfig:
    """What turns a history of item vectors into a user vector."""

    name: Literal["sasrec", "popularity", "random", "embedding", "bm25"] = "sasrec"
    """The user model, or a row to compare with that learns nothing by gradients: popularity;
    random; embedding: mean cosine of the items' text vectors with those of the history; bm25: words
    that an item's text shares with those of the history (k1 1.5, b .75)."""
    width: int = 64
    """D, of item and user vectors alike."""
    blocks: int = 1
    """Transformer blocks."""
    heads: int = 2
    """Attention heads; must divide width."""
    dropout: float = 0.2
    """On inputs, attention weights and both branches of a block."""
    max_length: int = 50
    """L: most recent items of a history that are read."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if min(self.width, self.blocks, self.heads, self.max_length) < 1:
            raise UsageError("model.width, blocks, heads and max_length must be at least 1.")
        if self.width % self.heads:
            raise UsageError(
                f"model.width={self.width} is not divisible by model.heads={self.heads}."
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"model.dropout={self.dropout} must lie in [0, 1).")


class Block(nn.Module):
    """Self-attention, then a feed-forward layer of 4 D; residual and LayerNorm after each."""

    def __init__(self, config: UserModelConfig) -> None:
        """Weights of one block."""
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm_feed_forward = nn.LayerNorm(width)

    def forward(self, x: Tensor, allowed: Tensor, queries: int) -> Tensor:
        """States of the last `queries` positions.

        Args:
            x: (B, L, D).
            allowed: (B, 1, L, L) bool, [b, 0, i, j]: position i may look at j.
            queries: Q <= L, counted from the right end.

        Returns:
            (B, Q, D).
        """
        batch, length, width = x.shape
        recent = x[:, length - queries :]
        split = (batch, -1, self.heads, width // self.heads)
        query = self.query(recent).view(split).transpose(1, 2)  # (B, heads, Q, D / heads)
        key, value = (
            part.reshape(split).transpose(1, 2) for part in self.key_value(x).chunk(2, dim=-1)
        )
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            allowed[:, :, length - queries :],
            self.dropout if self.training else 0.0,
        )
        attended = self.out(attended.transpose(1, 2).reshape(batch, queries, width))
        x = self.norm_attention(recent + F.dropout(attended, self.dropout, self.training))
        return self.norm_feed_forward(
            x + F.dropout(self.feed_forward(x), self.dropout, self.training)
        )


class SASRec(nn.Module):
    """(B, L, D) item vectors -> user states after each position."""

    def __init__(self, config: UserModelConfig) -> None:
        """Weights of the whole model; initial values are set here, on its own layers alone."""
        super().__init__()
        self.config = config
        self.positions = nn.Embedding(config.max_length, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        nn.init.trunc_normal_(self.positions.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, real: Tensor, last_only: bool = False) -> Tensor:
        """User states.

        Args:
            x: (B, L, D) item vectors, left padded, L at most ``max_length``.
            real: (B, L) bool, False where padded.
            last_only: Whether the last block computes the last position alone, which is all a
                ranking needs.

        Returns:
            (B, L, D), or (B, 1, D) if `last_only`; states of padded positions mean nothing.
        """
        length, device = x.shape[1], x.device
        places = torch.arange(length - 1, -1, -1, device=device)  # 0 is the most recent
        x = F.dropout(self.norm(x + self.positions(places)), self.config.dropout, self.training)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        itself = torch.eye(
            length, dtype=torch.bool, device=device
        )  # a padded row must look at something
        allowed = (causal & real[:, None, :] | itself)[:, None]  # (B, 1, L, L)
        for number, block in enumerate(self.blocks, start=1):
            closing = last_only and number == len(self.blocks)
            x = block(x, allowed, 1 if closing else length)
        return x


USER_MODELS: dict[str, type[SASRec]] = {"sasrec": SASRec}
