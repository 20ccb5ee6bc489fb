"""Train one recommender and score it once: item tower x user model x loss, from one YAML.

accelerate launch llmrec/train_tcf.py                           the quick start's text model
accelerate launch llmrec/train_tcf.py --config configs/tcf/amazon-beauty-2014-id.yaml
torchrun --nproc_per_node 2 llmrec/train_tcf.py --config ...    two processes
llmrec train ...                                                the same, from the console
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # by path: the repository's root comes first, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor, nn

from llmrec import checkpoints
from llmrec.assembly import (
    TrainConfig,
    baseline_scores,
    build,
    read_texts,
    recommender_scores,
)
from llmrec.data.batches import Examples, NegativeSampler, SharedNegatives, TrainingRows
from llmrec.data.interactions import Dataset, Int64, Split
from llmrec.data.readers import effective, load_dataset
from llmrec.data.splits import fit_ends, split, summary
from llmrec.encoders.store import Encoded
from llmrec.encoders.text import out_of_memory
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.card import run_card
from llmrec.evaluation.metrics import Measure, Ranking, merge
from llmrec.evaluation.pools import Pools, write_pools
from llmrec.evaluation.products import Scores
from llmrec.evaluation.ranking import rank_scores
from llmrec.evaluation.result import build_result, identity, write_result
from llmrec.launch import sharded, start
from llmrec.models.baselines import BASELINES
from llmrec.models.losses import NEGATIVE_LOSSES
from llmrec.models.optim import build_optimizer, set_rate
from llmrec.models.recommender import Batch, Recommender
from llmrec.models.sharding import refuse_unshardable, shard
from llmrec.models.user_model import KnownUserModel
from llmrec.models.user_models import USER_MODELS
from llmrec.options import as_dict, as_yaml, parse
from llmrec.progress import progress_bar
from llmrec.questions import pool_cases
from llmrec.runs import alone, check_vacant
from llmrec.training import (
    Epochs,
    Stage,
    check_tensorboard,
    console_of,
    number_format,
    open_or_resume,
    resume_stage,
    run_facts,
)

Part = Literal["valid", "test"]
PROG, DESCRIPTION = (
    "llmrec train",
    "Train one recommender, select it on validation, score it once on test.",
)


@dataclass(frozen=True)
class Task:
    """What every stage of a run looks at."""

    config: TrainConfig
    dataset: Dataset
    split: Split
    identity: dict[str, Any]
    """What decides the run's numbers: options, data, encoder."""
    accelerator: Accelerator
    console: Console
    pools: Pools | None = None
    """What each test case is ranked among; None: among all candidates."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.folder)


@dataclass(frozen=True)
class Learner:
    """One stage of training: what a step moves, what it draws from, and how far it is."""

    model: Recommender
    wrapped: nn.Module
    """The model as Accelerate distributes it."""
    optimizer: torch.optim.Optimizer
    rows: TrainingRows
    negatives: NegativeSampler | SharedNegatives | None
    epochs: Epochs


@dataclass(frozen=True)
class Fitted:
    """A trained model, the epoch whose weights it has, that epoch's validation, and the cost."""

    model: Recommender
    epoch: int
    validation: Ranking | None
    cost: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``llmrec train`` and of this file run by path."""
    return exit_code(run, sys.argv[1:] if argv is None else argv)


def configure(argv: Sequence[str]) -> TrainConfig:
    """The config of a command line, with the run's label and folder filled in."""
    words = [f"--run.{w[2:]}" if w.partition("=")[0] == "--resume" else w for w in argv]
    config, given = parse(TrainConfig, words, PROG, DESCRIPTION)
    config = replace(config, data=effective(config.data, given))
    Measure.parse(config.run.select)
    label = config.run.label or _label(config)
    data = Path(config.data.source).stem
    folder = config.run.folder or f"runs/{data}-{label}-s{config.run.seed}"
    return replace(config, run=replace(config.run, label=label, folder=folder))


def _label(config: TrainConfig) -> str:
    if config.model.name in BASELINES:
        return config.model.name
    control = "" if config.tower.control == "none" else f"-{config.tower.control}"
    tune = f"-{config.encoder.tune.replace(':', '-')}" if config.encoder.tuned else ""
    return f"{config.model.name}-{config.tower.name}{control}{tune}"


