"""LightGCN: matrix factorisation whose vectors are smoothed over the graph of users and items.

U users, N items, E = U + N + 1 nodes: the users, then the rows of the item vectors.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.data.interactions import Float32, Int64
from llmrec.models.config import UserModelConfig
from llmrec.models.user_model import KnownUserModel, TrainingPairs


class LightGCN(KnownUserModel):
    """The mean of the vectors before and after each step over the graph (He et al. 2020)."""

    whole_catalogue: ClassVar[bool] = True
    starts: Tensor
    neighbours: Tensor
    weights: Tensor

    def __init__(self, config: UserModelConfig, pairs: TrainingPairs) -> None:
        """A vector per user, and the distinct training pairs as edges: no part of checkpoints."""
        super().__init__(config, pairs)
        self.users = nn.Embedding(pairs.user_count, config.width)
        nn.init.trunc_normal_(self.users.weight, std=0.02)
        for name, array in zip(("starts", "neighbours", "weights"), graph(pairs), strict=True):
            self.register_buffer(name, torch.from_numpy(array), persistent=False)

    def forward(self, users: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(B,), (N + 1, D) -> (B, D), (N + 1, D); without neighbours, a vector / (steps + 1)."""
        layer = torch.cat([self.users.weight, vectors])  # (E, D)
        layer = total = F.dropout(layer, self.config.dropout, self.training)
        for _ in range(self.config.blocks):
            layer = _Step.apply(layer, self.starts, self.neighbours, self.weights)
            total = total + layer
        mean = total / (self.config.blocks + 1)
        every_user, items = mean.split([self.users.num_embeddings, len(vectors)])
        return F.embedding(users, every_user), items

    def graph_flops(self) -> int:
        """2 per edge, direction and number of a vector in each step, and as many backward."""
        return 4 * len(self.neighbours) * self.config.width * self.config.blocks


def graph(pairs: TrainingPairs) -> tuple[Int64, Int64, Float32]:
    """The graph as rows of neighbours, each distinct pair an edge in both directions.

    Returns:
        Where each node's neighbours start, and the last one's end, (E + 1,); the neighbours; the
        weight of each edge, 1 / sqrt(degree of one end x degree of the other).
    """
    count, width = pairs.user_count, pairs.item_count + 1
    distinct = np.unique(pairs.users * width + pairs.items)
    users, items = distinct // width, distinct % width + count
    ends = np.concatenate([users, items]), np.concatenate([items, users])
    order = np.lexsort((ends[1], ends[0]))
    nodes, neighbours = ends[0][order], ends[1][order]
    degrees = np.bincount(nodes, minlength=count + width)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(degrees)])
    weights = 1 / np.sqrt(degrees[nodes] * degrees[neighbours])
    return starts, neighbours, weights.astype(np.float32)


class _Step(torch.autograd.Function):
    """Product with the graph's matrix, which is symmetric: the gradient passes the same way.

    As weighted sums of rows: faster than torch's products of sparse matrices, see
    benchmarks/bench_graph.py.
    """

    @staticmethod
    def forward(
        ctx: Any, layer: Tensor, starts: Tensor, neighbours: Tensor, weights: Tensor
    ) -> Tensor:
        ctx.graph = starts, neighbours, weights
        return _product(layer, *ctx.graph)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _product(grad_output.contiguous(), *ctx.graph), None, None, None


def _product(layer: Tensor, starts: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """(E, D) -> (E, D)."""
    return F.embedding_bag(
        neighbours, layer, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
