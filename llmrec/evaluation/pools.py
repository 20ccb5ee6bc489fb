"""Candidate lists: the few items that a case is asked about where a catalogue cannot be ranked.

A list is drawn from the data, a seed and nothing else, so that every recommender is scored on the
very same ones; it is kept in the run folder, and its hash in ``result.json``. Numpy, no torch.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.data.interactions import Bool, Cases, Catalog, Dataset, Int32, Int64
from llmrec.data.titles import matching_key
from llmrec.errors import UsageError
from llmrec.runs import write_atomically

CANDIDATES = "candidates.parquet"
"""The lists in a run folder."""
DRAWN = ("random", "popularity")
"""Sources that need no run."""


@dataclass(frozen=True)
class PoolConfig:
    """Which candidates a test case is ranked among; validation always ranks all."""

    size: int | Literal["all"] = "all"
    """Candidates per case, the target included; all: every item, for every test case. A number
    draws lists, for recommenders that cannot rank a catalogue and those they are compared with."""
    source: str = "random"
    """Where the other candidates come from. random: all items equally; popularity: in proportion to
    their training interactions; the folder of a trained run: its top `size`, to be ranked anew (a
    target that is not among them is a miss)."""
    users: int | Literal["all"] = 1024
    """Test users that are asked about, drawn by `seed`; more include the fewer."""
    seed: int = 0
    """Of the users, the candidates and the order they stand in."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.size != "all" and self.size < 2:
            raise UsageError(
                f"evaluation.pool.size={self.size} must be at least 2, the target and another item,"
                " or all."
            )
        if self.users != "all" and self.users < 1:
            raise UsageError(f"evaluation.pool.users={self.users} must be at least 1, or all.")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"evaluation.pool.seed={self.seed} must lie in [0, 2**32).")
        if not self.source:
            raise UsageError(
                "evaluation.pool.source is empty; use random, popularity or the folder of a run."
            )


@dataclass(frozen=True)
class Pools:
    """The candidates of every case."""

    items: Int32
    """In the order shown, (C, K), padded with 0 at the end; row i belongs to case i."""
    sha256: str
    """Over the users', targets' and candidates' ids, in order."""
    counts: dict[str, int]
    """What was drawn and what was left out: name -> number."""
    config: PoolConfig
    """How they were drawn."""


def sample_cases(dataset: Dataset, cases: Cases, eligible: Int64, config: PoolConfig) -> Int64:
    """A seeded sample of `config.users` cases, fewer if there are fewer.

    Whether a case is in it depends on seed, user and target alone: the first so many by a hash of
    these, so that a larger sample contains a smaller one.

    Args:
        dataset: For the ids.
        cases: All.
        eligible: Indices of those that may be drawn.
        config: `users` and `seed`.

    Returns:
        Indices into `cases`, ascending.
    """
    if config.users == "all" or config.users >= len(eligible):
        return np.sort(eligible)
    names = _names(dataset, cases, eligible)
    keys = np.array([_hash(b"case", config.seed, name)[0] for name in names], dtype=np.uint64)
    return np.sort(eligible[np.argsort(keys, kind="stable")[: config.users]])


