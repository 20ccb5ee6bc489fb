"""Work on items that several processes need alike: each does its share, all get everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist


def shared(costs: NDArray[np.int32], vectors: Callable[[NDArray[np.int64]], Tensor]) -> Tensor:
    """What `vectors` makes of n items, each computed by one process, with gradients.

    The items are dealt out by cost, the dearest first, so the shares are alike in number and in
    cost. On the way back every process's gradients are summed before they enter the process that
    computed a vector: with the loss of a step as the sum of the processes' losses, the gradient is
    that of one process that did everything.

    Args:
        costs: (n,), the same on all processes; so must the items be that they stand for.
        vectors: places (m,) of items among the n -> (m, D); m may be 0.

    Returns:
        (n, D), the same on all processes.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return vectors(np.arange(len(costs)))
    world, rank = dist.get_world_size(), dist.get_rank()
    order = np.argsort(-costs, kind="stable")
    own = vectors(order[rank::world])
    shares = [order[other::world] for other in range(world)]
    everything: Tensor = _Gather.apply(own, [len(share) for share in shares])
    places = np.argsort(np.concatenate(shares))
    return everything[torch.from_numpy(places).to(everything.device)]


class _Gather(torch.autograd.Function):
    """Rows of all processes, in their order; the way back sums over processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = own.new_zeros(max(counts), own.shape[1])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = sum(ctx.counts[: dist.get_rank()])
        return grad[start : start + ctx.counts[dist.get_rank()]], None
