"""The four real data sets come out with the sizes they are known by."""

from pathlib import Path

import numpy as np
import pytest

from llmrec.data.interactions import Dataset
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.splits import SplitConfig, split

pytestmark = pytest.mark.real_data

# users, items, interactions, items with empty text
SIZES = {
    "ml-1m": (6040, 3416, 999_611, 0),
    "amazon-games-2018": (50_546, 16_859, 440_264, 0),
    "amazon-beauty-2014": (22_363, 12_101, 198_502, 7),
    "ml-100k": (943, 1682, 100_000, 0),
}


def load(root: Path, name: str) -> Dataset:
    if not (root / name).is_dir():
        pytest.skip(f"no real data: {root} holds no {name}")
    text = "movielens_atomic" if name == "ml-100k" else "title"
    return load_dataset(DataConfig(source=str(root / name), item_text=text))


@pytest.mark.parametrize("name", SIZES)
def test_users_items_and_interactions_are_those_known(data_root: Path, name: str) -> None:
    data = load(data_root, name)
    sizes = (data.interactions.user_count, data.item_count, len(data.interactions.items))
    assert (*sizes, data.counts["items_with_empty_text"]) == SIZES[name]
    assert data.counts["interactions_read"] == SIZES[name][2]
    parts = split(data, SplitConfig())
    assert len(parts.test) == len(parts.valid) == SIZES[name][0]


def test_ml_100k_splits_in_time(data_root: Path) -> None:
    data = load(data_root, "ml-100k")
    times = data.interactions.timestamps
    assert times is not None
    parts = split(data, SplitConfig(method="temporal"))
    cut = parts.counts["test_cut"]
    assert 0.89 < (times < cut).mean() <= 0.9
    assert (times[parts.test.target] >= cut).all()
    assert (times[parts.test.end - 1] < cut).all()
    assert parts.test_candidates[data.interactions.items[parts.test.target]].all()
    assert parts.test_candidates[0] == np.False_
    assert 0.75 < parts.counts["interactions_tied_in_time"] / len(times) < 0.77


def test_the_position_only_sets_refuse_the_temporal_split(data_root: Path) -> None:
    from llmrec.errors import UsageError

    with pytest.raises(UsageError, match="leave_one_out"):
        split(load(data_root, "amazon-beauty-2014"), SplitConfig(method="temporal"))
