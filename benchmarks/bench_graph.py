"""A training step of LightGCN over its graph, against torch's sparse matrices in its place.

    python benchmarks/bench_graph.py

Forward and backward of 3 steps over a random graph of the shape of amazon-beauty-2014: 22,363
users, 12,101 items of falling popularity, 154,000 training interactions, width 64.
"""

from measure import Times, report  # isort: skip  # first: it limits threads

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llmrec.models.config import UserModelConfig
from llmrec.models.lightgcn import LightGCN, graph
from llmrec.models.user_model import TrainingPairs

USERS, ITEMS, INTERACTIONS, WIDTH, STEPS = 22_363, 12_101, 154_000, 64, 3


def pairs() -> TrainingPairs:
    rng = np.random.default_rng(0)
    popularity = 1 / (np.arange(ITEMS) + 20)
    items = rng.choice(ITEMS, INTERACTIONS, p=popularity / popularity.sum()) + 1
    return TrainingPairs(USERS, ITEMS, rng.integers(0, USERS, INTERACTIONS), items)


def main() -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    data = pairs()
    config = UserModelConfig(name="lightgcn", width=WIDTH, blocks=STEPS, dropout=0.0)
    model, vectors = LightGCN(config, data), torch.randn(ITEMS + 1, WIDTH, requires_grad=True)
    starts, neighbours, weights = (torch.from_numpy(part) for part in graph(data))
    size = USERS + ITEMS + 1
    csr = torch.sparse_csr_tensor(starts, neighbours, weights, (size, size), check_invariants=True)
    coo = csr.to_sparse_coo().coalesce()

    def ours() -> tuple[Tensor, Tensor]:
        return model(torch.arange(USERS), vectors)

    def sparse(matrix: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            layer = total = torch.cat([model.users.weight, vectors])
            for _ in range(STEPS):
                layer = torch.sparse.mm(matrix, layer)
                total = total + layer
            return (total / (STEPS + 1)).split([USERS, ITEMS + 1])

        return run

    def step(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], object]:
        def forward_and_backward() -> None:
            model.users.weight.grad = vectors.grad = None
            users, items = run()
            (users.square().sum() + items.square().sum()).backward()

        return forward_and_backward

    for mine, theirs in zip(ours(), sparse(csr)(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    times = Times(
        {
            "ours": step(ours),
            "torch.sparse, CSR": step(sparse(csr)),
            "torch.sparse, COO": step(sparse(coo)),
        },
        turns=7,
    )
    rows = [
        times.row("LightGCN's three steps over the graph", "ours", other, "<= 1")
        for other in ("torch.sparse, CSR", "torch.sparse, COO")
    ]
    report("graph", rows, users=USERS, items=ITEMS, edges=len(neighbours) // 2, width=WIDTH)


if __name__ == "__main__":
    main()
