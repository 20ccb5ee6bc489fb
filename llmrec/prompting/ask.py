"""Ask a model that was trained on prompts again, in other words or otherwise, without training it.

llmrec p5 ask --run runs/mine --decoding.template 2-13
llmrec p5 ask --run runs/mine --decoding.constrained false --run.folder runs/mine-free
llmrec p5 ask --run runs/mine --pool.size 100
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmrec.checkpoints import load_weights
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.pools import PoolConfig
from llmrec.evaluation.result import read_result
from llmrec.launch import start
from llmrec.options import as_yaml, parse
from llmrec.prompting.asking import DecodingConfig
from llmrec.prompting.train_p5 import (
    P5Config,
    ask_test,
    finish,
    prepare,
    refuse_unmeasurable,
    start_stage,
    write_names,
)
from llmrec.runs import CONFIG, alone, check_vacant, open_run
from llmrec.score import ScoreRun
from llmrec.training import console_of

PROG, DESCRIPTION = (
    "llmrec p5 ask",
    "Ask a finished P5 run's test cases by another prompt, decoding or candidate list.",
)


@dataclass(frozen=True)
class AskConfig:
    """What is asked of which run."""

    trained: str = ""
    """Folder of the finished run; --run for short."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """Options that are not given stay those of the run."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    run: ScoreRun = field(default_factory=ScoreRun)


def configure(argv: Sequence[str]) -> tuple[Path, P5Config]:
    """The folder of the trained run, and the run that asking it comes to.

    Raises:
        UsageError: No run is named, or the folder holds none that was trained on prompts.
    """
    words = [f"--trained{w[5:]}" if w.partition("=")[0] == "--run" else w for w in argv]
    asked, given = parse(AskConfig, words, PROG, DESCRIPTION)
    if not asked.trained:
        raise UsageError("--run is missing. Name the folder of a finished run, as in --run RUN.")
    trained = Path(asked.trained)
    if "p5" not in read_result(trained).record:
        raise UsageError(f"--run {trained} was not trained on prompts. Name a run of p5 train.")
    found, _ = parse(P5Config, ["--config", str(trained / CONFIG)], PROG, DESCRIPTION)
    changes = {name[9:]: vars(asked.decoding)[name[9:]] for name in given if "decoding." in name}
    decoding = replace(found.decoding, **changes)
    kind = "" if decoding.constrained else "-free"
    lists = "" if asked.pool.size == "all" else f"-{asked.pool.size}"
    default = f"runs/{trained.name}-{decoding.template}{kind}{lists}"
    run = replace(
        found.run,
        label=asked.run.label or f"{found.run.label}, asked by {decoding.template}{kind}",
        folder=asked.run.folder or default,
        overwrite=asked.run.overwrite,
    )
    evaluation = replace(found.evaluation, pool=asked.pool)
    return trained, replace(found, decoding=decoding, evaluation=evaluation, run=run)


def run(argv: Sequence[str]) -> int:
    """Build the model as it was built, give it its weights, ask, write a run folder of its own."""
    trained, config = configure(argv)
    accelerator = start(config.run.precision)
    if accelerator.num_processes > 1:
        raise UsageError("llmrec p5 ask runs in one process. Start it without torchrun.")
    check_vacant(Path(config.run.folder), config.run.overwrite)
    task = prepare(config, accelerator, console_of(accelerator))
    record = read_result(trained).record
    same = (record["data"]["fingerprint"], record["cost"]["encoder"]["weights"])
    if same != (task.identity["data fingerprint"], task.identity["encoder weights"]):
        raise UsageError(
            f"the data, the templates or the model's files are no longer those that {trained} was "
            "trained with. Put them back, or train again."
        )
    refitted = config.run.fit_on == "train+valid"
    learner = start_stage(task, record["cost"]["selected_epoch"] if refitted else None)
    refuse_unmeasurable(task, learner)
    if learner.indexing.fingerprint != record["p5"]["indexing"]:
        raise UsageError(
            f"items are no longer named as in {trained}: this version of llmrec or of its packages "
            "names them otherwise. Use that one, or train again."
        )
    stage, epoch = ("refit", "refit_selected_epoch") if refitted else ("fit", "selected_epoch")
    load_weights(trained, stage, record["cost"][epoch], learner.model)
    with alone(task.folder):
        open_run(task.folder, as_yaml(config), config.run.overwrite)
        write_names(task, learner)
        finish(task, learner, dict(record["cost"]), ask_test(task, learner))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """``llmrec p5 ask --run RUN --decoding.template 2-13``; 2 for a user's mistake."""
    return exit_code(run, sys.argv[1:] if argv is None else argv)