def draw_pools(
    dataset: Dataset, cases: Cases, candidates: Bool, popularity: Int64, config: PoolConfig
) -> tuple[Int64, Pools]:
    """Sample cases, and draw for each the target's rivals, without replacement.

    A list holds the target and items that the user has not met, no two with a text that a reader
    would take for the same (`matching_key`), none with the text of an item of the history, in
    random order. Items without text are no candidates, and cases whose target has none are dropped
    and counted, unless the whole catalogue has no text. What a case gets depends on data, seed,
    user and target alone, not on the other cases.

    Args:
        dataset: Histories, ids, texts.
        cases: All test cases.
        candidates: Items that may be recommended, (N + 1,). The target always may.
        popularity: Training interactions of the items, (N + 1,); for source popularity.
        config: How many, from where.

    Returns:
        The indices of the sampled cases, ascending, and their lists.

    Raises:
        UsageError: There are not so many candidates, or no case whose target has a text.
    """
    assert config.size != "all" and config.source in DRAWN
    groups = text_groups(dataset.catalog)
    kept, counts = eligible_sample(dataset, cases, candidates, groups, config)
    weights = (popularity if config.source == "popularity" else np.ones_like(popularity)).astype(
        np.float64
    )
    shelf = _Shelf.of(np.where(candidates & (groups > 0), weights, 0.0), groups)
    interactions, wanted = dataset.interactions, config.size - 1
    items: Int32 = np.zeros((len(kept), config.size), dtype=np.int32)
    for row, (case, name) in enumerate(zip(kept, _names(dataset, cases, kept), strict=True)):
        start, end = interactions.offsets[cases.user[case]], cases.end[case]
        target = interactions.items[cases.target[case]]
        blocked = groups[np.append(interactions.items[start:end], target)]
        rng = np.random.default_rng(_hash(b"draw", config.seed, name))
        rivals = shelf.draw(rng, blocked, wanted)
        if len(rivals) < wanted:
            raise UsageError(
                f"evaluation.pool.size={config.size} needs {wanted} items that user "
                f"{dataset.user_ids[cases.user[case]]!r} has not met, but the data has "
                f"{len(rivals)} of distinct text{_trained(config)}. Lower evaluation.pool.size."
            )
        items[row] = rng.permutation(np.append(rivals, target))
    return kept, _pools(dataset, cases, kept, items, counts, config)


def _trained(config: PoolConfig) -> str:
    return " that were trained on" if config.source == "popularity" else ""


def pools_from_lists(
    dataset: Dataset,
    cases: Cases,
    kept: Int64,
    lists: Int32,
    counts: dict[str, int],
    config: PoolConfig,
) -> Pools:
    """Candidates that another recommender produced, in random order, texts distinct as ever.

    Args:
        dataset: For ids and texts.
        cases: All test cases.
        kept: Indices of the sampled ones, (C,).
        lists: What was recommended to these, best first, padded with 0, (C, M); of two items with
            one text the better stays, and the first `config.size` are taken. The target is not
            forced in; how many lists lack it is counted as ``targets_outside_pool``.
        counts: What `eligible_sample` counted.
        config: Size and seed.
    """
    assert config.size != "all"
    groups = text_groups(dataset.catalog)
    items: Int32 = np.zeros((len(kept), config.size), dtype=np.int32)
    for row, name in enumerate(_names(dataset, cases, kept)):
        found = lists[row][groups[lists[row]] > 0]
        found = found[_first_of_each(groups[found])][: config.size]
        rng = np.random.default_rng(_hash(b"draw", config.seed, name))
        items[row, : len(found)] = rng.permutation(found)
    targets = dataset.interactions.items[cases.target[kept]]
    outside = int((items != targets[:, None]).all(axis=1).sum())
    counts = counts | {"targets_outside_pool": outside}
    return _pools(dataset, cases, kept, items, counts, config)


def eligible_sample(
    dataset: Dataset, cases: Cases, candidates: Bool, groups: Int64, config: PoolConfig
) -> tuple[Int64, dict[str, int]]:
    """The sampled cases among those whose target can be told from others, and what was left out.

    Raises:
        UsageError: There is none.
    """
    known = groups[dataset.interactions.items[cases.target]] > 0
    eligible = np.flatnonzero(known)
    if not len(eligible):
        raise UsageError(
            f"evaluation.pool.size={config.size}: no test case has a target with a text. Name a "
            "template with more fields in data.item_text, or use evaluation.pool.size=all."
        )
    kept = sample_cases(dataset, cases, eligible, config)
    offered = groups[candidates & (groups > 0)]
    sizes = np.bincount(offered)
    return kept, {
        "cases": len(cases),
        "cases_dropped_target_without_text": int((~known).sum()),
        "cases_sampled": len(kept),
        "items_without_text_left_out": int((candidates[1:] & (groups[1:] == 0)).sum()),
        "items_sharing_a_text": int(sizes[sizes > 1].sum()),
    }


def text_groups(catalog: Catalog) -> Int64:
    """Items with the same number have the same text to a reader; 0 has none: (N + 1,).

    Where no item has a text at all, each is a group of its own.
    """
    if not any(catalog.texts):
        return np.arange(len(catalog) + 1)
    numbers = {"": 0}
    found = [numbers.setdefault(matching_key(text), len(numbers)) for text in catalog.texts]
    return np.array([0, *found], dtype=np.int64)


