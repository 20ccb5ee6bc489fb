"""What a check says, and how it grades and words what it counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmrec.data.readers.files import clip

Verdict = Literal["ok", "skipped", "note", "warning", "fault"]

NO_TIMES = "needs timestamps, and this data has none"


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    """Its name."""
    verdict: Verdict
    """note: good to know; warning: numbers may mislead; fault: they will; skipped: the data lacks
    what the check needs."""
    found: str
    """In words, with count, share and an example."""
    count: int = 0
    """How many are concerned ..."""
    of: int = 0
    """... of how many."""
    example: str = ""
    """An external id, where one shows the matter."""
    remedy: str = ""
    """What to do about it; empty where all is well."""


def counted(
    check: str,
    verdict: Verdict,
    count: int,
    of: int,
    what: str,
    remedy: str = "",
    example: str | None = None,
) -> Finding:
    """A finding worded "`count` of `of` (share) `what`"; remedy and example only where not ok."""
    share = f" ({100 * count / of:.3g} %)" if of else ""
    found = f"{count:,} of {of:,}{share} {what}"
    if verdict == "ok":
        return Finding(check, verdict, found, count, of)
    if example is not None:
        found += f"; such as {clip(example)}"
    return Finding(check, verdict, found, count, of, example or "", remedy)


def grade(count: int, of: int, warning: float) -> Verdict:
    """Fine where there is none, a note below the share `warning`, a warning from there on."""
    if not count:
        return "ok"
    return "warning" if count >= warning * of else "note"


def beyond_chance(count: float, expected: float) -> bool:
    """Whether a count of rare events is no accident: above five deviations and three events.

    By accident less than once in 100,000 checks, whatever was expected.
    """
    return bool(count > expected + 5 * np.sqrt(expected) + 3)
