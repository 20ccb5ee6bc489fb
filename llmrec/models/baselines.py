"""Rows that every table needs and that learn nothing by gradients.

They are one-dimensional dot-product recommenders: every user's vector is (1,), so an item's score
is its own single number, the same for everybody.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmrec.data.interactions import Int64


def popularity(counts: Int64) -> Tensor:
    """An item's score is its training count; counts (N + 1,) -> item vectors (N + 1, 1)."""
    return torch.from_numpy(counts).float()[:, None]


def random(counts: Int64) -> Tensor:
    """Every item scores the same, (N + 1, 1).

    Ties are averaged, so this is the exact mean over all random orders.
    """
    return torch.zeros(len(counts), 1)


BASELINES: dict[str, Callable[[Int64], Tensor]] = {"popularity": popularity, "random": random}