def run(argv: Sequence[str]) -> int:
    """Data -> tower and user model -> training -> one test -> run folder."""
    joined = torch.distributed.is_initialized()  # by a suite, whose processes stay together
    task, encoded = begin(configure(argv))
    with opened(task):
        learns = task.config.model.name not in BASELINES
        rankings, cost = (train if learns else score_baseline)(task, encoded)
        if task.accelerator.is_main_process:
            finish(task, rankings, cost)
        task.accelerator.wait_for_everyone()
    if not joined:
        task.accelerator.end_training()
    return 0


def validate(argv: Sequence[str]) -> float:
    """The validation value that such a run would be selected by; no test case is scored.

    The run folder then holds config, journal and weights, and no result.
    """
    task, encoded = begin(configure(argv))
    config, interactions = task.config, task.dataset.interactions
    ends = fit_ends(interactions, config.split, "train")
    with opened(task):
        if config.model.name in BASELINES:
            scores = baseline_scores(config, task.dataset, task.split.valid, ends, encoded)
            ranking: Ranking | None = rank_cases(task, scores, "valid")
        else:
            ranking = fit(task, encoded, ends).validation
        if task.accelerator.is_main_process:
            checkpoints.finish_checkpoints(task.folder)
        task.accelerator.wait_for_everyone()
    assert ranking is not None
    return float(Measure.parse(config.run.select).per_case(ranking).mean())


def begin(config: TrainConfig) -> tuple[Task, Encoded | None]:
    """Read the data, cut it, and encode texts; all that may be refused before a folder is made."""
    accelerator = start(config.run.precision)
    console = console_of(accelerator)
    check_vacant(Path(config.run.folder), config.run.overwrite)
    dataset = load_dataset(config.data)
    who = identity(as_dict(config), dataset.fingerprint())
    who |= {"number format": accelerator.mixed_precision, "device": accelerator.device.type}
    ends, cut = fit_ends(dataset.interactions, config.split), split(dataset, config.split)
    asked, pools = pool_cases(config.evaluation.pool, dataset, cut, ends, str(accelerator.device))
    task = Task(config, dataset, asked, who, accelerator, console, pools)
    console.print(
        f"{config.run.label}, seed {config.run.seed}: {dataset.name}, "
        f"{dataset.interactions.user_count} users, {dataset.item_count} items, "
        f"{len(dataset.interactions.items)} interactions; "
        f"{accelerator.num_processes} x {accelerator.device.type}, {number_format(accelerator)}"
    )
    console.print(f"  {summary(dataset, task.split)}")
    if config.model.name not in BASELINES:
        refuse_untrainable(task)
    with accelerator.main_process_first():  # the others then find everything in the store
        encoded = read_texts(config, dataset.catalog, accelerator.device)
    if encoded is not None:
        who |= {"encoder weights": encoded.encoder["weights"]}
    return task, encoded


@contextlib.contextmanager
def opened(task: Task) -> Iterator[None]:
    """Hold the run folder: a new one, or that of the same run, unfinished."""
    accelerator, config = task.accelerator, task.config
    with alone(task.folder) if accelerator.is_main_process else contextlib.nullcontext():
        open_or_resume(config.run, as_yaml(config), task.identity, accelerator)
        if accelerator.is_main_process and task.pools is not None:
            write_pools(task.folder, task.dataset, task.split.test, task.pools)
        yield


def score_baseline(
    task: Task, encoded: Encoded | None
) -> tuple[dict[str, Ranking], dict[str, Any]]:
    """Count or read, then rank: the rows that learn nothing by gradients."""
    began, config = time.perf_counter(), task.config
    ends = fit_ends(task.dataset.interactions, config.split, config.run.fit_on)
    scores = baseline_scores(config, task.dataset, task.split.test, ends, encoded)
    ranking = rank_cases(task, scores, "test")
    cost = {"train_seconds": time.perf_counter() - began, "trainable_parameters": 0, "flops": 0}
    return {"test": ranking}, with_encoding(cost, encoded)


