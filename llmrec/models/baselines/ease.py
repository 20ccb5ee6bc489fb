"""EASE: a linear model of every item by all others, in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import torch
from scipy.linalg import lapack
from scipy.sparse import csr_array
from torch import Tensor

from llmrec.data.interactions import Int64
from llmrec.data.tfidf import Float64
from llmrec.errors import UsageError
from llmrec.evaluation.products import Scores
from llmrec.models.baselines.known import Known, together

GROUP = Path("/sys/fs/cgroup")
"""Where Linux tells what a container may use."""
COLUMNS = 512
"""Of the matrix that are mirrored at once."""


def ease(known: Known) -> Scores:
    """An item's score is what the distinct items of the visible history predict of it.

    Steck (2019, arXiv 1905.03375): the item weights that best rebuild who had what in training,
    none of its own, under a squared norm of weight `l2`. Histories are read whole, whatever
    `max_length`. An item never trained on scores 0, which is above all that the history speaks
    against.

    Raises:
        UsageError: The N x N matrix does not fit into memory, or `l2` is too small to invert it.
    """
    width = known.dataset.item_count + 1
    needed, free = 8 * width**2, available_bytes(GROUP)
    if needed > free:
        raise UsageError(
            f"model.name=ease holds a matrix of {width - 1:,} x {width - 1:,} items, "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are available. Use "
            "model.name=item_knn, or a machine with more memory."
        )
    weights = item_weights(known.training_matrix(), known.config.l2)

    def scores(block: Int64) -> Tensor:
        found = known.histories(block, "all") @ weights  # (B, N + 1) x (N + 1, N + 1)
        return torch.from_numpy(found.astype(np.float32))

    return scores


def item_weights(matrix: csr_array, l2: float) -> Float64:
    """EASE's weights: with P = (X'X + l2 I)^-1, entry (i, j) is -P_ij / P_jj, and 0 where i = j.

    In double precision and in one array of 8 (N + 1)^2 bytes.

    Args:
        matrix: X, (U, N + 1) of ones.
        l2: weight of the squared norm.

    Returns:
        (N + 1, N + 1); column j predicts item j.

    Raises:
        UsageError: `l2` is too small.
    """
    width = matrix.shape[1]
    gram = np.zeros((width, width))
    for items, counts in together(matrix):
        both = counts.tocoo()
        gram[items[both.row], both.col] = both.data
    # Cholesky's rounding is of the size of width * eps * norm: what adds less to the diagonal is
    # lost in it, and two items with the same users then get weights of any size.
    least = width * float(np.finfo(np.float64).eps * gram.sum(axis=1).max())
    gram[np.diag_indices(width)] += l2
    # In place; the transposed view is what LAPACK calls columns. Half the time of a general
    # inverse, and of symmetric matrices only one triangle is written.
    factor, failed = lapack.dpotrf(gram.T, lower=True, overwrite_a=True)
    if failed or l2 < least:
        raise UsageError(
            f"model.l2={l2} is too small to invert the matrix of these {width - 1:,} items in "
            f"double precision. Raise it, to {2 * least:.1g} at least."
        )
    inverse = lapack.dpotri(factor, lower=True, overwrite_c=True)[0].T  # upper triangle
    for first in range(0, width, COLUMNS):
        part = slice(first, first + COLUMNS)
        corner = np.triu(inverse[part, part])
        inverse[part, part] = corner + np.triu(corner, 1).T
        inverse[first + COLUMNS :, part] = inverse[part, first + COLUMNS :].T
    weights: Float64 = inverse
    weights /= -np.diag(inverse).copy()
    np.fill_diagonal(weights, 0)
    return weights


def available_bytes(group: Path) -> int:
    """Memory that a new array may take: the machine's, or what a container is left of its limit.

    Args:
        group: folder of the process's memory limits, as of control groups' second version; need not
            exist.
    """
    free: int = psutil.virtual_memory().available
    limit = group / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, int(most) - used + int(stat["inactive_file"]))  # cached files make room
    return free
