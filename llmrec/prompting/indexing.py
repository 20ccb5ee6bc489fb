"""What an item is called in prompts and answers: a number, its title, or its place among clusters.

Nothing here looks past the training parts: a number that grows along whole sequences tells the
test item, and so would a cluster that the test item's own meeting formed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from llmrec.data.interactions import Dataset, Float32, Int32, Int64, Interactions
from llmrec.data.titles import displayed, matching_key
from llmrec.errors import UsageError
from llmrec.runs import write_json

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

VERSION = 1
"""Of the saved file."""
STALLED = 0.6
"""A cut that leaves a larger share of a group in one cluster only peels some items off. Cutting the
group evenly instead keeps names short: 3 to 5 tokens on Amazon Beauty rather than 3 to 8, with as
many co-occurrences inside leaves (6.4 %)."""
DENSE = 400
"""Items up to which a group's eigenvectors are solved for densely, which is then the faster way."""
CLUSTERING = ("clusters", "leaf", "history")
"""Options of collaborative indexing alone."""
MAX_ITERATIONS = 100
"""Restarts of the sparse eigensolver before its best guess is taken."""


@dataclass(frozen=True)
class IndexingConfig:
    """What items are called in prompts and answers."""

    name: Literal["random", "sequential", "collaborative", "title"] = "random"
    """random: item_1234, numbers shuffled. sequential: numbers by first appearance in the training
    parts, so that items met together have numbers close by. collaborative: tokens of clusters of
    items that the same users met in training, such as <c1_7><c2_3><c3_11>. title: the item's text,
    a repeated one told apart by a number."""
    seed: int = 0
    """Of shuffles and clusters."""
    clusters: int = 20
    """Clusters that a group of items is cut into at most, 2 or more; collaborative only."""
    leaf: int = 20
    """Items up to which a group is left whole, 1 or more; collaborative only."""
    history: int = 100
    """Most recent training interactions of a user whose pairs are counted; collaborative only."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built, and what would be ignored.

        Raises:
            UsageError: A number out of range, or one that this indexing does not read.
        """
        least = {"seed": 0, "clusters": 2, "leaf": 1, "history": 2}
        values = {"seed": self.seed, "clusters": self.clusters, "leaf": self.leaf}
        for option, value in (values | {"history": self.history}).items():
            if value < least[option]:
                raise UsageError(f"indexing.{option}={value}: use {least[option]} or more.")
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in CLUSTERING and self.name != "collaborative" and value != one.default:
                raise UsageError(
                    f"indexing.{one.name}={value} is read by indexing.name=collaborative alone; "
                    f"leave it out for {self.name}."
                )


@dataclass(frozen=True)
class Indexing:
    """The name of every item."""

    name: str
    """How it was made."""
    mentions: tuple[str, ...]
    """(N,): what item i + 1 is called in prompts and answers; distinct, never empty."""
    tokens: tuple[str, ...] = ()
    """Strings that a tokenizer must know as whole tokens."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What building it met: groups cut by spectrum or evenly, items nobody met with another."""

    @property
    def fingerprint(self) -> str:
        """sha256 over name, mentions and tokens: equal only for equal indexing."""
        return _hash([self.name, *self.mentions, "|", *self.tokens])


def build_indexing(config: IndexingConfig, dataset: Dataset, train_end: Int64) -> Indexing:
    """Name every item, by the training parts alone.

    Args:
        config: Which names.
        dataset: The items, and who met them.
        train_end: (U,): user u's training part ends here, as in `Split`.

    Returns:
        The indexing; equal for equal config, items and training parts.

    Raises:
        UsageError: Titles are asked for and the items have no text.
    """
    if config.name == "title":
        return Indexing("title", _distinct_titles(dataset))
    rng = np.random.default_rng(config.seed)
    if config.name == "collaborative":
        return _collaborative(config, dataset, train_end)
    order = rng.permutation(dataset.item_count)  # of items, from 0
    if config.name == "sequential":
        met = _training_items(dataset.interactions, train_end)
        _, first = np.unique(met, return_index=True)
        walked = met[np.sort(first)] - 1
        # Items nobody was trained on come last, shuffled: their number must say nothing.
        order = np.concatenate([walked, order[~np.isin(order, walked)]])
    numbers = np.empty(dataset.item_count, np.int64)
    numbers[order] = np.arange(1, dataset.item_count + 1)
    return Indexing(config.name, tuple(f"item_{number}" for number in numbers.tolist()))