def with_encoding(cost: dict[str, Any], encoded: Encoded | None) -> dict[str, Any]:
    """A run's cost with that of the text vectors that it read."""
    if encoded is None:
        return cost
    cost |= {f"encode_{name}": value for name, value in encoded.cost.items()}
    cost |= {"encoder": encoded.encoder}
    # Once each: texts before training, the frozen blocks below, the catalogue as it is judged.
    for name in ("encode_flops", "cache_flops", "catalogue_flops"):
        cost["flops"] += cost.get(name, 0)
    return cost


def refuse_untrainable(task: Task) -> None:
    """Refuse data that is too little to train on, and options that do not fit it."""
    config, accelerator = task.config, task.accelerator
    ends = fit_ends(task.dataset.interactions, config.split, "train")
    rows = training_rows(config, task.dataset, ends)
    if not len(rows):
        way_out = "Raise data.max_user_interactions to 4 or more, or give longer histories."
        if config.split.method == "temporal":
            way_out = "Lower split.valid_share and split.test_share, or give longer histories."
        raise UsageError(f"no user has two interactions to train on. {way_out}")
    if sharded():
        refuse_unshardable(config.encoder, config.optim)
    share = accelerator.num_processes * config.optim.accumulate
    if min(config.optim.batch_size, len(rows)) < share:
        raise UsageError(
            f"optim.accumulate={config.optim.accumulate} on {accelerator.num_processes} processes "
            f"needs {share} users a step; optim.batch_size={config.optim.batch_size} and the data "
            f"has {len(rows)}. Lower optim.accumulate."
        )
    check_tensorboard(config.run)


def train(task: Task, encoded: Encoded | None) -> tuple[dict[str, Ranking], dict[str, Any]]:
    """Select the epoch on validation, refit on train+valid if asked to, score test once."""
    config, interactions = task.config, task.dataset.interactions
    fitted = fit(task, encoded, fit_ends(interactions, config.split, "train"))
    cost, model = fitted.cost, fitted.model
    if config.run.fit_on == "train+valid":
        ends = fit_ends(interactions, config.split, "train+valid")
        refitted = fit(task, encoded, ends, refit_epochs=fitted.epoch)
        cost |= {f"refit_{name}": value for name, value in refitted.cost.items()}
        for name in ("train_seconds", "flops"):
            cost[name] += refitted.cost[name]
        model = refitted.model
    assert fitted.validation is not None
    if isinstance(model.user_model, KnownUserModel):
        known = model.user_model.known.cpu().numpy()[task.split.test.user]
        cost["unknown_test_users"] = int((~known).sum())
        task.console.print(f"  {cost['unknown_test_users']} test users without any training")
    rankings = {"valid": fitted.validation, "test": evaluate(task, model, "test")}
    return rankings, with_encoding(cost, encoded)


def fit(
    task: Task, encoded: Encoded | None, train_end: Int64, refit_epochs: int | None = None
) -> Fitted:
    """The training loop.

    Args:
        task: data, config, accelerator.
        encoded: text vectors, for towers that read them.
        train_end: (U,), what may be learned from.
        refit_epochs: train so many epochs and keep the last weights; otherwise validate after each,
            stop early and keep the best.
    """
    learner = start_stage(task, encoded, train_end, refit_epochs)
    epochs, model, progress = learner.epochs, learner.model, learner.epochs.progress
    log = epochs.open_log(task.console)
    while not progress.finished:
        loss, score = train_epoch(task, learner), math.nan
        if not refit_epochs:
            ranking = evaluate(task, model, "valid")
            score = float(Measure.parse(task.config.run.select).per_case(ranking).mean())
        epochs.end(log, loss, score, model.flops)
    epochs.close(log)
    cost = epochs.cost()
    if model.tower.language_model is not None:
        costs = gather_object([model.tower.language_model.cost()])
        cost |= max(costs, key=lambda cost: cost["memory_halvings"])
    validation = None if refit_epochs else evaluate(task, model, "valid")
    return Fitted(model, progress.best_epoch, validation, cost)


