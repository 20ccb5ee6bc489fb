"""``llmrec search SUITE.yaml``: options tried on validation, then the suite with the best of them.

OUT/search.json               the budget, the space and its sha256, written before the first trial
OUT/search/ROW/trials.jsonl   a line per trial
OUT/search/ROW/NUMBER/        a trial's config and journal; its weights go when it is over
OUT/search.md                 what each row's search took and found
OUT/test_evaluations.jsonl    a line per run of a searched row whose test was scored in OUT
OUT/ROW-SEED/                 the final runs; their result.json says what they were searched with
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from llmrec import runs
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.suite import (
    Cell,
    Options,
    finished,
    override,
    read_suite,
    run_suite,
    suite_file,
)
from llmrec.reporting.render import console
from llmrec.studies.plan import PLAN, Search, changed, read_search, resolve
from llmrec.studies.trials import Trial, best, propose, read_trials

TRIALS, REPORT, TESTS = "trials.jsonl", "search.md", "test_evaluations.jsonl"
HELP = """usage: llmrec search SUITE.yaml [--out FOLDER] [--seeds 0,1,2] [--without ROW,ROW]
                            [--overwrite] [--dotted.option VALUE]

Tries options of the suite's rows on validation, equally often for every row, then runs the suite
with the best of each row; only these last runs score the test set. The suite says what to try:
  search: {trials: 20, seed: 0, rows: [LABEL]}              rows: all, where left out
  space:                                                    or within a row, for that row alone
    optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}
    model.dropout: {low: 0.0, high: 0.5, step: 0.1}
    model.width: [32, 64]
A search that was interrupted goes on where it stopped; one with another space, budget or data in
the same folder is refused, or with --overwrite begun anew."""


@dataclass(frozen=True)
class Found:
    """What the trials of a row found."""

    trials: Sequence[Trial]
    chosen: Trial


def main(argv: Sequence[str]) -> int:
    """``llmrec search SUITE.yaml [--dotted.option VALUE]``; 1: a run failed, 2: a mistake."""
    return exit_code(_search, argv)


def _search(argv: Sequence[str]) -> int:
    out = console()
    if not argv or argv[0] in ("-h", "--help"):
        out.print(escape(HELP), highlight=False)
        return 0 if argv else 2
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("llmrec search needs an extra: pip install 'llmrec[search]'.")
    asked = read_suite(Path(argv[0]))
    suite = override(asked, argv[1:])
    search = read_search(argv[0], suite, asked.rows)
    from llmrec.launch import start

    if start("auto").num_processes > 1:
        raise UsageError("A search runs in one process. Start it without torchrun or accelerate.")
    plan = resolve(search, suite_file(Path(argv[0])))
    with runs.alone(suite.out):
        plan = commit(search, plan, out)
        found = {label: _explore(search, label, out) for label in search.rows}
        return _score(search, plan, found, out)


def commit(search: Search, plan: dict[str, Any], out: Console) -> dict[str, Any]:
    """Write the plan down before anything is run, or keep the same one that is there.

    Raises:
        UsageError: The folder holds another plan, or finished runs without one.
    """
    path = search.suite.out / PLAN
    held = _read(path)
    _count_tests(search)  # of runs that --overwrite is about to replace, too
    if held is None:
        done = [cell.folder for cell in search.finals() if (cell.folder / runs.RESULT).exists()]
        if done and not search.suite.overwrite:
            raise UsageError(
                f"{done[0]} was scored on test before the space was written down. Give the search "
                "another --out, or replace such runs with --overwrite."
            )
    elif difference := changed(held, plan):
        if not search.suite.overwrite:
            raise UsageError(
                f"{path} holds another search (first difference: {difference}). Give this one "
                "another --out, or begin it anew with --overwrite."
            )
    else:
        out.print(escape(f"The search in {path} goes on."), style="dim", highlight=False)
        return held
    trials = search.suite.out / "search"
    if trials.exists():
        runs.discard(trials)
    runs.write_json(path, plan)
    out.print(escape(f"{_committed(plan)} -> {path}"), highlight=False)
    return plan


def _read(path: Path) -> dict[str, Any] | None:
    """The plan that a folder holds."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UsageError(f"{path} is damaged. Delete it to begin the search anew.") from None


def _committed(plan: Mapping[str, Any]) -> str:
    where = plan["git"]
    told = "no git commit" if where is None else f"git commit {where['commit'][:12]}"
    if where is not None and not where["suite_committed"]:
        told += ", which does not hold this suite as it stands"
    elif where is not None and where["dirty"]:
        told += ", other files changed since"
    return f"space {plan['space_sha256'][:12]}, {told}"


