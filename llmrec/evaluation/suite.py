"""``llmrec evaluate eval/NAME.yaml``: run every row of a question, show the table."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from rich.console import Console
from rich.markup import escape

from llmrec import resources, runs
from llmrec.errors import UsageError, exit_code, nearest
from llmrec.evaluation import programs
from llmrec.evaluation.metrics import Measure
from llmrec.evaluation.programs import (
    Shared,
    check_program,
    seeds_matter,
    shared_options,
)
from llmrec.evaluation.result import Result, differing, flatten, read_result
from llmrec.reporting.published import Published, read_published
from llmrec.reporting.record import DEFAULT_MEASURES, Question, build_table, check_varies
from llmrec.reporting.render import console, print_table, write_files

Options: TypeAlias = dict[str, Any]
"""Options of a row's command by dotted name."""

HELP = """usage: llmrec evaluate SUITE.yaml [--out FOLDER] [--seeds 0,1,2] [--without ROW,ROW]
                              [--overwrite] [--dotted.option VALUE]

Runs every row x seed of the suite and prints the comparison. Runs in the out folder that are
finished with the same config, data and encoder are kept; finished runs that differ are refused,
or replaced with --overwrite. A dotted option applies to every row whose command has it:
  llmrec evaluate eval/quickstart.yaml --data.source my.csv --out runs/mine"""

_KEYS = (
    "title", "question", "baseline", "measures", "contrasts", "base", "seeds", "rows", "out",
    "table", "slices", "beyond_accuracy", "expected", "varies", "search", "space",
)  # fmt: skip
_EXAMPLES = {"expected": "amazon-beauty-2014", "varies": "filter_seen"}
"""What may stand in the lists of these keys."""
_DECIDED = {
    "run.seed": "--seeds, or seeds in the suite",
    "run.label": "the labels of the suite's rows",
    "run.folder": "--out, or out in the suite",
    "run.overwrite": "--overwrite",
}
"""Options that a suite sets for every run itself, and what asks for them."""


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
    """Options shared by all rows whose command has them."""
    shared: Options = field(default_factory=dict)
    """The same from the command line, which wins over a row's own."""
    seeds: Sequence[int] = (0,)
    overwrite: bool = False
    """Whether finished runs of another config or data may be replaced."""
    table: str = "table"
    """Name of the table's files in `out`, without ending: suites may share their runs."""
    slices: bool = False
    """Whether every row is also shown per slice of the test users."""
    beyond_accuracy: bool = False
    """Whether coverage, Gini, popularity, novelty and likeness within lists are shown."""
    published: Sequence[Published] = ()
    """Others' results to print beside ours."""
    varies: Sequence[str] = ()
    """Rules of the protocol that the rows differ in on purpose, such as filter_seen."""

    search: Options = field(default_factory=dict)
    """What ``llmrec search`` reads, as it stands: keys search and space, and rows, label -> the
    row's own space. Empty where the suite asks for no search."""

    commands: frozenset[str] = frozenset({"train"})
    """All that fill rows, those left out by --without too: the base may hold their options."""

    def program(self, label: str) -> str:
        """The command that fills a row: train, unless the row says otherwise."""
        return str(self.rows[label].get("program", "train"))


@dataclass(frozen=True)
class Cell:
    """One row at one seed."""

    label: str
    seed: int
    folder: Path
    program: str
    """The command that fills it, such as train."""
    argv: list[str]
    """Arguments of that command."""


