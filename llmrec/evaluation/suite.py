"""``llmrec evaluate eval/NAME.yaml``: train every row of a question, show the table."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from rich.console import Console
from rich.markup import escape

from llmrec import resources, runs
from llmrec.errors import UsageError, exit_code, nearest
from llmrec.evaluation.metrics import Measure
from llmrec.evaluation.result import Result, read_result
from llmrec.reporting.tables import (
    DEFAULT_MEASURES,
    Question,
    build_table,
    console,
    print_table,
    write_files,
)

Options: TypeAlias = dict[str, Any]
"""Options of the train entry point by dotted name."""

HELP = """usage: llmrec evaluate SUITE.yaml [--out FOLDER] [--seeds 0,1,2] [--dotted.option VALUE]

Trains every row x seed of the suite, keeps those that are finished with the same config, and
prints the comparison. A dotted option of the train command applies to every row:
  llmrec evaluate eval/quickstart.yaml --data.source my.csv --out runs/mine"""

_KEYS = ("title", "question", "baseline", "measures", "contrasts", "base", "seeds", "rows", "out")


@dataclass(frozen=True)
class Suite:
    """One question, as its YAML asks it."""

    rows: dict[str, Options]
    """Label -> what sets the row apart."""
    out: Path
    """Folder of the run folders and of the table."""
    baseline: str
    title: str = ""
    question: str = ""
    measures: Sequence[Measure] = ()
    contrasts: Sequence[tuple[str, str]] = ()
    base: Options = field(default_factory=dict)
    """Options shared by all rows."""
    seeds: Sequence[int] = (0,)


@dataclass(frozen=True)
class Cell:
    """One row at one seed."""

    label: str
    seed: int
    folder: Path
    argv: list[str]
    """Arguments of the train entry point."""


def read_suite(path: Path) -> Suite:
    """Read a suite's YAML.

    Raises:
        UsageError: No such file, no YAML, an unknown key, or a label that is not among the rows.
    """
    path = _found(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"The suite {path} cannot be read ({error.strerror}). See eval/."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
        raise UsageError(f"{path} has no rows. Compare it with eval/quickstart.yaml.")
    for key in content:
        if key not in _KEYS:
            raise UsageError(f"{path} has an unknown key {key}: {nearest(str(key), _KEYS)}")
    rows = {str(label): flatten(options or {}) for label, options in content["rows"].items()}
    suite = Suite(
        rows=rows,
        out=Path(content.get("out") or f"runs/{path.stem}"),
        baseline=str(content.get("baseline") or next(iter(rows), "")),
        title=str(content.get("title", "")),
        question=str(content.get("question", "")),
        measures=[Measure.parse(str(m)) for m in content.get("measures", DEFAULT_MEASURES)],
        contrasts=_pairs(path, content.get("contrasts", [])),
        base=flatten(content.get("base") or {}),
        seeds=_seeds(path, content.get("seeds", [0])),
    )
    for label in (suite.baseline, *(label for pair in suite.contrasts for label in pair)):
        if label not in rows:
            raise UsageError(f"{path} names {label!r}, which is no row: {nearest(label, rows)}")
    return suite


def _found(path: Path) -> Path:
    """The file itself, or the shipped suite of that name, with or without ``eval/`` before it."""
    name = path.as_posix().removeprefix("eval/")
    shipped = not path.exists() and name in resources.listing("eval")
    return resources.shipped("eval", name) if shipped else path


def flatten(options: Mapping[str, Any], prefix: str = "") -> Options:
    """Options as dotted ones: ``{tower: {name: id}}`` -> ``{"tower.name": "id"}``."""
    flat: Options = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def override(suite: Suite, words: Sequence[str]) -> Suite:
    """Apply the command line: ``--out``, ``--seeds``, and dotted options for every row."""
    out, seeds, shared = suite.out, suite.seeds, {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(
                f"Unexpected {word!r}. Options are --out, --seeds and --dotted.option VALUE."
            )
        name, given, value = word[2:].partition("=")
        if not given:
            if not words:
                raise UsageError(f"--{name} needs a value, such as --{name}=VALUE.")
            value = words.pop(0)
        if name == "out":
            out = Path(value)
        elif name == "seeds":
            seeds = _seeds(Path("--seeds"), yaml.safe_load(f"[{value.strip('[]')}]"))
        elif "." in name:
            shared[name] = value
        else:
            raise UsageError(
                f"Unknown option --{name}: {nearest(name, ('out', 'seeds'))} "
                "Options of the train command are dotted, such as --data.source."
            )
    rows = {label: {**options, **shared} for label, options in suite.rows.items()}
    return Suite(**{**suite.__dict__, "rows": rows, "out": out, "seeds": seeds})


def cells(suite: Suite) -> list[Cell]:
    """Every row at every seed, row by row."""
    found = [
        Cell(label, seed, folder, _argv(suite.base | options, label, seed, folder))
        for label, options in suite.rows.items()
        for seed in suite.seeds
        for folder in [suite.out / f"{re.sub(r'[^A-Za-z0-9.+_-]+', '_', label)}-{seed}"]
    ]
    folders = [cell.folder for cell in found]
    for cell in found:
        if folders.count(cell.folder) > 1:
            raise UsageError(
                f"Two rows would share the folder {cell.folder}. Give {cell.label!r} a label that "
                "differs in letters or digits."
            )
    return found


def _argv(options: Options, label: str, seed: int, folder: Path) -> list[str]:
    named = {**options, "run.label": label, "run.seed": seed, "run.folder": str(folder)}
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in named.items()
    ]


def _pairs(path: Path, contrasts: Any) -> list[tuple[str, str]]:
    if not isinstance(contrasts, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in contrasts
    ):
        raise UsageError(f"{path}: contrasts must be pairs of labels, such as [[A, B]].")
    return [(str(a), str(b)) for a, b in contrasts]


def _seeds(path: Path, seeds: Any) -> list[int]:
    whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"{path}: seeds must be distinct whole numbers, such as [0, 1, 2].")
    return list(seeds)


def finished(cell: Cell, config: Mapping[str, Any]) -> Result | None:
    """The result a cell's folder already holds, if it came from the same config."""
    if not (cell.folder / runs.RESULT).exists():
        return None
    try:
        result = read_result(cell.folder)
    except UsageError:
        return None  # damaged: it is run again
    same = _identity(result.record["config"]) == _identity(config)
    return result if same else None


