"""How many users and items there are, how often they are met, and which only outside training."""

from __future__ import annotations

import numpy as np

from llmrec.data.audit.findings import Finding, Verdict, counted, grade
from llmrec.data.interactions import Dataset, Split
from llmrec.data.splits import training_counts


def users_dropped(data: Dataset, cut: Split) -> Finding:
    """Users below data.min_user_interactions."""
    count, of = data.counts["users_dropped_too_few_interactions"], data.counts["users_read"]
    what = "users were dropped for too few interactions"
    remedy = "say whom results speak of, or lower data.min_user_interactions"
    return counted("users dropped", grade(count, of, 0.5), count, of, what, remedy)


def unmet_items(data: Dataset, cut: Split) -> Finding:
    """Items that no kept user met: they are no candidates. Their ids are not kept."""
    count, of = data.counts["items_dropped_without_interactions"], data.counts["items_read"]
    what = "items have no interaction and are no candidates"
    remedy = "remember that the full catalogue is harder to rank"
    return counted("unmet items", "note" if count else "ok", count, of, what, remedy)


def rare_items(data: Dataset, cut: Split) -> Finding:
    """Items with fewer than 5 interactions: IDs learn little of them, text may."""
    met = np.bincount(data.interactions.items, minlength=data.item_count + 1)[1:]  # (N,)
    rare = np.flatnonzero(met < 5)
    example = data.catalog.ids[rare[0]] if len(rare) else None
    what = "items have fewer than 5 interactions"
    remedy = "expect little of ID towers there; compare on slices of popularity"
    verdict: Verdict = "note" if len(rare) else "ok"
    return counted("rare items", verdict, len(rare), len(met), what, remedy, example)


def core(data: Dataset, cut: Split) -> Finding:
    """Whether the source was filtered to a k-core before: every user and item with k or more.

    Of the users only the kept ones are seen, so that they say nothing where some were dropped here.
    """
    lengths = data.interactions.lengths
    met = np.bincount(data.interactions.items, minlength=data.item_count + 1)[1:]
    users, items = int(lengths.min()), int(met.min())
    found = f"every user has at least {users:,} interactions, every item at least {items:,}"
    names = ("users_dropped_too_few_interactions", "users_dropped_outside_sample")
    dropped = sum(data.counts.get(name, 0) for name in names)  # older folders draw no sample
    if dropped or min(users, items) < 3:
        return Finding("core", "ok", found)
    return Finding(
        "core",
        "note",
        f"{found}: the source looks filtered to a {min(users, items)}-core",
        remedy="do not compare with numbers on the unfiltered data, which are lower",
    )


def lengths(data: Dataset, cut: Split) -> Finding:
    """How long sequences are, and whether they look cut at one length."""
    sizes = data.interactions.lengths
    low, median, high, longest = np.quantile(sizes, [0, 0.5, 0.9, 1], method="lower")
    what = (
        f"users have more than 50 interactions, {int((sizes > 200).sum()):,} more than 200 "
        f"(shortest {low:,}, median {median:,}, 90 % up to {high:,}, longest {longest:,})"
    )
    beyond = int((sizes > 50).sum())
    at_end = int((sizes == longest).sum())
    limited = data.counts["interactions_dropped_beyond_most_recent"] > 0
    # A tail that thins out has few users at its very end, and more just before it.
    piled = at_end >= 20 and at_end > 3 * int((sizes == longest - 1).sum()) and longest > low
    if not piled or limited:
        return counted("lengths", "ok", beyond, len(sizes), what)
    what += f"; {at_end:,} have exactly {longest:,}: the source looks cut there"
    remedy = "histories were longer once: say so beside results"
    return counted("lengths", "note", beyond, len(sizes), what, remedy)


def popularity(data: Dataset, cut: Split) -> Finding:
    """The share of the most popular item, and of the top hundredth of all."""
    met = np.bincount(data.interactions.items, minlength=data.item_count + 1)
    top, total = int(met.argmax()), int(met.sum())
    head = -(-data.item_count // 100)
    in_head = 100 * np.sort(met)[-head:].sum() / total
    what = f"interactions are with one item; the top {head:,} of all items have {in_head:.3g} %"
    share = met[top] / total
    verdict: Verdict = "ok"
    if data.item_count >= 20 and share >= 0.05:
        verdict = "warning" if share >= 0.2 else "note"
    remedy = "leave out an item that everybody gets, and always show the popularity baseline"
    example = data.catalog.ids[top - 1]
    return counted("popularity", verdict, int(met[top]), total, what, remedy, example)


def target_only_items(data: Dataset, cut: Split) -> Finding:
    """Items that never occur in training: candidates that IDs can only guess at."""
    trained = training_counts(data.interactions, cut.train_end, data.item_count)
    unseen = np.flatnonzero(trained[1:] == 0)
    example = data.catalog.ids[unseen[0]] if len(unseen) else None
    what = "items occur only outside training"
    remedy = "ID towers cannot know them: read slices of popularity"
    verdict: Verdict = "note" if len(unseen) else "ok"
    return counted(
        "target-only items", verdict, len(unseen), data.item_count, what, remedy, example
    )


def cold_targets(data: Dataset, cut: Split) -> Finding:
    """Targets, of validation and test, that never occur in training; also those left out for it."""
    trained = training_counts(data.interactions, cut.train_end, data.item_count)
    targets = np.concatenate([cut.valid.target, cut.test.target])
    items = data.interactions.items[targets]
    cold = np.flatnonzero(trained[items] == 0)
    dropped = sum(cut.counts.get(f"{part}_dropped_cold", 0) for part in ("valid", "test"))
    left_out = f", {dropped:,} of them left out as cold" if dropped else ""
    what = f"targets never occur in training{left_out}"
    remedy = "report warm and cold targets apart; only text can find cold ones"
    count, of = len(cold) + dropped, len(items) + dropped
    example = data.catalog.ids[items[cold[0]] - 1] if len(cold) else None
    return counted("cold targets", grade(count, of, 0.1), count, of, what, remedy, example)


def told(data: Dataset, cut: Split) -> Finding:
    """Interactions without a rating where others have one, and how many have which text."""
    ratings, total = data.interactions.ratings, len(data.interactions.items)
    texts = [f"{np.count_nonzero(column):,} {name}" for name, column in data.reviews.items()]
    of_texts = f"; of texts there are {', '.join(texts)}" if texts else "; there are no texts"
    if ratings is None:
        return Finding("told", "ok", f"no interaction has a rating{of_texts}")
    count = int(np.isnan(ratings).sum())
    what = f"interactions have no rating{of_texts}"
    remedy = "remember that rating prediction knows nothing of them"
    return counted("told", "note" if count else "ok", count, total, what, remedy)
