"""Ranking in blocks by counting: a matrix product per block, never a (C, N) matrix.

All candidates are ranked, or those of each case's own list; scores are the same bits in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrec.data.interactions import Bool, Cases, Int32, Int64, Interactions
from llmrec.errors import UsageError
from llmrec.evaluation.config import EvaluationConfig
from llmrec.evaluation.metrics import Ranking, tie_keys
from llmrec.evaluation.pools import Pools
from llmrec.evaluation.products import ItemChunks, Scores, UserVectors, dot_products

COUNT_BYTES = 1 << 20
"""Comparison buffer, bytes: rows are counted in groups that stay in the processor's cache."""
MAX_ITEMS = 1 << 24
"""Counts are sums of ones in float32, which are exact up to here."""
DIVERGED = (
    "A score is NaN or infinite, so nothing can be ranked: the user or item vectors have diverged. "
    "Lower the learning rate or clip gradients, and train again."
)


def case_blocks(
    interactions: Interactions, cases: Cases, item_count: int, config: EvaluationConfig
) -> list[Int64]:
    """Case indices in fixed blocks, by length of the visible history, so that a block trims well.

    The blocks depend on the data and the config alone, never on the number of processes: a user's
    vector and scores are then the same for any world size.

    Returns:
        Arrays of case indices, each of at most ``block_megabytes`` of float32 scores (one case at
        least).
    """
    lengths = cases.end - interactions.offsets[cases.user]
    order = np.argsort(lengths, kind="stable")
    width = ItemChunks.padded(item_count + 1)[1]
    rows = max(1, (config.block_megabytes << 20) // (4 * width))
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def rank(
    user_vectors: UserVectors,
    item_vectors: Tensor,
    interactions: Interactions,
    cases: Cases,
    candidates: Bool | Pools,
    config: EvaluationConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> tuple[Int64, Ranking]:
    """Rank the target of every case among its candidates by dot product, in float32.

    Args:
        user_vectors: Called once per block of `case_blocks`, in order.
        item_vectors: (N + 1, D), row 0 is padding. Scores are computed on its device.
        interactions: What the cases index into.
        cases: The questions.
        candidates: See `rank_scores`.
        config: Seen filter, top K, block size.
        process_index: This process.
        process_count: Processes that share the work.

    Returns:
        See `rank_scores`.

    Raises:
        UsageError: A score is NaN or infinite.
    """
    scores = dot_products(user_vectors, item_vectors)
    count = len(item_vectors) - 1
    shares = (process_index, process_count)
    return rank_scores(scores, count, interactions, cases, candidates, config, *shares)


def rank_scores(
    scores: Scores,
    item_count: int,
    interactions: Interactions,
    cases: Cases,
    candidates: Bool | Pools,
    config: EvaluationConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> tuple[Int64, Ranking]:
    """Rank the target of every case among its candidates by any scores.

    Args:
        scores: Called once per block of `case_blocks`, in order.
        item_count: N.
        interactions: What the cases index into.
        cases: The questions.
        candidates: Items that may be recommended to anybody, (N + 1,); seen ones are then filtered
            as the config says, and the target is always one. Or each case's own list, which is
            ranked as it is.
        config: Seen filter, top K, block size.
        process_index: This process; block b belongs to process ``b % process_count``.
        process_count: Processes that share the work.

    Returns:
        The case indices this process ranked, (C',), and their ranking; `metrics.merge` joins the
        parts.

    Raises:
        UsageError: A score is NaN or infinite.
    """
    if item_count >= MAX_ITEMS:
        raise UsageError(
            f"{item_count} items: exact ranking counts up to {MAX_ITEMS - 1}; filter the catalogue."
        )
    own = case_blocks(interactions, cases, item_count, config)[process_index::process_count]
    if isinstance(candidates, Pools):
        if len(candidates.items) != len(cases):
            raise ValueError(f"{len(candidates.items)} lists for {len(cases)} cases.")
        parts = [
            _rank_pools(
                scores(block), candidates.items[block], interactions, cases, block, config.top_k
            )
            for block in own
        ]
    else:
        if candidates.shape != (item_count + 1,):
            raise ValueError(f"candidates {candidates.shape} for {item_count} items and padding.")
        ranker = _BlockRanker(candidates, config)
        parts = [
            ranker.rank(scores(block), _Questions.of(interactions, cases, block)) for block in own
        ]
    return np.concatenate([np.empty(0, np.int64), *own]), _concatenate(parts, config.top_k)


@torch.inference_mode()
def _rank_pools(
    scores: Tensor,
    items: Int32,
    interactions: Interactions,
    cases: Cases,
    block: Int64,
    top_k: int,
) -> Ranking:
    """One block by the scores of its own candidates, (B, N + 1) and (B, K)."""
    places = torch.from_numpy(items.astype(np.int64)).to(scores.device)
    found = scores.gather(1, places).double().cpu().numpy()  # (B, K)
    found[items == 0] = np.nan
    if not np.isfinite(found[items > 0]).all():
        raise UsageError(DIVERGED)
    targets = interactions.items[cases.target[block]]
    return Ranking.from_scores(found, items, targets, cases.user[block].astype(np.int64), top_k)


@dataclass(frozen=True)
class _Questions:
    """One block of cases with their histories laid out for a scatter."""

    users: Int64
    """(B,)."""
    targets: Int64
    """Item ids, (B,)."""
    seen_rows: Int64
    """The block row of every visible interaction, (T,)."""
    seen_items: Int64
    """Its item, (T,)."""

    @classmethod
    def of(cls, interactions: Interactions, cases: Cases, block: Int64) -> _Questions:
        starts = interactions.offsets[cases.user[block]]
        lengths = cases.end[block] - starts
        rows = np.repeat(np.arange(len(block)), lengths)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        seen = interactions.items[starts[rows] + within]
        users, targets = cases.user[block], interactions.items[cases.target[block]]
        return cls(users.astype(np.int64), targets.astype(np.int64), rows, seen.astype(np.int64))


class _BlockRanker:
    """What is done to a block of scores where everybody has the same candidates."""

    def __init__(self, candidates: Bool, config: EvaluationConfig) -> None:
        self.config = config
        self.candidates = candidates.copy()
        self.candidates[0] = False  # padding

    @torch.inference_mode()
    def rank(self, scores: Tensor, questions: _Questions) -> Ranking:
        """One block: (B, N + 1) scores or wider, overwritten here -> the ranking of its B cases."""
        width, device = scores.shape[1], scores.device
        targets = torch.from_numpy(questions.targets).to(device)
        # From the product itself: a separately computed dot product differs in the last bit.
        target_scores = scores.gather(1, targets[:, None]).clone()  # (B, 1)
        allowed = np.zeros(width, dtype=np.bool_)
        allowed[: len(self.candidates)] = self.candidates
        excluded = torch.from_numpy(np.flatnonzero(~allowed)).to(device)
        scores.index_fill_(1, excluded, -torch.inf)
        sizes, reachable = self._filter_seen(scores, questions)
        if self.config.filter_seen != "papers":
            scores.scatter_(1, targets[:, None], target_scores)
        else:
            kept = torch.from_numpy(reachable).to(device)[:, None]
            scores.scatter_(1, targets[:, None], target_scores.masked_fill(~kept, -torch.inf))
        top_items = self._top(scores, target_scores, questions.users)
        greater = self._count(torch.gt, scores, target_scores)
        equal = self._count(torch.eq, scores, target_scores) - 1  # less the target itself
        return Ranking(
            greater=np.where(reachable, greater, sizes),
            equal=np.where(reachable, equal, 0),
            candidates=sizes,
            reachable=reachable,
            top_items=top_items,
        )

    def _filter_seen(self, scores: Tensor, questions: _Questions) -> tuple[Int64, Bool]:
        """Take seen items out of a block; how many candidates and which targets stay, each (B,).

        The target counts as a candidate always, but for ``papers`` when it was seen.
        """
        targets = questions.targets
        size = np.int64(self.candidates.sum())
        reachable = np.ones(len(targets), dtype=np.bool_)
        sizes = size + (~self.candidates[targets]).astype(np.int64)
        if self.config.filter_seen is False:
            return sizes, reachable
        rows, items = questions.seen_rows, questions.seen_items
        index = (
            torch.from_numpy(rows).to(scores.device),
            torch.from_numpy(items).to(scores.device),
        )
        scores.index_put_(index, scores.new_tensor(-torch.inf))
        repeats = items == targets[rows]
        keys = np.sort(rows * np.int64(scores.shape[1]) + items)  # np.unique is far slower here
        distinct = keys[np.diff(keys, prepend=-1) > 0]  # an item seen twice counts once
        gone_rows, gone_items = np.divmod(distinct, np.int64(scores.shape[1]))
        counted = (self.candidates[gone_items]) & (gone_items != targets[gone_rows])
        sizes = sizes - np.bincount(gone_rows[counted], minlength=len(targets))
        if self.config.filter_seen == "papers":
            reachable[rows[repeats]] = False
            sizes = sizes - ~reachable
        return sizes, reachable

    def _count(
        self, compare: Callable[..., Tensor], scores: Tensor, target_scores: Tensor
    ) -> Int64:
        """How many scores of each row compare true with its target's, (B,).

        Ones in a float buffer and a float sum: five times faster than the sum of a boolean
        comparison.
        """
        counts = torch.empty(len(scores), device=scores.device)
        group = max(1, min(len(scores), COUNT_BYTES // (4 * scores.shape[1])))
        comparison = torch.empty(group, scores.shape[1], device=scores.device)
        for start in range(0, len(scores), group):
            rows = slice(start, min(start + group, len(scores)))
            ones = comparison[: rows.stop - rows.start]
            compare(scores[rows], target_scores[rows], out=ones)
            torch.sum(ones, dim=1, out=counts[rows])
        return counts.cpu().numpy().astype(np.int64)

    def _top(self, scores: Tensor, target_scores: Tensor, users: Int64) -> Int32:
        """The K best of each row, ties by `tie_keys`, padded with 0: (B, width) -> (B, K)."""
        wanted = self.config.top_k
        kept = min(wanted, scores.shape[1] - 1)
        values, items = scores.topk(kept + 1, dim=1)  # one more, to see a tie across the cut
        # topk puts NaN first, so the best score and the target's tell of every broken one that
        # counts.
        broken = values[:, :1].isnan() | values[:, :1].isposinf() | ~target_scores.isfinite()
        if bool(broken.any()):
            raise UsageError(DIVERGED)
        cut = values[:, kept - 1]
        for row in torch.nonzero((cut == values[:, kept]) & ~cut.isneginf())[:, 0].tolist():
            # topk leaves it open which of the tied it returns.
            above = int((values[row, :kept] > cut[row]).sum())
            tied = torch.nonzero(scores[row] == cut[row])[:, 0].cpu().numpy()
            first = np.argpartition(tie_keys(users[row], tied), kept - above - 1)[: kept - above]
            items[row, above:kept] = torch.from_numpy(tied[first]).to(scores.device)
        values, items = values[:, :kept], items[:, :kept]
        keys = torch.from_numpy(tie_keys(users[:, None], items.cpu().numpy())).to(scores.device)
        order = keys.argsort(dim=1)
        items, values = items.gather(1, order), values.gather(1, order)
        values, order = values.sort(dim=1, descending=True, stable=True)
        items = items.gather(1, order).masked_fill(values.isneginf(), 0)
        top: NDArray[np.int32] = np.zeros((len(scores), wanted), dtype=np.int32)
        top[:, :kept] = items.cpu().numpy()
        return top


def _concatenate(parts: list[Ranking], top_k: int) -> Ranking:
    """Rankings of consecutive blocks as one."""
    empty = np.empty(0, np.int64)
    return Ranking(
        greater=np.concatenate([empty, *(part.greater for part in parts)]),
        equal=np.concatenate([empty, *(part.equal for part in parts)]),
        candidates=np.concatenate([empty, *(part.candidates for part in parts)]),
        reachable=np.concatenate([np.empty(0, np.bool_), *(part.reachable for part in parts)]),
        top_items=np.concatenate([np.empty((0, top_k), np.int32), *(p.top_items for p in parts)]),
    )