def _identity(config: Mapping[str, Any]) -> Any:
    """A resolved config less what moves no number, as JSON would give it back."""
    run = {k: v for k, v in config.get("run", {}).items() if k not in ("folder", "overwrite")}
    return json.loads(json.dumps({**config, "run": run}, default=str))


def _train(cell: Cell) -> str:
    """Train one cell in this process; what went wrong, or an empty string."""
    from llmrec.train_tcf import main as train

    argv = list(cell.argv)
    if (cell.folder / runs.RESULT).exists():
        argv.append("--run.overwrite=true")
    with contextlib.suppress(OSError):
        # Linux: start the peak memory anew, else a row reports that of the rows before it.
        Path("/proc/self/clear_refs").write_text("5")
    try:
        code = train(argv)
    except UsageError as error:
        return str(error)
    except SystemExit as error:
        return f"exit code {error.code}" if error.code else ""
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        OSError,
        MemoryError,
        ArithmeticError,
    ):
        return traceback.format_exc()  # one cell's crash must not cost the others
    return f"exit code {code}" if code else ""


def run_suite(suite: Suite, out: Console) -> int:
    """Train what is missing, show the table, write it beside the runs; 1 if a cell failed."""
    from llmrec.train_tcf import resolve

    # All of them first: a misspelt option in the last row should not be found after an hour.
    todo = [(cell, resolve(cell.argv)) for cell in cells(suite)]
    results: list[Result] = []
    failed: list[str] = []
    for place, (cell, config) in enumerate(todo, start=1):
        name = f"[{place}/{len(todo)}] {cell.label}, seed {cell.seed}"
        result = finished(cell, config)
        if result is not None:
            out.print(escape(f"{name}: finished before, kept ({cell.folder})"), style="dim")
        else:
            changed = (cell.folder / runs.RESULT).exists()
            out.print(escape(f"{name}{': changed or damaged, trained again' if changed else ''}"))
            problem = _train(cell)
            if problem:
                failed.append(f"{cell.label}, seed {cell.seed}")
                out.print(escape(f"{name} failed: {problem}"), style="red", highlight=False)
                continue
            result = read_result(cell.folder)
        results.append(result)
    return _report(suite, results, failed, out)


def _report(suite: Suite, results: Sequence[Result], failed: Sequence[str], out: Console) -> int:
    labels = {result.label for result in results}
    if suite.baseline not in labels:
        out.print(escape(f"No table: the baseline {suite.baseline} failed."), style="red")
        return 1
    question = Question(
        baseline=suite.baseline,
        measures=suite.measures,
        contrasts=[pair for pair in suite.contrasts if labels.issuperset(pair)],
        title=suite.title,
        text=suite.question,
    )
    record = build_table(results, question)
    record["failed"] = list(failed)
    print_table(record, out)
    table = suite.out / "table.md"
    write_files(record, table, suite.out / "table.json")
    out.print(escape(f"Written to {table} and table.json."), style="dim", highlight=False)
    for name in failed:
        out.print(escape(f"Failed and not in the table: {name}"), style="red", highlight=False)
    return 1 if failed else 0


def _evaluate(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        console().print(escape(HELP), highlight=False)
        return 0 if argv else 2
    return run_suite(override(read_suite(Path(argv[0])), argv[1:]), console())


def main(argv: Sequence[str]) -> int:
    """``llmrec evaluate SUITE.yaml [--dotted.option VALUE]``; 1: a cell failed, 2: a mistake."""
    return exit_code(_evaluate, argv)
