"""Transformers over item vectors: what SASRec and BERT4Rec share.

Rows are left padded, and places are counted from the right end or enter as distances alone, so
that trimming a batch to its longest row, or padding it further, changes no output.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.models.config import UserModelConfig
from llmrec.models.user_model import SequenceModel


class Gated(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(gate) * value, both linear in x."""

    def __init__(self, width: int) -> None:
        """8/3 D hidden units, to the nearest multiple of 8: as many weights as 4 D without gate."""
        super().__init__()
        hidden = max(8, 8 * round(width / 3))
        self.gate_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return cast(Tensor, self.out(F.silu(gate) * value))


def _gelu(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


FEED_FORWARD: dict[str, Callable[[int], nn.Module]] = {"gelu": _gelu, "gated": Gated}
"""D -> a layer from (..., D) to (..., D)."""


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Turn pairs of numbers by angles that grow with the place (RoFormer, arXiv 2104.09864).

    The product of a query and a key turned this way depends on their distance, not their places.

    Args:
        x: (B, heads, L, E), E even; number i pairs with number i + E / 2.
        places: (L,), from left to right.

    Returns:
        The same shape.
    """
    half = x.shape[-1] // 2
    slowness = torch.arange(half, device=x.device) / half
    angles = places[:, None] * 10_000.0**-slowness  # (L, E / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    """Self-attention, then a feed-forward layer, each a branch added to what it reads."""

    def __init__(self, config: UserModelConfig, causal: bool) -> None:
        """Weights of one block; `causal`: no position looks at a later one."""
        super().__init__()
        width = config.width
        self.config, self.causal = config, causal
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width)
        self.feed_forward = FEED_FORWARD[config.feed_forward](width)
        self.norm_feed_forward = nn.LayerNorm(width)
        if config.positions == "relative":
            count = config.max_length if causal else 2 * config.max_length - 1
            self.distances = nn.Embedding(count, config.heads)

    def forward(self, x: Tensor, places: Tensor, allowed: Tensor, queries: int) -> Tensor:
        """States of the last `queries` positions.

        Args:
            x: (B, L, D).
            places: (L,) int64, from L - 1 down to 0, the most recent.
            allowed: (B, 1, L, L) bool, [b, 0, i, j]: position i may look at j.
            queries: Q <= L, counted from the right end.

        Returns:
            (B, Q, D).
        """
        first = x.shape[1] - queries
        recent = x[:, first:]
        if self.config.norm == "post":
            x = self.norm_attention(recent + self._drop(self._attend(recent, x, places, allowed)))
            return cast(Tensor, self.norm_feed_forward(x + self._drop(self.feed_forward(x))))
        normed = self.norm_attention(x)
        x = recent + self._drop(self._attend(normed[:, first:], normed, places, allowed))
        return x + self._drop(self.feed_forward(self.norm_feed_forward(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _attend(self, recent: Tensor, x: Tensor, places: Tensor, allowed: Tensor) -> Tensor:
        """What the last Q positions (B, Q, D) gather from all (B, L, D): (B, Q, D)."""
        batch, queries, width = recent.shape
        split = (batch, -1, self.config.heads, width // self.config.heads)
        query = self.query(recent).view(split).transpose(1, 2)  # (B, heads, Q, E)
        key, value = (
            part.reshape(split).transpose(1, 2) for part in self.key_value(x).chunk(2, dim=-1)
        )  # (B, heads, L, E)
        asking = places[len(places) - queries :]  # (Q,)
        seen = allowed[:, :, len(places) - queries :]  # (B, 1, Q, L)
        if self.config.positions == "rotary":
            query, key = rotated(query, -asking), rotated(key, -places)
        elif self.config.positions == "relative":
            back = places - asking[:, None]  # (Q, L): item j lies so far before i
            row = back.clamp(min=0) if self.causal else back + self.config.max_length - 1
            bias = self.distances(row).permute(2, 0, 1)  # (heads, Q, L)
            seen = bias.masked_fill(~seen, -torch.inf)  # (B, heads, Q, L)
        # On a CPU, with dropout, all ways to write this cost the same within a tenth (boolean or
        # float mask, is_causal, products written out): a third of the time is dropout's draws.
        attended = F.scaled_dot_product_attention(
            query, key, value, seen, self.config.dropout if self.training else 0.0
        )
        return cast(Tensor, self.out(attended.transpose(1, 2).reshape(batch, queries, width)))


class Transformer(SequenceModel, ABC):
    """Blocks over item vectors; subclasses say who looks at whom.

    Inputs are normed before the first block under either `norm`. Item vectors start at .02 where a
    block's branches start at 1, so without it a pre-norm stack barely sees the items it adds to: on
    a planted rule with noise it named .74 of the next items after 1,500 steps, with it .86.
    """

    causal: ClassVar[bool]
    """Whether a position sees those before it and itself alone, or all."""

    def __init__(self, config: UserModelConfig) -> None:
        """Weights of the whole stack; initial values are set here, on its own layers alone."""
        super().__init__(config)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_length, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config, self.causal) for _ in range(config.blocks))
        self.last_norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        if config.positions == "learned":
            nn.init.trunc_normal_(self.positions.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)
        if config.positions == "relative":
            for block in self.blocks:
                nn.init.zeros_(cast(Block, block).distances.weight)  # all distances alike at first

    def states(self, x: Tensor, real: Tensor, queries: int) -> Tensor:
        """States of the last `queries` positions, all the last block computes.

        Args:
            x: (B, L, D) item vectors, left padded, L at most ``max_length``.
            real: (B, L) bool, False where padded.
            queries: Q <= L.

        Returns:
            (B, Q, D); states of padded positions mean nothing.
        """
        length, device = x.shape[1], x.device
        places = torch.arange(length - 1, -1, -1, device=device)  # 0 is the most recent
        if self.config.positions == "learned":
            x = x + self.positions(places)
        x = F.dropout(self.norm(x), self.config.dropout, self.training)
        allowed = real[:, None, :]  # (B, 1, L)
        if self.causal:
            allowed = allowed & (places >= places[:, None])  # (B, L, L)
        itself = torch.eye(length, dtype=torch.bool, device=device)
        allowed = (allowed | itself)[:, None]  # a padded row must look at something
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, places, allowed, queries if number == len(self.blocks) else length)
        return cast(Tensor, self.last_norm(x))