@dataclass(frozen=True)
class _Shelf:
    """What rivals are drawn from."""

    items: NDArray[np.int64]
    """(E,)."""
    weights: NDArray[np.float64]
    """Above 0, (E,)."""
    cumulative: NDArray[np.float64]
    groups: Int64
    """Of every item, (N + 1,)."""
    taken: Bool = field(repr=False)
    """By group; all False between two draws."""

    @classmethod
    def of(cls, weights: NDArray[np.float64], groups: Int64) -> _Shelf:
        items = np.flatnonzero(weights > 0)
        found = weights[items]
        taken = np.zeros(int(groups.max(initial=0)) + 1, dtype=np.bool_)
        return cls(items, found, np.cumsum(found), groups, taken)

    def draw(self, rng: np.random.Generator, blocked: Int64, wanted: int) -> Int64:
        """`wanted` items one after another in proportion to weight, of distinct groups not blocked.

        Draws with replacement whose repeats are skipped, which comes to the same; what these leave
        open is drawn from the rest exactly, by the least of exponential times (Efraimidis and
        Spirakis 2006). Fewer where there are no more.
        """
        if not len(self.items):
            return self.items
        places = rng.random(2 * wanted + 8) * self.cumulative[-1]
        # Rounding may reach the sum itself, hence the last place as an upper bound.
        last = len(self.items) - 1
        drawn: Int64 = self.items[
            np.minimum(np.searchsorted(self.cumulative, places, "right"), last)
        ]
        self.taken[blocked] = True
        drawn = drawn[~self.taken[self.groups[drawn]]]
        drawn = drawn[_first_of_each(self.groups[drawn])][:wanted]
        if len(drawn) < wanted:
            self.taken[self.groups[drawn]] = True
            left = ~self.taken[self.groups[self.items]]
            times = rng.standard_exponential(int(left.sum())) / self.weights[left]
            rest = self.items[left][np.argsort(times)]
            rest = rest[_first_of_each(self.groups[rest])][: wanted - len(drawn)]
            self.taken[self.groups[drawn]] = False
            drawn = np.append(drawn, rest)
        self.taken[blocked] = False
        return drawn


def _first_of_each(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places at which a group occurs for the first time, ascending."""
    places: NDArray[np.int64] = np.unique(groups, return_index=True)[1]
    return np.sort(places)


def _names(dataset: Dataset, cases: Cases, indices: Int64) -> list[bytes]:
    """What tells a case from any other, whatever the numbers inside: user and target by id."""
    targets = dataset.interactions.items[cases.target[indices]]
    pairs = zip(cases.user[indices], targets, strict=True)
    named = ((dataset.user_ids[user], dataset.catalog.ids[target - 1]) for user, target in pairs)
    return [_sized(user) + _sized(target) for user, target in named]


def _sized(identifier: str) -> bytes:
    encoded = identifier.encode()
    return len(encoded).to_bytes(8, "little") + encoded


def _hash(purpose: bytes, seed: int, name: bytes) -> NDArray[np.uint64]:
    """Two random words, (2,)."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + name, digest_size=16, person=purpose)
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def _pools(
    dataset: Dataset,
    cases: Cases,
    kept: Int64,
    items: Int32,
    counts: dict[str, int],
    config: PoolConfig,
) -> Pools:
    digest, ids = hashlib.sha256(), dataset.catalog.ids
    for name, row in zip(_names(dataset, cases, kept), items.tolist(), strict=True):
        digest.update(name)
        shown = b"".join(_sized(ids[item - 1]) for item in row if item)
        digest.update(len(shown).to_bytes(8, "little") + shown)
    return Pools(items, digest.hexdigest(), counts, config)


def write_pools(folder: Path, dataset: Dataset, cases: Cases, pools: Pools) -> None:
    """Keep the lists in a run folder, for others to score on the very same.

    Args:
        folder: The run folder.
        dataset: For the ids.
        cases: The sampled ones, (C,).
        pools: Their lists.
    """
    ids = ["", *dataset.catalog.ids]
    targets = dataset.interactions.items[cases.target]
    columns = {
        "user_id": [dataset.user_ids[user] for user in cases.user],
        "target_item_id": [ids[target] for target in targets],
        "candidate_item_ids": [[ids[item] for item in row if item] for row in pools.items.tolist()],
    }
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    write_atomically(folder / CANDIDATES, buffer.getvalue())
