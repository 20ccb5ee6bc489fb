"""Full ranking by counting against sorting each user's scores, and its memory over 300,000 items.

    LLMREC_DATA=data python benchmarks/bench_ranking.py

6,040 users and 3,416 items of MovieLens-1M, width 64, seen items filtered, random vectors; all
ways must agree on NDCG@10. Counting also returns each user's 20 best items and the number of
ties. Memory is measured in a fresh process, as the peak beyond vectors, histories and cases.
"""

from measure import MIB, Row, Times, extra_memory, in_fresh_process, movielens, report  # isort: skip

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llmrec.data.interactions import Cases, Interactions
from llmrec.data.splits import SplitConfig, split
from llmrec.evaluation.metrics import Measure, Ranking
from llmrec.evaluation.ranking import EvaluationConfig, rank

WIDTH = 64
MANY_ITEMS, MANY_CASES = 300_000, 512


def by_counting(users: Tensor, items: Tensor, interactions: Interactions, cases: Cases) -> Ranking:
    candidates = np.arange(len(items)) > 0
    order, ranking = rank(
        lambda block: users[torch.from_numpy(block)],
        items,
        interactions,
        cases,
        candidates,
        EvaluationConfig(),
    )
    assert len(order) == len(cases)
    return ranking


def by_sorting(users: Tensor, items: Tensor, interactions: Interactions, cases: Cases) -> float:
    """The usual way: for each user, mask what was seen, sort everything, look for the target."""
    gains = np.zeros(len(cases))
    user_rows, item_rows = users.numpy(), items.numpy()
    for case, (user, end, place) in enumerate(
        zip(cases.user, cases.end, cases.target, strict=True)
    ):
        scores = item_rows @ user_rows[case]
        target = interactions.items[place]
        kept = scores[target]
        scores[interactions.items[interactions.offsets[user] : end]] = -np.inf
        scores[0], scores[target] = -np.inf, kept
        position = int(np.flatnonzero(np.argsort(-scores) == target)[0])
        gains[case] = 1 / np.log2(position + 2) if position < 10 else 0
    return float(gains.mean())


def by_batch_sorting(
    users: Tensor, items: Tensor, interactions: Interactions, cases: Cases
) -> float:
    """The same in torch, 256 users at a time."""
    gains = []
    targets = torch.from_numpy(interactions.items[cases.target].astype(np.int64))
    for start in range(0, len(cases), 256):
        scores = users[start : start + 256] @ items.T
        target = targets[start : start + 256, None]
        kept = scores.gather(1, target)
        for row, case in enumerate(range(start, start + len(scores))):
            seen = interactions.items[interactions.offsets[cases.user[case]] : cases.end[case]]
            scores[row, torch.from_numpy(seen)] = -torch.inf
        scores[:, 0] = -torch.inf
        scores.scatter_(1, target, kept)
        position = (scores.argsort(dim=1, descending=True) == target).nonzero()[:, 1]
        gains.append(torch.where(position < 10, 1 / torch.log2(position + 2.0), 0))
    return float(torch.cat(gains).mean())


def memory() -> float:
    def prepare() -> Callable[[], object]:
        rng = np.random.default_rng(0)
        items = torch.randn(MANY_ITEMS + 1, WIDTH)
        users = torch.randn(MANY_CASES, WIDTH)
        sequences = rng.integers(1, MANY_ITEMS + 1, (MANY_CASES, 50)).astype(np.int32)
        interactions = Interactions(sequences.ravel(), np.arange(MANY_CASES + 1) * 50)
        last = interactions.offsets[1:] - 1
        cases = Cases(np.arange(MANY_CASES, dtype=np.int32), last, last)
        few = Cases(cases.user[:2], cases.end[:2], cases.target[:2])
        by_counting(
            users, items[:100], Interactions(sequences.ravel() % 99 + 1, interactions.offsets), few
        )
        return lambda: by_counting(users, items, interactions, cases)

    return extra_memory(prepare)


def main() -> None:
    dataset = movielens()
    cases = split(dataset, SplitConfig()).test
    torch.manual_seed(0)
    users = torch.randn(len(cases), WIDTH)
    items = torch.randn(dataset.item_count + 1, WIDTH)
    arguments = users, items, dataset.interactions, cases
    ndcg = Measure.parse("NDCG@10").per_case(by_counting(*arguments)).mean()
    for other in (by_sorting(*arguments), by_batch_sorting(*arguments)):
        if abs(other - ndcg) > 1e-4:
            raise SystemExit(f"NDCG@10 differs: {ndcg:.6f} by counting, {other:.6f} by sorting")
    functions = {
        "counting": lambda: by_counting(*arguments),
        "numpy argsort, user by user": lambda: by_sorting(*arguments),
        "torch argsort, 256 users at a time": lambda: by_batch_sorting(*arguments),
    }
    times = Times(functions, turns=7)
    rows = [
        times.row("full ranking, seen filter on", "counting", name, "<= 1")
        for name in list(functions)[1:]
    ]
    extra = in_fresh_process(__file__, "memory")
    matrix = MANY_ITEMS * MANY_CASES * 4 / MIB
    rows.append(
        Row(
            f"extra memory, {MANY_ITEMS:,} items",
            "the whole score matrix",
            extra,
            matrix,
            "MiB",
            None,
            "<= 143 MiB (150 MB)",
        )
    )
    report(
        "ranking",
        rows,
        data=dataset.name,
        cases=len(cases),
        items=dataset.item_count,
        width=WIDTH,
        memory_cases=MANY_CASES,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(memory())
    else:
        main()