def save_indexing(path: Path, indexing: Indexing, dataset: Dataset) -> None:
    """Write an indexing as JSON, with what tells it from a damaged one and from other items'."""
    content = {
        "version": VERSION,
        "name": indexing.name,
        "items": _hash(dataset.catalog.ids),
        "fingerprint": indexing.fingerprint,
        "counts": dict(indexing.counts),
        "tokens": indexing.tokens,
        "mentions": indexing.mentions,
    }
    write_json(path, content)


def load_indexing(path: Path, dataset: Dataset) -> Indexing:
    """Read what `save_indexing` wrote.

    Raises:
        UsageError: There is none, it is damaged, of another version, or of other items.
    """
    again = "make it again with llmrec prompts."
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no indexing, or a damaged one: {again}") from error
    if version != VERSION:
        raise UsageError(f"{path} is an indexing of version {version}, not {VERSION}: {again}")
    try:
        found = Indexing(
            content["name"], tuple(content["mentions"]), tuple(content["tokens"]), content["counts"]
        )
        whole = found.fingerprint == content["fingerprint"]
        same_items = content["items"] == _hash(dataset.catalog.ids)
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is a damaged indexing: {again}") from error
    if not whole:
        raise UsageError(f"{path} is a damaged indexing: {again}")
    if not same_items:
        raise UsageError(
            f"{path} names other items than those of {dataset.name}: use the data and the filters "
            "that it was made for, or make it again."
        )
    return found


