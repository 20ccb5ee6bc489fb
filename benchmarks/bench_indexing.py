"""Names for 10,000 and 100,000 items: seconds and memory of each way.

    python benchmarks/bench_indexing.py

Interactions are made up: as many users as items, 12 interactions each of which the first 10 train,
four in five from the user's own community of 100 items. Memory is the peak beyond the data set,
in fresh processes that have the libraries loaded.
"""

from measure import Row, extra_memory, in_fresh_process, report  # isort: skip  # limits threads

import sys
import time
from collections.abc import Callable

import numpy as np

from llmrec.data.interactions import Catalog, Dataset, Interactions
from llmrec.prompting.indexing import IndexingConfig, build_indexing

SIZES = (10_000, 100_000)
NAMES = ("random", "sequential", "title", "collaborative")
LENGTH, COMMUNITY = 12, 100
TARGETS = {"collaborative": ("<= 120", "<= 2048")}
"""Seconds and MiB at the largest size."""


def made_up(items: int) -> Dataset:
    rng = np.random.default_rng(0)
    home = rng.integers(items // COMMUNITY, size=(items, 1)) * COMMUNITY
    own = home + rng.integers(COMMUNITY, size=(items, LENGTH))
    met = np.where(rng.random((items, LENGTH)) < 0.8, own, rng.integers(items, size=own.shape))
    offsets = np.arange(items + 1, dtype=np.int64) * LENGTH
    titles = [f"Thing {item % (items // 2)}" for item in range(items)]  # each one twice
    ids = [str(item) for item in range(items)]
    interactions = Interactions((met + 1).astype(np.int32).ravel(), offsets)
    return Dataset("made up", interactions, Catalog(ids, {}, titles), ids)


def build(name: str, items: int) -> Callable[[], object]:
    warm, dataset = made_up(1000), made_up(items)
    config = IndexingConfig(name=name)
    build_indexing(config, warm, warm.interactions.offsets[1:] - 2)  # loads what it needs

    def run() -> None:
        found = build_indexing(config, dataset, dataset.interactions.offsets[1:] - 2)
        if len(set(found.mentions)) != items:
            raise RuntimeError(f"{name} names two of {items} items alike.")

    return run


def seconds(name: str, items: int) -> float:
    run = build(name, items)
    began = time.process_time()
    run()
    return time.process_time() - began


def memory(name: str, items: int) -> float:
    return extra_memory(lambda: build(name, items))


def main() -> None:
    rows = []
    for name in NAMES:
        for items in SIZES:
            targets = TARGETS.get(name, ("", "")) if items == SIZES[-1] else ("", "")
            for kind, unit, target in zip(
                ("seconds", "memory"), ("CPU-s", "MiB"), targets, strict=True
            ):
                value = in_fresh_process(__file__, kind, name, items)
                what = f"{name} names, {items:,} items, {kind.replace('memory', 'extra memory')}"
                rows.append(Row(what, "", value, None, unit, None, target))
    report("indexing", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print({"seconds": seconds, "memory": memory}[sys.argv[1]](sys.argv[2], int(sys.argv[3])))
    else:
        main()
