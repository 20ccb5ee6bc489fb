"""What a search will do, read from a suite and written down before its first trial."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrec.errors import UsageError, nearest
from llmrec.evaluation import programs
from llmrec.evaluation.result import MOVES_NO_NUMBER, differing, flatten
from llmrec.evaluation.suite import Cell, Options, Suite, cells
from llmrec.options import option_names
from llmrec.studies.space import Space, described, read_space

PLAN = "search.json"
_KEYS = ("trials", "seed", "rows")
_MEASURED = ("data.", "split.", "evaluation.", "run.")
"""Options that decide what is measured and how, not what is trained."""


@dataclass(frozen=True)
class Search:
    """A suite, the rows of it whose options are searched, and how often each is tried."""

    suite: Suite
    trials: int
    """Training runs per row, failed ones too: the same for every row."""
    seed: int
    """Decides what is drawn, and run.seed of every trial."""
    rows: dict[str, Space]
    """Label -> what its options are drawn from."""

    def trial(self, label: str, options: Options, number: int) -> Cell:
        """One trial: the row with these options, in a run folder of its own."""
        row = {**self.suite.rows[label], **options}
        cell = cells(replace(self.suite, rows={label: row}, seeds=[self.seed]))[0]
        name = cell.folder.name.removesuffix(f"-{self.seed}")
        folder = self.suite.out / "search" / name / str(number)
        return replace(cell, folder=folder, argv=[*cell.argv, f"--run.folder={folder}"])

    def folder(self, label: str) -> Path:
        """Where a row's trials are kept."""
        return self.trial(label, {}, 0).folder.parent

    def finals(self) -> list[Cell]:
        """The runs of the searched rows whose test is scored; their options are the row's own."""
        return [cell for cell in cells(self.suite) if cell.label in self.rows]


def read_search(where: str, suite: Suite, known: Collection[str]) -> Search:
    """The search that a suite asks for.

    Args:
        where: The suite's file, for messages.
        suite: With the command line applied.
        known: Labels of all rows, those left out by --without too.

    Raises:
        UsageError: No search, a wrong budget, a space that cannot be searched.
    """
    content = suite.search.get("search")
    if not isinstance(content, Mapping) or "trials" not in content:
        raise UsageError(
            f"{where} has no search: {{trials: 20}}. Add it, or run the suite with llmrec evaluate."
        )
    for key in content:
        if key not in _KEYS:
            raise UsageError(f"{where}: search has an unknown key {key}: {nearest(key, _KEYS)}")
    trials, seed = content["trials"], content.get("seed", 0)
    if type(trials) is not int or trials < 1:
        raise UsageError(f"{where}: search.trials must be a whole number from 1 on.")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UsageError(f"{where}: search.seed must be a whole number from 0 on.")
    common = read_space(f"{where}: space", suite.search.get("space") or {})
    own = {
        label: read_space(f"{where}: rows.{label}.space", content or {})
        for label, content in suite.search.get("rows", {}).items()
        if label in suite.rows  # left out by --without otherwise
    }
    labels = _labels(where, content.get("rows", list(suite.rows)), known)
    rows = {label: common | own.get(label, {}) for label in labels if label in suite.rows}
    if not rows:
        raise UsageError(f"{where}: --without leaves no row to search. Name another.")
    for label in own:
        if label not in rows:
            raise UsageError(
                f"{where}: rows.{label} has a space, but search.rows leaves it out. Name it there."
            )
    for label, space in rows.items():
        _check_space(f"{where}: row {label}", space, suite, label)
    return Search(suite, trials, seed, rows)


def _labels(where: str, labels: Any, known: Collection[str]) -> list[str]:
    """The rows to search, as the suite names them."""
    if not isinstance(labels, list) or not labels:
        raise UsageError(f"{where}: search.rows must list labels of rows, such as [SASRec-ID].")
    for label in labels:
        if label not in known:
            raise UsageError(
                f"{where}: search.rows names {label!r}, which is no row: "
                f"{nearest(str(label), known)}"
            )
    return list(dict.fromkeys(labels))


def _check_space(where: str, space: Space, suite: Suite, label: str) -> None:
    if suite.program(label) != "train":
        raise UsageError(
            f"{where} is filled by program: {suite.program(label)}, and only train is searched. "
            "Leave it out of search.rows."
        )
    if not space:
        raise UsageError(
            f"{where} has an empty space. Name options under space, or leave the row out of "
            "search.rows."
        )
    from llmrec.assembly import TrainConfig

    known = option_names(TrainConfig)
    for option in space:
        if option not in known:
            raise UsageError(
                f"{where}: space has an unknown option {option}: {nearest(option, known)}"
            )
        if option.startswith(_MEASURED):
            raise UsageError(
                f"{where}: space draws {option}, but options of data, split, evaluation and run "
                "must be equal in all trials. Set it under base."
            )
        if option in MOVES_NO_NUMBER:
            raise UsageError(
                f"{where}: space draws {option}, which moves no number. Set it under base."
            )
        for holder, options in (("the row", suite.rows[label]), ("the command line", suite.shared)):
            if option in options:
                raise UsageError(
                    f"{where}: space draws {option}, which {holder} sets too. Leave out either."
                )


def corners(space: Space) -> list[Options]:
    """Settings in which every end of a span and every choice occurs: tried out, never trained."""
    ends = {name: drawn.ends for name, drawn in space.items()}
    most = max(len(values) for values in ends.values())
    return [
        {name: values[min(number, len(values) - 1)] for name, values in ends.items()}
        for number in range(most)
    ]


def resolve(search: Search, suite_file: Path) -> dict[str, Any]:
    """What search.json holds: the budget, every row's space, and all that is not drawn.

    Raises:
        UsageError: Some row, trial or final run would be refused: a wrong value, data that cannot
            be read, an encoder that is not there.
    """
    for cell in cells(search.suite):
        if cell.label not in search.rows:
            programs.configure(cell.program, cell.argv)
    rows = {}
    with programs.Shared() as shared:
        for label, space in search.rows.items():
            trials = [search.trial(label, options, 0) for options in corners(space)]
            try:
                for cell in trials:
                    programs.configure(cell.program, cell.argv)
            except UsageError as error:
                raise UsageError(f"row {label}: {error}") from error
            decisive = programs.row_identity(trials[0].program, trials[0].argv, shared)
            fixed = {name: value for name, value in decisive.items() if name not in space}
            rows[label] = {"space": described(space), "fixed": fixed}
    spaces = {label: row["space"] for label, row in rows.items()}
    names = ("llmrec", "optuna")
    plan = {
        "trials": search.trials,
        "seed": search.seed,
        "rows": rows,
        "space_sha256": hashlib.sha256(json.dumps(spaces, sort_keys=True).encode()).hexdigest(),
        "git": commit_of(suite_file),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    return dict(json.loads(json.dumps(plan)))


def changed(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first difference that makes another search of one, in words; empty where there is none.

    Commit and versions are told and do not count.
    """
    a, b = (flatten({k: plan[k] for k in ("trials", "seed", "rows")}) for plan in (held, wanted))
    names = differing(a, b)
    return f"{names[0]} {a.get(names[0])} -> {b.get(names[0])}" if names else ""


def commit_of(file: Path) -> dict[str, Any] | None:
    """The git commit that holds a file; none where git or a repository is missing.

    Returns:
        commit; dirty, whether any tracked file differs from it; and suite_committed, whether the
        file itself is part of it as it stands.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(file.resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        tracked = bool(git("ls-files", "--", file.name))
        return {
            "commit": commit,
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
            "suite_committed": tracked and not git("status", "--porcelain", "--", file.name),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
