"""Small data sets with titles, and lists drawn from them."""

import numpy as np

from llmrec.data.interactions import Cases, Catalog, Dataset, Interactions
from llmrec.evaluation.pools import PoolConfig, draw_pools


def shop(histories, titles):
    """One user per history, whose last item is the target; item i is called titles[i - 1]."""
    offsets = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    interactions = Interactions(np.concatenate(histories).astype(np.int32), offsets)
    last = offsets[1:] - 1
    cases = Cases(np.arange(len(histories), dtype=np.int32), last, last)
    catalog = Catalog([f"i{n}" for n in range(1, len(titles) + 1)], {}, list(titles), "hash")
    users = [f"u{n}" for n in range(len(histories))]
    return Dataset("shop", interactions, catalog, users), cases


def random_shop(users=300, items=150, seed=0):
    """Histories of 2 to 19 items with repeats, all titles distinct."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(1, items + 1, rng.integers(2, 20)) for _ in range(users)]
    return shop(histories, [f"title {n}" for n in range(items)])


def everything(dataset):
    """All items as candidates."""
    return np.arange(dataset.item_count + 1) > 0


def draw(dataset, cases, popularity=None, candidates=None, **config):
    """The sampled cases and their lists."""
    counts = np.ones(dataset.item_count + 1, np.int64) if popularity is None else popularity
    allowed = everything(dataset) if candidates is None else candidates
    return draw_pools(dataset, cases, allowed, counts, PoolConfig(**({"users": "all"} | config)))
