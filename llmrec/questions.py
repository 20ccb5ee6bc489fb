"""Which test cases are asked about, and among which candidates: one answer for every program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from llmrec.data.interactions import Dataset, Int64, Split
from llmrec.data.splits import split, training_counts
from llmrec.errors import UsageError
from llmrec.evaluation.config import EvaluationConfig
from llmrec.evaluation.metrics import merge
from llmrec.evaluation.pools import (
    DRAWN,
    PoolConfig,
    Pools,
    draw_pools,
    eligible_sample,
    pools_from_lists,
    text_groups,
)


def pool_cases(
    pool: PoolConfig, dataset: Dataset, cut: Split, train_end: Int64, device: str
) -> tuple[Split, Pools | None]:
    """The split with the test cases that are asked about, and the candidates of each.

    Equal for any program, given equal data, split and options of the pool.

    Args:
        pool: how candidates are found; for ``size=all``, nothing changes and there are no lists.
        dataset: the data.
        cut: all test cases.
        train_end: (U,), the end of training without validation; decides the items' popularity.
        device: where a run that candidates are taken from is put.

    Raises:
        UsageError: Too few candidates; a source that is no finished run, or one of other data.
    """
    if pool.size == "all":
        return cut, None
    if pool.source in DRAWN:
        counts = training_counts(dataset.interactions, train_end, dataset.item_count)
        kept, pools = draw_pools(dataset, cut.test, cut.test_candidates, counts, pool)
    else:
        kept, pools = _pools_of_run(pool, dataset, cut, device)
    return replace(cut, test=cut.test.take(kept)), pools


def _pools_of_run(
    pool: PoolConfig, dataset: Dataset, cut: Split, device: str
) -> tuple[Int64, Pools]:
    """Candidates that a trained run recommends."""
    # Here, so that lists which need no run need no torch either.
    import torch

    from llmrec.assembly import recommender_scores, restore
    from llmrec.evaluation.ranking import rank_scores

    assert pool.size != "all"
    if not Path(pool.source).is_dir():
        raise UsageError(
            f"evaluation.pool.source={pool.source} is no folder of a finished run. Name one, or "
            "use random or popularity."
        )
    restored, interactions = restore(Path(pool.source), torch.device(device)), dataset.interactions
    theirs, their_cut = restored.dataset, split(restored.dataset, restored.config.split)
    same = (
        np.array_equal(theirs.interactions.items, interactions.items)
        and np.array_equal(theirs.interactions.offsets, interactions.offsets)
        and (theirs.user_ids, theirs.catalog.ids) == (dataset.user_ids, dataset.catalog.ids)
        and np.array_equal(their_cut.test.target, cut.test.target)
    )
    if not same:
        raise UsageError(
            f"evaluation.pool.source={pool.source} was trained on other data or another split, so "
            "it may have seen the answers. Name a run of the same data and split."
        )
    groups = text_groups(dataset.catalog)
    kept, counts = eligible_sample(dataset, cut.test, cut.test_candidates, groups, pool)
    cases, length = cut.test.take(kept), restored.config.model.max_length
    scores = recommender_scores(
        restored.recommender, interactions, cases, length, torch.device(device)
    )
    # Twice as many, for items that share their text with a better one are left out.
    config = EvaluationConfig(top_k=2 * pool.size)
    offered = cut.test_candidates & (groups > 0)
    ranked = rank_scores(scores, dataset.item_count, interactions, cases, offered, config)
    lists = merge([ranked], len(cases)).top_items
    return kept, pools_from_lists(dataset, cut.test, kept, lists, counts, pool)
