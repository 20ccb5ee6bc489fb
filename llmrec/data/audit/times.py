"""Times that are no visits, and training that is later than what it is tested on."""

from __future__ import annotations

import numpy as np

from llmrec.data.audit.findings import NO_TIMES, Finding, Verdict, counted
from llmrec.data.interactions import Dataset, Split

_YEAR_1980, _YEAR_2100 = 315_532_800, 4_102_444_800


def time_values(data: Dataset, cut: Split) -> Finding:
    """Times that are all one, no Unix seconds, or far from all others.

    Milli-, micro- and nanoseconds are scaled by the reader. Far: beyond the span of all others but
    the outermost thousandths, once more.
    """
    name, times = "time values", data.interactions.timestamps
    if times is None:
        return Finding(name, "skipped", NO_TIMES)
    ordered = np.sort(times)
    total = len(ordered)
    first, last = (np.datetime64(int(time), "s") for time in (ordered[0], ordered[-1]))
    if ordered[0] == ordered[-1]:
        remedy = "there is no order in these times: use data.order=position or file"
        return counted(name, "fault", total, total, "times are the same", remedy)
    aside = total // 1000 + 1
    low, high = ordered[aside:-aside][[0, -1]] if total >= 20 else ordered[[0, -1]]
    far = (times < low - (high - low)) | (times > high + (high - low))
    if far.any():
        user = data.user_ids[data.interactions.users()[int(far.argmax())]]
        what = f"times are far from all others ({first} to {last})"
        remedy = "correct or remove them: they move cuts in time and the order within users"
        return counted(name, "warning", int(far.sum()), total, what, remedy, user)
    odd = int(((times < _YEAR_1980) | (times >= _YEAR_2100)).sum())
    if odd:
        what = f"times are before 1980 or after 2100, read as Unix seconds ({first} to {last})"
        remedy = "write Unix seconds, or take only the order as meant"
        return counted(name, "warning" if odd < total else "note", odd, total, what, remedy)
    if not (times % 86_400).any():
        remedy = "within a day only the file's order counts: see ties"
        return counted(name, "note", total, total, "times are whole days", remedy)
    return counted(name, "ok", 0, total, f"times are implausible ({first} to {last})")


def bulk_times(data: Dataset, cut: Split) -> Finding:
    """The second at which most users were active: an import rather than visits?"""
    times = data.interactions.timestamps
    if times is None:
        return Finding("bulk times", "skipped", NO_TIMES)
    seconds, codes = np.unique(times, return_inverse=True)
    visits = np.unique(codes * data.interactions.user_count + data.interactions.users())
    users = np.bincount(visits // data.interactions.user_count)  # (distinct seconds,)
    most, total = int(users.max()), data.interactions.user_count
    when = np.datetime64(int(seconds[users.argmax()]), "s")
    bulk = most >= max(20, 0.05 * total) and most >= 10 * np.median(users)
    what = f"users were active at the busiest second, {when}"
    remedy = "leave these rows out if they were imported: their times are not visits'"
    return counted("bulk times", "warning" if bulk else "ok", most, total, what, remedy)


def training_after_test(data: Dataset, cut: Split) -> Finding:
    """Training interactions later than test targets: a model learns from others' future."""
    name, times = "training after test", data.interactions.timestamps
    if times is None:
        return Finding(name, "skipped", NO_TIMES)
    rows = np.arange(len(times)) < np.repeat(cut.train_end, data.interactions.lengths)  # (T,)
    train, test = np.sort(times[rows]), times[cut.test.target]
    later = len(train) - np.searchsorted(train, test, side="right")  # (C,)
    affected, average = int((later > 0).sum()), later.mean() / max(len(train), 1)
    after_some = int((train > test.min()).sum())
    after_all = int((train > test.max()).sum())
    what = (
        f"test targets lie before some training interaction, on average before "
        f"{100 * average:.3g} % of training; {after_some:,} of {len(train):,} training "
        f"interactions come after some test target, {after_all:,} after all"
    )
    verdict: Verdict = "ok"
    if affected:
        verdict = "warning" if average >= 0.1 else "note"
    remedy = "split.method=temporal trains on nothing that is later than a test target"
    return counted(name, verdict, affected, len(test), what, remedy)
