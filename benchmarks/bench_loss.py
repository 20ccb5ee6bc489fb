"""Chunked losses against plain ones, their peak memory as the catalogue grows, and the sampler.

    python benchmarks/bench_loss.py

Time is that of the loss alone, forward and backward, on a batch of the epoch's reference: 6,400
positions, 3,416 items, width 64. Memory is measured in fresh processes, as the peak beyond what
any full softmax must hold: states, item vectors and one gradient of each. The plain loss is
measured at 3,000 items only.

Losses with negatives of each position's own are held against one gather of all their vectors, at 1
and 256 negatives, and so are the two ways in which these are computed in chunks. Negatives are
drawn for 32 users and 200 positions of MovieLens-1M, and held against a binary search of each draw
among all pairs of users and items.
"""

from measure import Row, Times, extra_memory, in_fresh_process, movielens, report  # isort: skip  # limits threads

import math
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.data.batches import NegativeSampler
from llmrec.models import losses
from llmrec.models.losses import bce, full_softmax, in_batch_softmax

POSITIONS, ITEMS, WIDTH, LENGTH = 6400, 3416, 64, 50
MEMORY_POSITIONS = 1280
MEMORY_ITEMS = (3_000, 30_000, 300_000)
NEGATIVES = 256
FLAT_MIB = 8
"""Growth from the smallest catalogue to the largest that counts as flat: one chunk."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(states @ items.T, targets, reduction="sum")


def tensors(positions: int, items: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    states = torch.randn(positions, WIDTH, requires_grad=True)
    vectors = torch.empty(items, WIDTH).normal_(std=0.1).requires_grad_()
    return states, vectors, torch.randint(items, (positions,))


def step(loss: Loss, parts: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """Forward and backward, gradients thrown away first as in a training step."""

    def run() -> None:
        parts[0].grad = parts[1].grad = None
        loss(*parts).backward()

    return run


def in_batch(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    users = len(states) // LENGTH
    rows = torch.arange(users).repeat_interleave(LENGTH)
    inputs = targets.view(users, LENGTH)
    slots = torch.cat([inputs.roll(1, 1), inputs[:, -1:]], dim=1)
    multiplicity = torch.bincount(slots.flatten(), minlength=len(items))
    popularity = torch.zeros(len(items))
    return in_batch_softmax(states, items, targets, rows, slots, multiplicity, popularity)


def own(chunked: bool, count: int = NEGATIVES) -> Loss:
    """BCE with so many negatives of each position's own: ours, or all their vectors at once."""

    def loss(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        negatives = torch.randint(len(items), (len(states), count), generator=generator)
        if chunked:
            return bce(states, items, targets, negatives)
        positive = (states * F.embedding(targets, items)).sum(-1)
        negative = torch.einsum("pd,pkd->pk", states, F.embedding(negatives, items))
        prior = -math.log(negative.shape[1])  # the odds of a target among so many
        return F.softplus(-prior - positive).sum() + F.softplus(prior + negative).sum()

    return loss


def gathered(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Ours where the rule would not score all items."""
    rule, losses.DENSE_ITEMS_PER_NEGATIVE = losses.DENSE_ITEMS_PER_NEGATIVE, 0
    total = own(chunked=True)(states, items, targets)
    losses.DENSE_ITEMS_PER_NEGATIVE = rule
    return total


def searched(keys: np.ndarray, users: np.ndarray, item_count: int) -> np.ndarray:
    """200 x 256 negatives per user, each looked for in the sorted keys of all pairs."""
    rng = np.random.default_rng(0)
    negatives = rng.integers(1, item_count + 1, size=(len(users), 200, NEGATIVES))
    owners = np.broadcast_to(users[:, None, None], negatives.shape)
    again = np.nonzero(np.ones(negatives.shape, bool))
    while True:
        wanted = owners[again] * (item_count + 1) + negatives[again]
        found = keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted
        if not found.any():
            return negatives
        again = tuple(axis[found] for axis in again)
        negatives[again] = rng.integers(1, item_count + 1, size=len(again[0]))


def sampler_row() -> Row:
    dataset = movielens()
    interactions, count = dataset.interactions, dataset.item_count
    sampler = NegativeSampler(interactions, interactions.offsets[1:], count)
    users = np.random.default_rng(0).permutation(interactions.user_count)[:32]
    keys = np.unique(interactions.users().astype(np.int64) * (count + 1) + interactions.items)

    def ours() -> np.ndarray:
        return sampler.draw(users, (200, NEGATIVES), np.random.default_rng(0))

    assert (ours() == searched(keys, users, count)).all()
    times = Times({"ours": ours, "binary search": lambda: searched(keys, users, count)}, turns=5)
    return times.row("drawing 1.6 million negatives", "ours", "binary search", "<= 0.3")


def negative_rows(parts: tuple[Tensor, Tensor, Tensor]) -> list[Row]:
    many = Times(
        {
            "ours": step(own(chunked=True), parts),
            "vectors gathered in chunks": step(gathered, parts),
            "vectors gathered at once": step(own(chunked=False), parts),
        },
        turns=3,
    )
    one = Times(
        {
            "ours": step(own(chunked=True, count=1), parts),
            "vectors gathered at once": step(own(chunked=False, count=1), parts),
        },
        turns=15,
    )
    what = f"{NEGATIVES} negatives of each position's own, time"
    peaks = [in_fresh_process(__file__, name, MEMORY_ITEMS[0]) for name in ("own", "own, plain")]
    ours, other = peaks
    return [
        many.row(what, "ours", "vectors gathered at once", "<= 0.25"),
        many.row(what, "ours", "vectors gathered in chunks", "<= 1"),
        one.row(
            "1 negative of each position's own, time", "ours", "vectors gathered at once", "<= 1.1"
        ),
        Row(
            f"{NEGATIVES} negatives of each position's own, extra memory",
            "vectors gathered at once", ours, other, "MiB", ours / other, "",
        ),
    ]  # fmt: skip


def memory(name: str, items: int) -> float:
    loss = {
        "chunked": full_softmax,
        "plain": plain,
        "own": own(chunked=True),
        "own, plain": own(chunked=False),
    }[name]
    step(loss, tensors(8, 64))()  # what any first step allocates once

    def prepare() -> Callable[[], object]:
        parts = tensors(MEMORY_POSITIONS, items)
        for part in parts[:2]:
            part.grad = torch.ones_like(part)  # counted before: one gradient of each is inherent
        return step(loss, parts)

    return extra_memory(prepare)


def main() -> None:
    parts = tensors(POSITIONS, ITEMS)
    softmaxes = {"full softmax": full_softmax, "plain cross-entropy": plain, "in batch": in_batch}
    times = Times({name: step(loss, parts) for name, loss in softmaxes.items()}, turns=7)
    rows = [
        times.row("full softmax, time", "full softmax", "plain cross-entropy", "<= 1"),
        times.row(
            "in-batch softmax, every item in the batch, time", "in batch", "plain cross-entropy", ""
        ),
    ]
    peaks = {items: in_fresh_process(__file__, "chunked", items) for items in MEMORY_ITEMS}
    first, last = peaks[MEMORY_ITEMS[0]], peaks[MEMORY_ITEMS[-1]]
    usual = in_fresh_process(__file__, "plain", MEMORY_ITEMS[0])
    rows.append(
        Row(
            f"full softmax, extra memory at {MEMORY_ITEMS[0]:,} items",
            "plain cross-entropy",
            first,
            usual,
            "MiB",
            first / usual,
            "",
        )
    )
    rows += [
        Row(
            f"full softmax, extra memory at {items:,} items",
            "",
            peaks[items],
            None,
            "MiB",
            None,
            "",
        )
        for items in MEMORY_ITEMS[1:-1]
    ]
    rows.append(
        Row(
            f"full softmax, growth of extra memory to {MEMORY_ITEMS[-1]:,} items",
            "",
            last - first,
            None,
            "MiB",
            None,
            f"<= {FLAT_MIB} MiB",
        )
    )
    rows += [*negative_rows(parts), sampler_row()]
    report(
        "loss",
        rows,
        positions=POSITIONS,
        items=ITEMS,
        width=WIDTH,
        extra_mib=peaks,
        memory_positions=MEMORY_POSITIONS,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(memory(sys.argv[1], int(sys.argv[2])))
    else:
        main()