def _hash(strings: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for string in strings:
        encoded = string.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _training_items(interactions: Interactions, train_end: Int64) -> Int32:
    """The items of all training parts, user by user, oldest first."""
    places = np.arange(len(interactions.items))
    return interactions.items[places < np.repeat(train_end, interactions.lengths)]


def _distinct_titles(dataset: Dataset) -> tuple[str, ...]:
    """Every item's text as prompts show it; a repeated one bears a number no other title has."""
    titles = [displayed(text) for text in dataset.catalog.texts]
    if not any(titles):
        raise UsageError(
            f"indexing.name=title, but the items of {dataset.name} have no text: use random, "
            "sequential or collaborative."
        )
    titles = [title or "untitled" for title in titles]
    keys = [matching_key(title) for title in titles]
    known = set(keys)  # by key: two titles that a tokenizer may read alike are not distinct
    numbers: dict[str, int] = {}  # key -> the last number given to a title of it
    for place, key in enumerate(keys):
        if key not in numbers:
            numbers[key] = 1
            continue
        title = titles[place]
        while matching_key(titles[place]) in known:
            numbers[key] += 1
            titles[place] = f"{title} ({numbers[key]})"
        known.add(matching_key(titles[place]))
    return tuple(titles)


def _collaborative(config: IndexingConfig, dataset: Dataset, train_end: Int64) -> Indexing:
    """Cut the items into clusters, those into clusters, until a group fits into one leaf."""
    together = co_occurrence(dataset.interactions, train_end, dataset.item_count, config.history)
    counts = {
        "items_never_met_with_another": int((np.diff(together.indptr) == 0).sum()),
        "groups_cut_by_spectrum": 0,
        "groups_cut_evenly": 0,
        "eigensolver_stopped_early": 0,
    }
    cutter = _Cutter(config, counts)
    paths: list[str] = [""] * dataset.item_count
    tokens: set[tuple[int, int]] = set()  # (level, number)
    groups = [(np.arange(dataset.item_count), together, "", 1)]
    while groups:
        items, near, path, level = groups.pop()
        labels = np.arange(len(items)) if len(items) <= config.leaf else cutter.cut(near)
        for label in range(int(labels.max()) + 1):
            inside = np.flatnonzero(labels == label)
            tokens.add((level, label))
            longer = f"{path}<c{level}_{label}>"
            if len(items) <= config.leaf:
                paths[items[inside[0]]] = longer
            else:
                groups.append((items[inside], near[inside][:, inside], longer, level + 1))
    names = tuple(f"<c{level}_{label}>" for level, label in sorted(tokens))
    return Indexing("collaborative", tuple(paths), names, counts)


def co_occurrence(
    interactions: Interactions, train_end: Int64, item_count: int, history: int
) -> csr_matrix:
    """How many users have both of two items among their last training interactions.

    Args:
        interactions: Who met what.
        train_end: (U,): where training parts end.
        item_count: N.
        history: Interactions of a user that count, the most recent ones of the training part: the
            work for one user is its square.

    Returns:
        (N, N) float32, symmetric, without diagonal; row i is item i + 1.
    """
    starts = np.maximum(interactions.offsets[:-1], train_end - history)
    places = np.arange(len(interactions.items))
    lengths = interactions.lengths
    kept = (places >= np.repeat(starts, lengths)) & (places < np.repeat(train_end, lengths))
    users, items = interactions.users()[kept], interactions.items[kept] - 1
    shape = (interactions.user_count, item_count)
    met = sparse.csr_matrix((np.ones(len(items), np.float32), (users, items)), shape=shape)
    met.data[:] = 1  # a repeated item is one
    together = (met.T @ met).tocsr()  # (N, U) x (U, N) -> (N, N)
    together.setdiag(0)
    together.eliminate_zeros()
    together.sort_indices()
    return together


class _Cutter:
    """Cuts a group of items into clusters of those that go together.

    Spectral clustering: k-means on the leading eigenvectors of the normalised co-occurrence
    (Ng, Jordan and Weiss 2001). Degrees are raised by their mean (Qin and Rohe 2013), without which
    every stray pair of items is an eigenvector of its own.
    """

    def __init__(self, config: IndexingConfig, counts: dict[str, int]) -> None:
        self.config, self.counts = config, counts

    def cut(self, near: csr_matrix) -> NDArray[np.int64]:
        """Numbers of the clusters, from 0 without a gap: (n, n) -> (n,)."""
        size = near.shape[0]
        wanted = min(self.config.clusters, -(-size // self.config.leaf))
        labels = np.empty(size, np.int64)
        degrees = np.asarray(near.sum(axis=1)).ravel()
        tied, alone = np.flatnonzero(degrees > 0), np.flatnonzero(degrees == 0)
        # Nothing is known of the others: an even share for every cluster, at every level.
        labels[alone] = np.random.default_rng(self.config.seed).permutation(len(alone)) % wanted
        if len(tied):
            part = near if not len(alone) else near[tied][:, tied]
            labels[tied] = self._cut_tied(part, degrees[tied], min(wanted, len(tied)))
        return np.unique(labels, return_inverse=True)[1]

    def _cut_tied(
        self, near: csr_matrix, degrees: Float32, wanted: int
    ) -> NDArray[np.int64] | NDArray[np.int32]:
        from sklearn.cluster import KMeans  # here: a second to load, which other names do without

        size = near.shape[0]
        if size <= wanted:
            return np.arange(size)
        vectors = self._eigenvectors(near, degrees, wanted)  # (n, wanted), leading first
        rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        means = KMeans(wanted, n_init=1, max_iter=50, random_state=self.config.seed)
        labels: NDArray[np.int32] = means.fit_predict(rows)
        if np.bincount(labels).max() <= STALLED * size:
            self.counts["groups_cut_by_spectrum"] += 1
            return labels
        self.counts["groups_cut_evenly"] += 1
        # Along the vector that separates best; never endless, as each share is smaller.
        order = np.argsort(vectors[:, 1] / np.sqrt(degrees + degrees.mean()), kind="stable")
        labels[order] = np.arange(size) * wanted // size
        return labels

    def _eigenvectors(self, near: csr_matrix, degrees: Float32, wanted: int) -> NDArray[np.float64]:
        """Of the `wanted` largest eigenvalues, those first: (n, n) -> (n, wanted)."""
        size = near.shape[0]
        scale = sparse.diags(1 / np.sqrt(degrees + degrees.mean()))
        normalised = (scale @ near @ scale).astype(np.float64)
        if size <= max(DENSE, 3 * wanted):
            return np.linalg.eigh(normalised.toarray())[1][:, : -wanted - 1 : -1]
        start = np.random.default_rng(self.config.seed).random(size)
        solver = sparse.linalg
        try:
            values, vectors = solver.eigsh(
                normalised, wanted, which="LA", v0=start, tol=1e-2, maxiter=MAX_ITERATIONS
            )
        except solver.ArpackNoConvergence as error:
            self.counts["eigensolver_stopped_early"] += 1
            values, vectors = error.eigenvalues, error.eigenvectors
            if vectors.shape[1] < 2:
                values, vectors = np.arange(2, 0, -1), np.column_stack([np.ones(size), start])
        found: NDArray[np.float64] = vectors[:, np.argsort(-values)]
        return found
