"""Score a finished run again, on candidate lists, without training it again.

llmrec score --run runs/mine --pool.size 100
llmrec score --run runs/mine --pool.size 20 --pool.source popularity --run.folder runs/mine-20
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from llmrec.assembly import Restored, TrainConfig, recommender_scores, restore
from llmrec.data.splits import fit_ends, split
from llmrec.encoders.store import pick_device
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.card import run_card
from llmrec.evaluation.metrics import merge
from llmrec.evaluation.pools import PoolConfig, write_pools
from llmrec.evaluation.ranking import rank_scores
from llmrec.evaluation.result import Result, RunFacts, build_result, read_result, write_result
from llmrec.options import as_dict, as_yaml, parse
from llmrec.questions import pool_cases
from llmrec.runs import CONFIG, alone, check_vacant, open_run

PROG, DESCRIPTION = (
    "llmrec score",
    "Rank a finished run's test cases among candidate lists, without training it again.",
)


@dataclass(frozen=True)
class ScoreRun:
    """The run that is written."""

    label: str = ""
    """The row's name in tables. Empty: the trained run's."""
    folder: str = ""
    """Where it is written. Empty: runs/<the trained run's folder>-<size>-<source>."""
    overwrite: bool = False
    """Whether a finished run in that folder may be replaced."""


@dataclass(frozen=True)
class ScoreConfig:
    """What is scored on which lists."""

    trained: str = ""
    """Folder of the finished run; --run for short."""
    pool: PoolConfig = field(default_factory=lambda: PoolConfig(size=100))
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""
    run: ScoreRun = field(default_factory=ScoreRun)


def configure(argv: Sequence[str]) -> tuple[ScoreConfig, TrainConfig]:
    """What a command line asks for, and the run it comes to: the trained one's, with the lists.

    Raises:
        UsageError: No run is named, or the folder holds none.
    """
    words = [f"--trained{w[5:]}" if w.partition("=")[0] == "--run" else w for w in argv]
    config, _ = parse(ScoreConfig, words, PROG, DESCRIPTION)
    if not config.trained:
        raise UsageError("--run is missing. Name the folder of a finished run, as in --run RUN.")
    trained = Path(config.trained)
    if not (trained / CONFIG).is_file():
        raise UsageError(f"--run {trained} is no run folder: it has no {CONFIG}. Name another.")
    if (trained / "chat.json").is_file():
        raise UsageError(
            f"--run {trained} is a chat run, which has candidate lists of its own. Name the folder "
            "of a trained run."
        )
    finished = read_result(trained)
    if finished.rates:
        raise UsageError(
            f"--run {trained} predicts ratings and ranks nothing. Name the folder of a run that "
            "ranks items."
        )
    if "p5" in finished.record:
        raise UsageError(
            f"--run {trained} was trained on prompts: it is ranked again by asking it. Use "
            f"llmrec p5 ask --run {trained} --pool.size {config.pool.size}."
        )
    found, _ = parse(TrainConfig, ["--config", str(trained / CONFIG)], PROG, DESCRIPTION)
    pool = config.pool
    folder = config.run.folder or f"runs/{trained.name}-{pool.size}-{Path(pool.source).name}"
    label, overwrite = config.run.label or found.run.label, config.run.overwrite
    return config, replace(
        found,
        evaluation=replace(found.evaluation, pool=pool),
        run=replace(found.run, folder=folder, label=label, overwrite=overwrite),
    )


def score(argv: Sequence[str]) -> int:
    """Restore the recommender, rank, and write a run folder of its own."""
    asked, config = configure(argv)
    folder = Path(config.run.folder)
    check_vacant(folder, config.run.overwrite)
    restored = restore(Path(asked.trained), pick_device(asked.device))
    with alone(folder):
        result = rescored(restored, config)
        record = write_result(folder, result, run_card)
    test = record["metrics"]["test"]
    shown = ", ".join(f"{name} {test[name]['mean']:.4f}" for name in ("HR@1", "HR@10", "NDCG@10"))
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    console.print(f"{config.run.label}, seed {config.run.seed}: test {shown} -> {folder}")
    return 0


def rescored(restored: Restored, config: TrainConfig) -> Result:
    """The trained run's result, but for its test figures; opens the folder and keeps the lists.

    Cost, validation and environment are those of the training.
    """
    dataset, old, folder = restored.dataset, restored.record, Path(config.run.folder)
    interactions, device = dataset.interactions, restored.recommender.all_items.device
    cut = split(dataset, config.split)
    ends = fit_ends(interactions, config.split)
    cut, pools = pool_cases(config.evaluation.pool, dataset, cut, ends, str(device))
    open_run(folder, as_yaml(config), config.run.overwrite)
    if pools is not None:
        write_pools(folder, dataset, cut.test, pools)
    length = config.model.max_length
    scores = recommender_scores(restored.recommender, interactions, cut.test, length, device)
    candidates = cut.test_candidates if pools is None else pools
    ranked = rank_scores(
        scores, dataset.item_count, interactions, cut.test, candidates, config.evaluation
    )
    rules, environment = old["protocol"], old["environment"]
    facts = RunFacts(
        name=folder.name,
        label=config.run.label,
        seed=config.run.seed,
        config=as_dict(config),
        data_source=config.data.source,
        split=rules["split"],
        filter_seen=rules["filter_seen"],
        fit_on=rules["fit_on"],
        selection=rules["selection"],
        processes=environment["processes"],
        device=environment["device"],
        precision=environment["precision"],
        cost=old["cost"],
    )
    rankings = {"test": merge([ranked], len(cut.test))}
    learned = fit_ends(interactions, config.split, config.run.fit_on)
    result = build_result(facts, dataset, cut, rankings, learned_end=learned, pools=pools)
    metrics = old["metrics"] | result.record["metrics"]
    return replace(result, record=result.record | {"metrics": metrics})


def main(argv: Sequence[str] | None = None) -> int:
    """``llmrec score --run RUN --pool.size 100``; 2 for a user's mistake."""
    return exit_code(score, sys.argv[1:] if argv is None else argv)