def start_stage(
    task: Task, encoded: Encoded | None, train_end: Int64, refit_epochs: int | None
) -> Learner:
    """Fresh weights and optimizer, or those of the latest state that a killed run left."""
    config, accelerator, dataset = task.config, task.accelerator, task.dataset
    accelerator.free_memory()  # what the stage before held
    rows = training_rows(config, dataset, train_end)
    negatives: NegativeSampler | SharedNegatives | None = None
    if config.loss.name in NEGATIVE_LOSSES:
        data = (dataset.interactions, train_end, dataset.item_count)
        shares, sampler = config.loss.shares, config.loss.sampler
        negatives = SharedNegatives.of(*data, sampler) if shares else NegativeSampler(*data)
    with accelerator.main_process_first():  # the others then find the cached states
        model = build(config, dataset, encoded, train_end, accelerator.device)
    if sharded():
        shard(model, accelerator.device)
    language = model.tower.language_model
    optimizer = build_optimizer(model, config.optim, language, config.encoder)
    wrapped: nn.Module = model
    if not sharded():
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    stage: Stage = "refit" if refit_epochs else "fit"
    progress = resume_stage(config.run, stage, model, optimizer, accelerator, task.console)
    if progress.flops:
        model.flops = progress.flops[accelerator.process_index]
    epochs = Epochs(
        stage, config.run, config.optim, task.identity, model, optimizer, progress, accelerator,
        refit_epochs,
    )  # fmt: skip
    return Learner(model, wrapped, optimizer, rows, negatives, epochs)


def training_rows(config: TrainConfig, dataset: Dataset, train_end: Int64) -> TrainingRows:
    """What the user model learns from, asked for as it wants it."""
    model = config.model
    objective = USER_MODELS[model.name].objective
    last_only = config.loss.positions == "last"
    return TrainingRows.of(
        dataset.interactions, train_end, model.max_length, objective, last_only, model.mask_share
    )


def train_epoch(task: Task, learner: Learner) -> float:
    """One pass over all rows, or the rest of it; the mean loss of a target.

    Nothing random outlives a step: the order of the batches follows from seed and epoch, masks and
    negatives from these and the step, dropout from these and the process. So a resumed run does
    what an undisturbed one does.
    """
    config, accelerator, epochs = task.config, task.accelerator, learner.epochs
    progress = epochs.progress
    optim, rows, epoch = config.optim, learner.rows, progress.epoch
    batches = rows.batches(optim.batch_size, np.random.default_rng(epochs.entropy()))
    steps = optim.epochs * math.ceil(len(rows) / optim.batch_size)
    summed = torch.zeros((), device=accelerator.device)
    if progress.losses:
        summed += progress.losses[accelerator.process_index]
    learner.wrapped.train()
    began = time.perf_counter() - progress.epoch_seconds
    with progress_bar(task.console) as bar:
        shown = bar.add_task(f"epoch {epoch}", total=len(batches), completed=progress.step)
        for number in range(progress.step, len(batches)):
            summed += _step_in_memory(task, learner, batches[number], number)
            if optim.clip != "off":
                accelerator.clip_grad_norm_(learner.wrapped.parameters(), optim.clip)
            set_rate(learner.optimizer, (epoch - 1) * len(batches) + number, steps, optim)
            learner.optimizer.step()
            learner.optimizer.zero_grad()
            progress.step = number + 1
            bar.update(shown, completed=progress.step)
            epochs.check(summed, len(batches))
            if epochs.due(len(batches)):
                progress.epoch_seconds = time.perf_counter() - began
                epochs.save_state(float(summed), learner.model.flops)
    progress.epoch_seconds = time.perf_counter() - began
    return float(accelerator.reduce(summed, "sum")) / int(rows.targets.sum())


def _step_in_memory(task: Task, learner: Learner, batch: Int64, number: int) -> Tensor:
    """`train_step`; where memory runs out it is begun again, holding half as much of the texts.

    The batch stays what it is, so only rounding and the shape of dropout change.
    """
    language = learner.model.tower.language_model
    while True:
        learner.epochs.reseed(number)
        rng = np.random.default_rng(learner.epochs.entropy(number))
        try:
            return train_step(task, learner, batch, rng)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if language is None or task.accelerator.num_processes > 1:  # the others wait for this one
            options = "optim.accumulate" if language is None else "encoder.step_tokens"
            raise UsageError(
                f"memory ran out in a training step. {'Raise' if language is None else 'Lower'} "
                f"{options}, or use a smaller model."
            )
        learner.optimizer.zero_grad()
        language.halve()


