"""Numbers that others published, to stand beside ours: read from ``eval/expected/NAME.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec import resources
from llmrec.errors import UsageError, nearest
from llmrec.evaluation.metrics import Measure

FOLDER = "expected"
"""Under eval/."""
COUNTS = ("users", "items", "interactions")
"""What must be equal for two papers to speak of the same data."""
_KEYS = {"data", "counts", "protocol", "note", "rows"}
_ROW_KEYS = {"name", "metrics", "source", "differences"}


@dataclass(frozen=True)
class Published:
    """One file of published results on one version of one data set."""

    name: str
    """As it was asked for."""
    counts: Mapping[str, int]
    """users, items and interactions after filtering."""
    protocol: Mapping[str, str]
    """Rules of the protocol that the numbers were made under, such as split."""
    note: str
    """What holds for all rows."""
    rows: tuple[Mapping[str, Any], ...]
    """name; metrics: measure -> fraction; source; differences to the protocol of our tables."""

    def refusal(self, data: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
        """Why these numbers must not stand beside a table's, or an empty string."""
        if "pool" in protocol:
            return f"all candidates there, {protocol['candidates']:,} per case here"
        for said, ours in ((self.counts, data), (self.protocol, protocol)):
            for key, value in said.items():
                if ours[key] != value:
                    there, here = (f"{v:,}" if type(v) is int else v for v in (value, ours[key]))
                    return f"{key} {there} there, {here} here"
        return ""


def read_published(name: str) -> Published:
    """Read one file.

    Args:
        name: Of a file in eval/expected/, without ending; or the path of a .json of your own.

    Raises:
        UsageError: No such file, or not one of this form.
    """
    path = Path(name) if name.endswith(".json") else _shipped(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}). See eval/expected/.") from None
    except (ValueError, RecursionError):
        raise UsageError(
            f"{path} is not JSON. Compare it with the files in eval/expected/."
        ) from None
    problem = _problem(content)
    if problem:
        raise UsageError(f"{path}: {problem}. Compare it with the files in eval/expected/.")
    protocol, note = content.get("protocol", {}), content.get("note", "")
    return Published(name, content["counts"], protocol, note, tuple(content["rows"]))


def _shipped(name: str) -> Path:
    known = [
        file.removeprefix(f"{FOLDER}/").removesuffix(".json")
        for file in resources.listing("eval")
        if file.startswith(f"{FOLDER}/")
    ]
    if name not in known:
        raise UsageError(f"No published results named {name}: {nearest(name, known)}")
    return resources.shipped("eval", f"{FOLDER}/{name}.json")


def _problem(content: Any) -> str:
    """What is wrong with a file's content, or an empty string."""
    if not isinstance(content, dict) or not {"counts", "rows"} <= content.keys() <= _KEYS:
        return f"it must have counts and rows, and nothing but {', '.join(sorted(_KEYS))}"
    counts, protocol, rows = content["counts"], content.get("protocol", {}), content["rows"]
    if not isinstance(counts, dict) or set(counts) != set(COUNTS):
        return f"counts must be {', '.join(COUNTS)}"
    if not all(type(count) is int for count in counts.values()):
        return "counts must be whole numbers"
    if not isinstance(protocol, dict) or not protocol.keys() <= {"split", "filter_seen"}:
        return "protocol may hold split and filter_seen"
    if not isinstance(rows, list) or not rows:
        return "rows must be a list"
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or row.keys() != _ROW_KEYS:
            return f"row {place} must have {', '.join(sorted(_ROW_KEYS))}, and nothing else"
        if not isinstance(row["metrics"], dict) or not row["metrics"]:
            return f"row {place} has no metrics"
        for measure, value in row["metrics"].items():
            if str(Measure.parse(measure)) != measure:
                return f"row {place} writes {Measure.parse(measure)} as {measure}"
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                return f"row {place} has {measure} {value}, which is no fraction from 0 to 1"
    return ""
