"""Hand-written histories as a baseline sees them."""

import numpy as np

from llmrec.data.interactions import Cases, Catalog, Dataset, Interactions
from llmrec.models.baselines import BASELINES, Known
from llmrec.models.config import UserModelConfig

TITLES = ["red lamp", "blue chair", "red chair", "oak desk", "", "a lamp, a red lamp"]


def known(name, histories, titles=TITLES, vectors=None, timestamps=None, untrained=None, **options):
    """What a baseline sees; every history's last item is the target and is not trained on.

    `untrained` says how many of each history's last items training does not see.
    """
    offsets = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    times = None if timestamps is None else np.concatenate(timestamps).astype(np.int64)
    interactions = Interactions(np.concatenate(histories).astype(np.int32), offsets, times)
    last = offsets[1:] - 1
    catalog = Catalog([f"i{n}" for n in range(len(titles))], {}, list(titles), "hash")
    dataset = Dataset("shop", interactions, catalog, [f"u{n}" for n in range(len(histories))])
    cases = Cases(np.arange(len(histories), dtype=np.int32), last, last)
    ends = last if untrained is None else offsets[1:] - np.array(untrained, np.int64)
    if vectors is None:
        vectors = np.empty((len(titles), 0), np.float32)
    config = UserModelConfig(name=name, **options)
    return Known(dataset, cases, ends, np.array(vectors, np.float32), config)


def scores(name, *arguments, **changes):
    """Scores of items 1..N for every case, (C, N)."""
    asked = known(name, *arguments, **changes)
    items = asked.dataset.item_count
    return BASELINES[name](asked)(np.arange(len(asked.cases)))[:, 1 : items + 1].double().numpy()
