"""``llmrec compare``: finished runs, paired on the same users, with intervals, p and cost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from llmrec import runs
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.metrics import Measure
from llmrec.evaluation.result import read_result
from llmrec.reporting.published import read_published
from llmrec.reporting.record import DEFAULT_MEASURES, VARIABLE, Question, build_table
from llmrec.reporting.render import console, print_table, write_files


class _Parser(argparse.ArgumentParser):
    """Mistakes are one sentence, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help.")


def _parser() -> _Parser:
    parser = _Parser(
        prog="llmrec compare",
        description="Finished runs in one table, paired on the same users: quality, p and cost.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run folder, or a folder of run folders"
    )
    parser.add_argument(
        "--baseline", metavar="LABEL", help="row the others are compared with (the first run's)"
    )
    parser.add_argument(
        "--measures", nargs="+", default=DEFAULT_MEASURES, help="such as HR@10 NDCG@10 AUC"
    )
    parser.add_argument(
        "--contrast", nargs=2, action="append", default=[], metavar=("A", "B"),
        help="compare two more rows; a Holm family of their own; may be repeated",
    )  # fmt: skip
    parser.add_argument("--slices", action="store_true", help="show every slice of the test users")
    parser.add_argument(
        "--beyond-accuracy",
        action="store_true",
        help="show coverage, popularity, novelty, likeness",
    )
    parser.add_argument(
        "--expected", nargs="+", action="extend", default=[], metavar="NAME",
        help="published numbers to print beside these: a file of eval/expected/, or your own .json",
    )  # fmt: skip
    parser.add_argument(
        "--varies", nargs="+", action="extend", default=[], metavar="RULE",
        help=f"rules that the runs differ in on purpose: {', '.join(VARIABLE)}",
    )  # fmt: skip
    parser.add_argument("--title", default="", help="printed above the tables")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables as Markdown"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON")
    return parser


def run_folders(named: Sequence[Path]) -> list[Path]:
    """Run folders; a folder that is no run stands for the finished runs inside it, by name."""
    folders: list[Path] = []
    for path in named:
        inside = sorted(path.glob(f"*/{runs.RESULT}")) if path.is_dir() else []
        whole = (path / runs.RESULT).exists() or not inside
        folders += [path] if whole else [file.parent for file in inside]
    return folders


def _compare(argv: Sequence[str]) -> int:
    options = _parser().parse_args(list(argv))
    question = Question(
        baseline=options.baseline,
        measures=[Measure.parse(name) for name in options.measures],
        contrasts=[(a, b) for a, b in options.contrast],
        title=options.title,
        slices=options.slices,
        beyond_accuracy=options.beyond_accuracy,
        published=[read_published(name) for name in options.expected],
        varies=options.varies,
    )
    results = [read_result(folder) for folder in run_folders(list(map(Path, options.runs)))]
    record = build_table(results, question)
    print_table(record, console())
    write_files(record, options.markdown, options.json)
    return 0


def main(argv: Sequence[str]) -> int:
    """``llmrec compare RUN RUN ...``; 2 for a user's mistake."""
    return exit_code(_compare, argv)