def train_step(task: Task, learner: Learner, batch: Int64, rng: np.random.Generator) -> Tensor:
    """Gradients of one step; returns this process's summed loss.

    The gradient is that of the mean over all targets of the step, however many processes and
    pieces share them: each piece's sum is divided by the whole step's targets, and DDP's
    averaging is undone. Negatives are drawn for the whole step by every process, which then takes
    its own, so they do not depend on the number of processes or pieces either. A process or piece
    that a short batch leaves without rows joins in with one that counts for nothing.
    """
    accelerator, count = task.accelerator, task.config.loss.negatives
    world, rank = accelerator.num_processes, accelerator.process_index
    examples = learner.rows.examples(batch, rng)
    asked = int((examples.targets > 0).sum())
    size, width = examples.inputs.shape
    shared, drawn = np.empty(0, np.int64), np.empty((size, width, 0), np.int64)
    if isinstance(learner.negatives, SharedNegatives):
        shared = learner.negatives.draw(count, rng)
    elif learner.negatives is not None:
        drawn = learner.negatives.draw(examples.users, (width, count), rng)

    def arrays(part: Int64) -> tuple[Examples, Int64]:
        own = examples.take(part)
        if task.config.loss.shares:
            return own, shared
        sampled = drawn[part, width - own.inputs.shape[1] :]  # left padded
        return own, sampled * (own.targets > 0)[:, :, None]

    pieces = task.config.optim.accumulate
    shares = [np.array_split(np.arange(size)[r::world], pieces) for r in range(world)]
    summed = torch.zeros((), device=accelerator.device)
    for number, parts in enumerate(zip(*shares, strict=True), start=1):
        counts = len(parts[rank]) > 0
        everyone = np.concatenate([*parts, np.zeros(0 if any(map(len, parts)) else 1, np.int64)])
        part = parts[rank] if counts else everyone[:1]
        together = None
        if learner.model.shares_items:
            everybody, sampled = arrays(everyone)
            together = everybody.sequences, sampled
        moved = Batch.of(*arrays(part), together).to(accelerator.device)
        waiting = number < pieces and not sharded()  # whole gradients would not fit
        with accelerator.no_sync(learner.wrapped) if waiting else contextlib.nullcontext():
            with accelerator.autocast():  # which DDP does itself, and FSDP does not
                loss = learner.wrapped(moved)
            accelerator.backward(loss * (counts * world / asked))
        summed += loss.detach() * counts
    return summed


def evaluate(task: Task, model: Recommender, part: Part) -> Ranking:
    """Rank the validation or test cases, shared by the processes; each of them gets all."""
    cases = task.split.test if part == "test" else task.split.valid
    interactions, length = task.dataset.interactions, task.config.model.max_length
    device = task.accelerator.device
    return rank_cases(task, recommender_scores(model, interactions, cases, length, device), part)


def rank_cases(task: Task, scores: Scores, part: Part) -> Ranking:
    """Rank this process's blocks of cases and gather everybody's."""
    test, accelerator, dataset = part == "test", task.accelerator, task.dataset
    cases = task.split.test if test else task.split.valid
    candidates = task.split.test_candidates if test else task.split.valid_candidates
    if not len(cases):
        raise UsageError(
            f"the split has no {part} case. "
            f"Change split.{part}_share or data.min_user_interactions."
        )
    ranked = rank_scores(
        scores,
        dataset.item_count,
        dataset.interactions,
        cases,
        task.pools if test and task.pools is not None else candidates,
        task.config.evaluation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    return merge(gather_object([ranked]), len(cases))


def finish(task: Task, rankings: dict[str, Ranking], cost: dict[str, Any]) -> None:
    """Write per-user values and the result, and say the main figures."""
    config = task.config
    filter_seen = config.evaluation.filter_seen
    facts = run_facts(config, task.accelerator, cost, filter_seen, selected="valid" in rankings)
    learned = fit_ends(task.dataset.interactions, config.split, config.run.fit_on)
    result = build_result(
        facts, task.dataset, task.split, rankings, learned_end=learned, pools=task.pools
    )
    record = write_result(task.folder, result, run_card)
    checkpoints.finish_checkpoints(task.folder)
    test = record["metrics"]["test"]
    shown = ", ".join(f"{name} {test[name]['mean']:.4f}" for name in ("HR@10", "NDCG@10"))
    task.console.print(f"{config.run.label}, seed {config.run.seed}: test {shown} -> {task.folder}")


if __name__ == "__main__":
    sys.exit(main())
