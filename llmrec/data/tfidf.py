"""TF-IDF of item texts: a text space that needs no language model, and item features from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec.data.interactions import Float32, Int32, Int64

Float64 = NDArray[np.float64]

BLOCK_BYTES = 1 << 20
"""About what a block of lists, or of text rows, holds at once: little enough for the cache."""
TOKEN = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+"
)
"""A run of letters and digits of any script; Chinese and Japanese, written without spaces, one
character at a time. One-character tokens count."""


@dataclass(frozen=True)
class TextSpace:
    """Item texts as sparse unit vectors; row i describes item i, row 0 (padding) is empty."""

    offsets: Int64
    """Row bounds, (N + 2,)."""
    terms: Int32
    """Column of every entry, (nnz,); distinct and ascending within a row."""
    weights: Float64
    """Its value, (nnz,)."""
    width: int
    """V, the number of distinct tokens."""


def tfidf_space(texts: Sequence[str]) -> TextSpace:
    """TF-IDF of item texts: a reference space that needs no encoder and is the same for every row.

    Lower-cased, cut by `TOKEN`; weight (1 + ln tf) * (ln((1 + N) / (1 + df)) + 1), rows scaled to
    length 1; as scikit-learn's ``TfidfVectorizer(sublinear_tf=True)`` with the same tokens. An item
    without tokens has an empty row.

    Args:
        texts: (N,).
    """
    vocabulary: dict[str, int] = {}
    tokens: list[int] = []
    lengths = np.zeros(len(texts) + 1, dtype=np.int64)
    for item, text in enumerate(texts, start=1):
        found = TOKEN.findall(text.lower())
        tokens += [vocabulary.setdefault(token, len(vocabulary)) for token in found]
        lengths[item] = len(found)
    width = max(1, len(vocabulary))
    items = np.repeat(np.arange(len(texts) + 1), lengths)
    keys, tf = np.unique(items * width + np.array(tokens, dtype=np.int64), return_counts=True)
    rows, terms = np.divmod(keys, width)
    df = np.bincount(terms, minlength=width)
    weights = (1 + np.log(tf)) * (np.log((1 + len(texts)) / (1 + df[terms])) + 1)
    norms = np.sqrt(np.bincount(rows, weights**2, minlength=len(texts) + 1))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(texts) + 1))])
    return TextSpace(
        offsets.astype(np.int64), terms.astype(np.int32), weights / norms[rows], len(vocabulary)
    )


def tfidf_features(texts: Sequence[str], width: int = 384, seed: int = 0) -> Float32:
    """TF-IDF as dense item features, (N, H) float32; row i describes item i + 1.

    The `tfidf_space` in its `width` largest principal directions (uncentred; a randomised truncated
    SVD with four power iterations, Halko, Martinsson and Tropp, 2011), so that dot products between
    items are kept as well as H columns can. Directions come largest first, each with its largest
    entry positive; where there are fewer than H, the rest are 0.

    Args:
        texts: (N,).
        width: H.
        seed: Of the random start.
    """
    space = tfidf_space(texts)
    features = np.zeros((len(texts), width), dtype=np.float32)
    sketch = min(width + 10, len(texts), space.width)
    if sketch == 0:
        return features
    backwards = _transposed(space)
    start = np.random.default_rng(seed).standard_normal((space.width, sketch))
    basis = np.linalg.qr(_times(space, start))[0]  # (N + 1, sketch)
    for _ in range(4):
        basis = np.linalg.qr(_times(space, _times(backwards, basis)))[0]
    # The transpose of (basis^T A) is (V, sketch); its left singular vectors are directions in V.
    directions, sizes, _ = np.linalg.svd(_times(backwards, basis), full_matrices=False)
    kept = directions[:, :width][:, sizes[:width] > 1e-6 * sizes[0]]
    largest = np.abs(kept).argmax(axis=0)
    kept = kept * np.sign(kept[largest, np.arange(kept.shape[1])])
    features[:, : kept.shape[1]] = _times(space, kept)[1:]
    return features


def _transposed(space: TextSpace) -> TextSpace:
    """The (V, N + 1) matrix as rows of its own."""
    items = np.repeat(np.arange(len(space.offsets) - 1), np.diff(space.offsets))
    order = np.argsort(space.terms, kind="stable")
    counts = np.bincount(space.terms, minlength=space.width)
    return TextSpace(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        terms=items[order].astype(np.int32),
        weights=space.weights[order],
        width=len(space.offsets) - 1,
    )


def _times(space: TextSpace, dense: Float64) -> Float64:
    """Sparse times dense: (R, V) x (V, D) -> (R, D)."""
    product = np.zeros((len(space.offsets) - 1, dense.shape[1]))
    filled = np.flatnonzero(np.diff(space.offsets))
    step = max(1, BLOCK_BYTES // (8 * dense.shape[1]))  # entries held at once
    # Whole rows of about `step` entries together; a longer row is a block of its own.
    blocks = np.split(filled, np.flatnonzero(np.diff(space.offsets[filled] // step)) + 1)
    for rows in blocks if len(filled) else []:
        first, last = space.offsets[rows[0]], space.offsets[rows[-1] + 1]
        entries = dense[space.terms[first:last]] * space.weights[first:last, None]
        product[rows] = np.add.reduceat(entries, space.offsets[rows] - first, axis=0)
    return product
