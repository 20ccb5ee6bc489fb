"""The chunked full softmax against the plain one, and its peak memory as the catalogue grows.

    python benchmarks/bench_loss.py

Time is that of the loss alone, forward and backward, on a batch of the epoch's reference: 6,400
positions, 3,416 items, width 64. Memory is measured in fresh processes, as the peak beyond what
any full softmax must hold: states, item vectors and one gradient of each. The plain loss is
measured at 3,000 items only.
"""

from measure import Row, Times, extra_memory, in_fresh_process, report  # isort: skip  # limits threads

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.models.losses import full_softmax, in_batch_softmax

POSITIONS, ITEMS, WIDTH, LENGTH = 6400, 3416, 64, 50
MEMORY_POSITIONS = 1280
MEMORY_ITEMS = (3_000, 30_000, 300_000)
FLAT_MIB = 8
"""Growth from the smallest catalogue to the largest that counts as flat: one chunk."""


def plain(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(states @ items.T, targets, reduction="sum")


def tensors(positions: int, items: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    states = torch.randn(positions, WIDTH, requires_grad=True)
    vectors = torch.empty(items, WIDTH).normal_(std=0.1).requires_grad_()
    return states, vectors, torch.randint(items, (positions,))


def step(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], parts: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], object]:
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


def memory(name: str, items: int) -> float:
    loss = {"chunked": full_softmax, "plain": plain}[name]
    step(loss, tensors(8, 64))()  # what any first step allocates once

    def prepare() -> Callable[[], object]:
        parts = tensors(MEMORY_POSITIONS, items)
        for part in parts[:2]:
            part.grad = torch.ones_like(part)  # counted before: one gradient of each is inherent
        return step(loss, parts)

    return extra_memory(prepare)


def main() -> None:
    parts = tensors(POSITIONS, ITEMS)
    losses = {"full softmax": full_softmax, "plain cross-entropy": plain, "in batch": in_batch}
    times = Times({name: step(loss, parts) for name, loss in losses.items()}, turns=7)
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