def _explore(search: Search, label: str, out: Console) -> Found:
    """All trials of a row, those of earlier starts first.

    Raises:
        UsageError: None of them came to a validation value.
    """
    path = search.folder(label) / TRIALS
    trials = read_trials(path)
    for trial in trials:
        _drop_weights(search.folder(label) / str(trial.number))
    journal = runs.Journal(path, kept=len(trials))
    for number in range(len(trials), search.trials):
        options = propose(search.rows[label], search.seed, trials)
        trial = _try(search.trial(label, options, number), number, options)
        journal.add(**asdict(trial))
        trials.append(trial)
        _drop_weights(search.folder(label) / str(number))
        came = trial.problem if trial.value is None else f"{trial.value:.4f} on validation"
        told = f"{label}, trial {number + 1} of {search.trials}: {came} ({_setting(options)})"
        out.print(escape(told), highlight=False)
    chosen = best(trials)
    if chosen is None:
        raise UsageError(
            f"every trial of row {label} failed, the last with: {trials[-1].problem} Nothing was "
            "scored on test. Change its space and begin anew with --overwrite."
        )
    return Found(trials, chosen)


def _try(cell: Cell, number: int, options: Options) -> Trial:
    """Train and validate once; a setting that cannot be trained is a failed trial."""
    from llmrec import train_tcf

    began = time.perf_counter()
    value, problem = math.nan, ""
    try:
        value = train_tcf.validate(cell.argv)
    except UsageError as error:
        if isinstance(error.__cause__, OSError):  # a full disk is no fault of the setting
            raise
        problem = str(error)
    if not problem and not math.isfinite(value):
        problem = f"the validation value is {value}."
    lines = cell.folder / f"fit-{runs.JOURNAL}"
    return Trial(
        number=number,
        options=options,
        state="failed" if problem else "done",
        value=None if problem else value,
        epochs=len(lines.read_bytes().splitlines()) if lines.exists() else 0,
        seconds=time.perf_counter() - began,
        problem=problem,
    )


def _drop_weights(folder: Path) -> None:
    """Free what a trial's weights take: gigabytes for some models, and none is read again."""
    if (folder / runs.CHECKPOINTS).exists():
        runs.discard(folder / runs.CHECKPOINTS)


def _setting(options: Options) -> str:
    """Options for people: a float's first digits."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in options.items()
    )


def _score(
    search: Search, plan: Mapping[str, Any], found: Mapping[str, Found], out: Console
) -> int:
    """Run the suite with each row's best options, and say in its results where they came from."""
    report = _report(plan, found)
    runs.write_atomically(search.suite.out / REPORT, report.encode())
    out.print(escape(report), highlight=False, soft_wrap=True)
    rows = dict(search.suite.rows)
    for label, row in found.items():
        rows[label] = {**rows[label], **row.chosen.options}
    code = run_suite(replace(search.suite, rows=rows), out)
    counts = _count_tests(search)
    for cell in search.finals():
        if (result := finished(cell)) is not None:
            row = found[cell.label]
            told = {
                "trials": len(row.trials),
                **_spent(row.trials),
                "space_sha256": plan["space_sha256"],
                "best_trial": row.chosen.number,
                "validation": row.chosen.value,
                "test_evaluations": counts[cell.label],
            }
            runs.write_json(cell.folder / runs.RESULT, {**result.record, "search": told})
    return code


def _spent(trials: Sequence[Trial]) -> dict[str, Any]:
    return {
        "failed": sum(trial.state == "failed" for trial in trials),
        "epochs": sum(trial.epochs for trial in trials),
        "seconds": round(sum(trial.seconds for trial in trials), 3),
    }


def _report(plan: Mapping[str, Any], found: Mapping[str, Found]) -> str:
    """A Markdown table of what each row's trials took and found."""
    lines = [
        f"Search: {plan['trials']} trials per row, seed {plan['seed']}; {_committed(plan)}.",
        "",
        "| row | trials | failed | epochs | seconds | best trial | validation | options |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, row in found.items():
        spent = _spent(row.trials)
        measure = plan["rows"][label]["fixed"]["run.select"]
        cells = [
            label,
            len(row.trials),
            spent["failed"],
            spent["epochs"],
            f"{spent['seconds']:.0f}",
            row.chosen.number,
            f"{measure} {row.chosen.value:.4f}",
            _setting(row.chosen.options),
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _count_tests(search: Search) -> dict[str, int]:
    """How often each searched row's test was scored in this folder, replaced runs included.

    A run is known by all that its result.json says, seconds among it: the same run is counted
    once, however often the search is started, and a repetition of it again.
    """
    path = search.suite.out / TESTS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    journal = runs.Journal(path, kept=len(lines))
    known = {line["run"] for line in lines}
    for cell in search.finals():
        if (result := finished(cell)) is None:
            continue
        facts = {name: value for name, value in result.record.items() if name != "search"}
        run = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if run not in known:
            lines.append({"row": cell.label, "seed": cell.seed, "run": run})
            journal.add(**lines[-1])
    return {label: sum(line["row"] == label for line in lines) for label in search.rows}
