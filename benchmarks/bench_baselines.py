"""Item-kNN and EASE on MovieLens-1M against the whole dense matrices, and EASE's time and memory.

    LLMREC_DATA=data python benchmarks/bench_baselines.py

Learned from all but the last interaction; both ways must agree. The plain ways are those of a page
of numpy: cosines of all pairs and a full sort of each row; a general inverse. Time and memory at
12,101 items, of the shape of Amazon Beauty, are measured in a fresh process: memory as the peak
beyond the interactions, in arrays of 8 N^2 bytes.
"""

from measure import MIB, Row, Times, extra_memory, in_fresh_process, movielens, report  # isort: skip

import sys
import time
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array

from llmrec.data.tfidf import Float64
from llmrec.models.baselines.ease import item_weights
from llmrec.models.baselines.neighbours import similar_items

NEIGHBOURS, L2 = 100, 500.0
USERS, ITEMS, PAIRS = 22_363, 12_101, 176_000


def plain_neighbours(matrix: csr_array) -> Float64:
    """Cosines of all pairs at once, each row sorted whole."""
    dense = matrix.toarray()
    both = dense.T @ dense
    counts = np.diag(both)
    cosines = both / np.maximum(np.sqrt(np.outer(counts, counts)), 1)
    np.fill_diagonal(cosines, 0)
    order = np.argsort(-cosines, axis=1, kind="stable")
    np.put_along_axis(cosines, order[:, NEIGHBOURS:], 0, axis=1)
    return cosines


def plain_ease(matrix: csr_array) -> Float64:
    """Steck's few lines."""
    dense = matrix.toarray()
    gram = dense.T @ dense
    inverse = np.linalg.inv(gram + L2 * np.eye(len(gram)))
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights


def of_beautys_shape() -> csr_array:
    """Random users and items, popularity falling as 1 / (rank + 50): nothing can be learned."""
    rng = np.random.default_rng(0)
    popularity = 1 / (np.arange(ITEMS) + 50)
    items = rng.choice(ITEMS, PAIRS, p=popularity / popularity.sum()) + 1
    users = rng.integers(0, USERS, PAIRS)
    matrix = csr_array((np.ones(PAIRS), (users, items)), shape=(USERS, ITEMS + 1))
    matrix.data[:] = 1
    return matrix


def seconds() -> float:
    matrix = of_beautys_shape()
    began = time.process_time()
    item_weights(matrix, L2)
    return time.process_time() - began


def memory() -> float:
    def prepare() -> Callable[[], object]:
        matrix = of_beautys_shape()
        item_weights(matrix[:, :50], L2)
        return lambda: item_weights(matrix, L2)

    return extra_memory(prepare)


def main() -> None:
    dataset = movielens()
    interactions = dataset.interactions
    rows = np.delete(interactions.users(), interactions.offsets[1:] - 1)
    items = np.delete(interactions.items, interactions.offsets[1:] - 1)
    matrix = csr_array(
        (np.ones(len(rows)), (rows, items)),
        shape=(interactions.user_count, dataset.item_count + 1),
    )
    matrix.data[:] = 1
    pairs = {
        "neighbours": (similar_items(matrix, NEIGHBOURS, 0.0).toarray(), plain_neighbours(matrix)),
        "weights": (item_weights(matrix, L2), plain_ease(matrix)),
    }
    for what, (ours, plain) in pairs.items():
        if not np.allclose(ours, plain, atol=1e-9):
            raise SystemExit(f"{what} differ by up to {np.abs(ours - plain).max():.1e}")
    times = Times(
        {
            "ours": lambda: similar_items(matrix, NEIGHBOURS, 0.0),
            "dense, sorted whole": lambda: plain_neighbours(matrix),
            "ease": lambda: item_weights(matrix, L2),
            "general inverse": lambda: plain_ease(matrix),
        },
        turns=5,
    )
    array = 8 * (ITEMS + 1) ** 2 / MIB
    extra = in_fresh_process(__file__, "memory")
    spent = in_fresh_process(__file__, "seconds")
    table = [
        times.row(f"{NEIGHBOURS} neighbours of each item", "ours", "dense, sorted whole", "<= 1"),
        times.row("EASE", "ease", "general inverse", "<= 1"),
        Row(f"EASE, {ITEMS:,} items", "", spent, None, "CPU-s", None, ""),
        Row(
            f"EASE, {ITEMS:,} items, extra memory", "one array of the size of the result",
            extra, array, "MiB", extra / array, "<= 1.3",
        ),
    ]  # fmt: skip
    report("baselines", table, data=dataset.name, items=dataset.item_count)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print({"memory": memory, "seconds": seconds}[sys.argv[1]]())
    else:
        main()