def read_suite(path: Path) -> Suite:
    """Read a suite's YAML.

    Raises:
        UsageError: No such file, no YAML, an unknown key, or a label that is not among the rows.
    """
    path = suite_file(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        flatten(content if isinstance(content, dict) else {})  # endless where it holds itself
    except OSError as error:
        raise UsageError(
            f"The suite {path} cannot be read ({error.strerror}). See eval/."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
        raise UsageError(f"{path} has no rows. Compare it with eval/quickstart.yaml.")
    for key in content:
        if key not in _KEYS:
            raise UsageError(f"{path} has an unknown key {key}: {nearest(str(key), _KEYS)}")
    own = {str(k): _mapping(path, f"rows.{k}", row) for k, row in content["rows"].items()}
    if not own:
        raise UsageError(f"{path} has no rows. Compare it with eval/quickstart.yaml.")
    search = {key: content[key] for key in ("search", "space") if key in content}
    spaces = {label: row["space"] for label, row in own.items() if "space" in row}
    rows = {
        label: flatten({key: value for key, value in row.items() if key != "space"})
        for label, row in own.items()
    }
    measures = content.get("measures", list(DEFAULT_MEASURES))
    if not isinstance(measures, list) or not measures:
        raise UsageError(f"{path}: measures must be a list of names, such as [HR@10, NDCG@10].")
    suite = Suite(
        rows=rows,
        out=Path(content.get("out") or f"runs/{path.stem}"),
        baseline=str(content.get("baseline") or next(iter(rows), "")),
        title=str(content.get("title", "")),
        question=str(content.get("question", "")),
        measures=[Measure.parse(str(measure)) for measure in measures],
        contrasts=_pairs(path, content.get("contrasts", [])),
        base=flatten(_mapping(path, "base", content.get("base"))),
        seeds=_seeds(path, content.get("seeds", [0])),
        table=_file_name(path, content.get("table", "table")),
        slices=_flag(path, content, "slices"),
        beyond_accuracy=_flag(path, content, "beyond_accuracy"),
        published=[read_published(name) for name in _names(path, content, "expected")],
        varies=_names(path, content, "varies"),
        search=search | ({"rows": spaces} if spaces else {}),
    )
    check_varies(suite.varies)
    for label in rows:
        check_program(suite.program(label))
    suite = replace(suite, commands=frozenset(map(suite.program, rows)))
    for label in (suite.baseline, *(label for pair in suite.contrasts for label in pair)):
        if label not in rows:
            raise UsageError(f"{path} names {label!r}, which is no row: {nearest(label, rows)}")
    for options in (suite.base, *rows.values()):
        _refuse_decided(str(path), options)
    return suite


def suite_file(path: Path) -> Path:
    """The file itself, or the shipped suite of that name, with or without ``eval/`` before it."""
    name = path.as_posix().removeprefix("eval/")
    shipped = not path.exists() and name in resources.listing("eval")
    return resources.shipped("eval", name) if shipped else path


def override(suite: Suite, words: Sequence[str]) -> Suite:
    """Apply the command line: --out, --seeds, --overwrite, and dotted options for every row."""
    shared: Options = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(
                f"Unexpected {word!r}. Options are --out, --seeds, --without, --overwrite and "
                "--dotted.option VALUE."
            )
        if word == "--overwrite":
            suite = replace(suite, overwrite=True)
            continue
        name, given, value = word[2:].partition("=")
        if name not in ("out", "seeds", "without") and "." not in name:
            raise UsageError(
                f"Unknown option {word}: {nearest(name, ('out', 'seeds', 'without', 'overwrite'))} "
                "Options of the rows' commands are dotted, such as --data.source."
            )
        if not given:
            if not words:
                raise UsageError(f"--{name} needs a value, such as --{name}=VALUE.")
            value = words.pop(0)
        if name == "out":
            suite = replace(suite, out=Path(value))
        elif name == "seeds":
            suite = replace(suite, seeds=_seeds(Path("--seeds"), _whole_numbers(value)))
        elif name == "without":
            suite = _without(suite, value.split(","))
        else:
            shared[name] = value
    _refuse_decided("The command line", shared)
    return replace(suite, shared=shared)


def _without(suite: Suite, labels: Sequence[str]) -> Suite:
    """The suite without some of its rows and the contrasts that name them."""
    for label in labels:
        if label not in suite.rows:
            raise UsageError(
                f"--without {label}: no row is called so; {nearest(label, suite.rows)}"
            )
    if suite.baseline in labels:
        raise UsageError(
            f"--without {suite.baseline}: every row is compared with this one. Keep it."
        )
    return replace(
        suite,
        rows={label: row for label, row in suite.rows.items() if label not in labels},
        contrasts=[pair for pair in suite.contrasts if not set(pair) & set(labels)],
    )


def _refuse_decided(where: str, options: Options) -> None:
    for name, instead in _DECIDED.items():
        if name in options:
            raise UsageError(
                f"{where} sets {name}, which a suite decides for each of its runs: use {instead}."
            )


def cells(suite: Suite) -> list[Cell]:
    """Every row at every seed, row by row."""
    found = [
        Cell(label, seed, folder, name, _argv(options, label, seed, folder))
        for label in suite.rows
        for name in [suite.program(label)]
        for options in [_options(suite, label, name)]
        for seed in (suite.seeds if seeds_matter(name, options) else suite.seeds[:1])
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


def _options(suite: Suite, label: str, name: str) -> Options:
    """A row's options, over those that all rows share and its command takes."""
    own = {key: value for key, value in suite.rows[label].items() if key != "program"}
    among = suite.commands
    return shared_options(suite.base, name, among) | own | shared_options(suite.shared, name, among)


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


def _mapping(path: Path, key: str, options: Any) -> Options:
    if not isinstance(options or {}, dict):
        raise UsageError(f"{path}: {key} must be options of a command, not {options!r}.")
    return options or {}


def _flag(path: Path, content: Options, key: str) -> bool:
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f"{path}: {key} must be true or false, not {value!r}.")
    return value


def _names(path: Path, content: Options, key: str) -> list[str]:
    names = content.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: {key} must be a list of names, such as [{_EXAMPLES[key]}].")
    return names


def _file_name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise UsageError(
            f"{path}: table must be a file name without folder or ending, such as cold_start."
        )
    return name


def _whole_numbers(text: str) -> list[int]:
    """``0,1,2`` -> [0, 1, 2]; nothing where it is anything else."""
    try:
        return [int(number) for number in text.strip("[]").split(",")]
    except ValueError:
        return []


def _seeds(path: Path, seeds: Any) -> list[int]:
    whole = isinstance(seeds, list) and all(type(s) is int and 0 <= s < 2**32 for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(
            f"{path}: seeds must be distinct whole numbers from 0 on, such as [0, 1, 2]."
        )
    return list(seeds)


def identities(found: Sequence[Cell], shared: Shared) -> list[dict[str, Any]]:
    """What decides each cell's numbers: its config, its data and its encoder as they are now.

    Raises:
        UsageError: A misspelt option, data that cannot be read, an encoder that is not there.
    """
    # All of them first: a misspelt option in the last row should not be found after an hour.
    for cell in found:
        programs.configure(cell.program, cell.argv)
    return [programs.row_identity(cell.program, cell.argv, shared) for cell in found]


def finished(cell: Cell) -> Result | None:
    """The result that a cell's folder holds; none where it is damaged, so that it is run again."""
    try:
        return read_result(cell.folder)
    except UsageError:
        return None


def _begun(cell: Cell) -> dict[str, Any] | None:
    """The identity of the unfinished run that a cell's folder holds; none where there is none."""
    from llmrec.checkpoints import newest_state, read_state

    states = [newest_state(cell.folder, stage) for stage in ("fit", "refit")]
    found = [state for state in states if state]
    if not found or (cell.folder / runs.RESULT).exists():
        return None
    return read_state(found[-1])[1]


def _difference(held: dict[str, Any] | None, wanted: dict[str, Any]) -> list[str]:
    """Names in which a run that is there disagrees with the one that is wanted."""
    return [name for name in wanted if held is not None and held.get(name) != wanted[name]]


def _refuse_others(suite: Suite, todo: Sequence[tuple[Cell, dict[str, Any]]]) -> None:
    """Finished or begun runs that are not the suite's: hours that nobody said may go."""
    found = []
    for cell, wanted in todo:
        result = finished(cell)
        held = result.identity() if result else _begun(cell)
        found += [
            (name, (held or {}).get(name), wanted[name]) for name in _difference(held, wanted)[:1]
        ]
    if found:
        name, *values = found[0]
        was, wanted_now = (re.sub(r"^([0-9a-f]{12})[0-9a-f]{28,}$", r"\1", str(v)) for v in values)
        come = "run comes" if len(found) == 1 else "runs come"
        raise UsageError(
            f"{len(found)} {come} from another config or data in {suite.out} (first "
            f"difference: {name} {was} -> {wanted_now}). Give other runs another --out, or replace "
            "these with --overwrite."
        )


def _fill(cell: Cell, anew: bool, overwrite: bool, shared: Shared) -> str:
    """Run one cell in this process, or the rest of it; what went wrong, or nothing."""
    argv = list(cell.argv)
    if anew:
        argv.append("--run.resume=never")
    if overwrite or (cell.folder / runs.RESULT).exists():
        argv.append("--run.overwrite=true")
    with contextlib.suppress(OSError):
        # Linux: start the peak memory anew, else a row reports that of the rows before it.
        Path("/proc/self/clear_refs").write_text("5")
    try:
        code = programs.run(cell.program, argv, shared)
    except UsageError as error:
        return str(error)
    except SystemExit as error:
        return f"exit code {error.code}" if error.code else ""
    except Exception:
        return traceback.format_exc()  # one cell's crash must not cost the others
    return f"exit code {code}" if code else ""


def run_suite(suite: Suite, out: Console, processes: int = 1) -> int:
    """Run what is not there yet, show the table, write it beside the runs; 1 if a cell failed.

    Of several processes each calls this; a quiet console marks those that are not the main one.
    They agree on what is finished, as no result is written before all have entered its run.
    """
    found = cells(suite)
    if processes > 1 and any(cell.program == "chat" for cell in found):
        raise UsageError("Chat rows are asked by one process. Run this suite without torchrun.")
    with Shared() as shared:
        todo = list(zip(found, identities(found, shared), strict=True))
        if not suite.overwrite:
            _refuse_others(suite, todo)
        results, failed = _run_cells(suite, todo, shared, out, processes)
    if failed and processes > 1:
        return 1
    return 0 if out.quiet else _report(suite, results, failed, out)


def _run_cells(
    suite: Suite,
    todo: Sequence[tuple[Cell, dict[str, Any]]],
    shared: Shared,
    out: Console,
    processes: int,
) -> tuple[list[Result], list[str]]:
    """Every cell's result, kept or new, and the names of those that failed."""
    results: list[Result] = []
    failed: list[str] = []
    for place, (cell, wanted) in enumerate(todo, start=1):
        name = f"[{place}/{len(todo)}] {cell.label}, seed {cell.seed}"
        result = finished(cell)  # looked up again: another process may have finished it meanwhile
        if result is not None and not differing(result.identity(), wanted):
            out.print(escape(f"{name}: finished before, kept ({cell.folder})"), style="dim")
        else:
            changed = (cell.folder / runs.RESULT).exists()
            out.print(escape(f"{name}{': changed or damaged, run again' if changed else ''}"))
            anew = suite.overwrite and bool(_difference(_begun(cell), wanted))
            problem = _fill(cell, anew, suite.overwrite, shared)
            if problem:
                failed.append(f"{cell.label}, seed {cell.seed}")
                told = console() if out.quiet else out  # by whichever process met it
                told.print(escape(f"{name} failed: {problem}"), style="red", highlight=False)
                if processes > 1:  # the others may still wait inside the run that failed here
                    told.print("The suite ends here; the same command goes on with this run.")
                    break
                continue
            result = read_result(cell.folder)
        results.append(result)
    return results, failed


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
        slices=suite.slices,
        beyond_accuracy=suite.beyond_accuracy,
        published=suite.published,
        varies=suite.varies,
    )
    record = build_table(results, question)
    record["failed"] = list(failed)
    lost = [pair for pair in suite.contrasts if not labels.issuperset(pair)]
    record["contrasts_lost"] = [f"{a} - {b}" for a, b in lost]
    print_table(record, out)
    table = suite.out / f"{suite.table}.md"
    write_files(record, table, table.with_suffix(".json"))
    out.print(escape(f"Written to {table} and {suite.table}.json."), style="dim", highlight=False)
    for name in failed:
        out.print(escape(f"Failed and not in the table: {name}"), style="red", highlight=False)
    return 1 if failed else 0


def _evaluate(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        console().print(escape(HELP), highlight=False)
        return 0 if argv else 2
    from llmrec.launch import start

    suite, out = override(read_suite(Path(argv[0])), argv[1:]), console()
    if suite.search:
        raise UsageError(
            f"{argv[0]} asks for a search of options. Run it with llmrec search {argv[0]}."
        )
    accelerator = start("auto")  # processes that part after a run cannot join for the next one
    out.quiet = not accelerator.is_main_process
    code = run_suite(suite, out, accelerator.num_processes)
    if not code:  # else another process may be where it cannot take leave
        accelerator.end_training()
    return code


def main(argv: Sequence[str]) -> int:
    """``llmrec evaluate SUITE.yaml [--dotted.option VALUE]``; 1: a cell failed, 2: a mistake."""
    return exit_code(_evaluate, argv)
