"""Train one recommender and score it once: item tower x SASRec x loss, from one YAML.

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
import importlib.util
import math
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmrec.data.batches import NegativeSampler, TrainingRows, windows
from llmrec.data.interactions import Dataset, Int64, Split
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.splits import SplitConfig, fit_ends, split, summary, training_counts
from llmrec.encoders.store import Encoded, encode_catalog
from llmrec.encoders.text import EncoderConfig
from llmrec.encoders.tower import TowerConfig, build_tower, prepare_features
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.metrics import Measure, Ranking, merge
from llmrec.evaluation.ranking import EvaluationConfig, UserVectors, rank
from llmrec.evaluation.result import RunFacts, build_result, write_result
from llmrec.models.baselines import BASELINES
from llmrec.models.losses import LossConfig
from llmrec.models.optim import OptimConfig, parameter_groups, rate
from llmrec.models.recommender import Batch, Recommender
from llmrec.models.sasrec import USER_MODELS, UserModelConfig
from llmrec.options import as_dict, as_yaml, parse
from llmrec.progress import EpochLog, progress_bar
from llmrec.runs import (
    CHECKPOINTS,
    check_folder,
    check_vacant,
    new_folder,
    open_run,
    remove_others,
)

Part = Literal["valid", "test"]
HISTORIES = 512
"""Histories encoded at once in an evaluation."""
PROG, DESCRIPTION = (
    "llmrec train",
    "Train one recommender, select it on validation, score it once on test.",
)


@dataclass(frozen=True)
class RunConfig:
    """One run: its name, seed and folder."""

    label: str = ""
    """The row's name in tables; runs that differ only in seed share it. Empty: model and tower."""
    seed: int = 0
    """Decides initial weights, batches, dropout, negatives and controls."""
    folder: str = ""
    """Where the run is written. Empty: runs/<data>-<label>-s<seed>."""
    overwrite: bool = False
    """Whether a finished run in that folder may be replaced."""
    store: str = "cache/embeddings"
    """Folder of the embedding store."""
    fit_on: Literal["train", "train+valid"] = "train"
    """train+valid trains again on both, for the number of epochs that validation selected."""
    select: str = "NDCG@10"
    """Validation measure that picks the epoch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32."""
    tensorboard: bool = False
    """Whether curves are also written for TensorBoard (extra `report`)."""

    def __post_init__(self) -> None:
        """Refuse seeds that not every random generator takes."""
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"run.seed={self.seed} must lie in [0, 2**32).")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; the defaults are the quick start's text model."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    tower: TowerConfig = field(default_factory=TowerConfig)
    model: UserModelConfig = field(default_factory=UserModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Task:
    """What every stage of a run looks at."""

    config: TrainConfig
    dataset: Dataset
    split: Split
    accelerator: Accelerator
    console: Console

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.folder)


@dataclass(frozen=True)
class Learner:
    """What a training step moves and draws from."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    rows: TrainingRows
    negatives: NegativeSampler | None


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
    config = parse(TrainConfig, argv, PROG, DESCRIPTION)
    Measure.parse(config.run.select)
    label = config.run.label or _label(config)
    data = Path(config.data.source).stem
    folder = config.run.folder or f"runs/{data}-{label}-s{config.run.seed}"
    return replace(config, run=replace(config.run, label=label, folder=folder))


def _label(config: TrainConfig) -> str:
    if config.model.name in BASELINES:
        return config.model.name
    control = "" if config.tower.control == "none" else f"-{config.tower.control}"
    return f"{config.model.name}-{config.tower.name}{control}"


def run(argv: Sequence[str]) -> int:
    """Data -> tower and user model -> training -> one test -> run folder."""
    config = configure(argv)
    accelerator = start(config)
    console = Console(
        stderr=True,
        quiet=not accelerator.is_main_process,
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    check_vacant(Path(config.run.folder), config.run.overwrite)
    dataset = load_dataset(config.data)
    task = Task(config, dataset, split(dataset, config.split), accelerator, console)
    console.print(
        f"{config.run.label}, seed {config.run.seed}: {dataset.name}, "
        f"{dataset.interactions.user_count} users, {dataset.item_count} items, "
        f"{len(dataset.interactions.items)} interactions; "
        f"{accelerator.num_processes} x {accelerator.device.type}, "
        f"{'fp32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision}"
    )
    console.print(f"  {summary(dataset, task.split)}")
    learns = config.model.name not in BASELINES
    encoded = prepare(task) if learns else None  # may refuse, so before the folder is made
    if accelerator.is_main_process:
        open_run(task.folder, as_yaml(config), config.run.overwrite)
    rankings, cost = train(task, encoded) if learns else score_baseline(task)
    if accelerator.is_main_process:
        finish(task, rankings, cost)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def start(config: TrainConfig) -> Accelerator:
    """The processes, their devices and the number format."""
    precision = config.run.precision
    if precision == "auto":
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if gpu else "fp32"
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=not torch.accelerator.is_available(),  # unsaid, torchrun's processes would not join
    )
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != wanted:
        raise UsageError(
            f"{wanted} processes were launched but {accelerator.num_processes} joined. Start them "
            "with accelerate launch or torchrun."
        )
    return accelerator


def score_baseline(task: Task) -> tuple[dict[str, Ranking], dict[str, Any]]:
    """Count, then rank: the rows that learn nothing by gradients."""
    began, interactions = time.perf_counter(), task.dataset.interactions
    ends = fit_ends(interactions, task.config.split, task.config.run.fit_on)
    items = BASELINES[task.config.model.name](
        training_counts(interactions, ends, task.dataset.item_count)
    )
    ranking = rank_cases(task, lambda cases: torch.ones(len(cases), 1), items, "test")
    return {"test": ranking}, {
        "train_seconds": time.perf_counter() - began,
        "trainable_parameters": 0,
        "flops": 0,
    }


def prepare(task: Task) -> Encoded | None:
    """Refuse what cannot be trained and encode the items' text, for towers that read it."""
    config, accelerator = task.config, task.accelerator
    ends = fit_ends(task.dataset.interactions, config.split, "train")
    rows = TrainingRows.of(task.dataset.interactions, ends, config.model.max_length)
    if not len(rows):
        way_out = "Raise data.max_user_interactions to 4 or more, or give longer histories."
        if config.split.method == "temporal":
            way_out = "Lower split.valid_share and split.test_share, or give longer histories."
        raise UsageError(f"no user has two interactions to train on. {way_out}")
    share = accelerator.num_processes * config.optim.accumulate
    if min(config.optim.batch_size, len(rows)) < share:
        raise UsageError(
            f"optim.accumulate={config.optim.accumulate} on {accelerator.num_processes} processes "
            f"needs {share} users a step; optim.batch_size={config.optim.batch_size} and the data "
            f"has {len(rows)}. Lower optim.accumulate."
        )
    if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("run.tensorboard needs an extra: pip install 'llmrec[report]'.")
    if config.tower.name == "id":
        return None
    with accelerator.main_process_first():  # the others then find everything in the store
        return encode_catalog(
            task.dataset.catalog, config.encoder, Path(config.run.store), accelerator.device
        )


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
    if encoded is not None:
        cost |= {f"encode_{name}": value for name, value in encoded.cost.items()}
        cost |= {"encoder": encoded.encoder, "flops": cost["flops"] + encoded.cost["flops"]}
    assert fitted.validation is not None
    return {"valid": fitted.validation, "test": evaluate(task, model, "test")}, cost


def build(task: Task, encoded: Encoded | None, train_end: Int64) -> Recommender:
    """Fresh weights from the run's seed."""
    config, dataset = task.config, task.dataset
    set_seed(config.run.seed)
    features = None
    if encoded is not None:
        features = prepare_features(encoded.vectors, config.tower, config.run.seed)
    tower = build_tower(config.tower, dataset.item_count, config.model.width, features)
    popularity = training_counts(dataset.interactions, train_end, dataset.item_count)
    user_model = USER_MODELS[config.model.name](config.model)
    return Recommender(tower, user_model, config.loss, torch.from_numpy(popularity))


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
    config, accelerator = task.config, task.accelerator
    rows = TrainingRows.of(task.dataset.interactions, train_end, config.model.max_length)
    negatives = None
    if config.loss.name == "bce":
        negatives = NegativeSampler(task.dataset.interactions, train_end, task.dataset.item_count)
    model = build(task, encoded, train_end)
    trainable = sum(weight.numel() for weight in model.parameters())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim), lr=config.optim.lr, fused=True
    )
    steps = config.optim.epochs * math.ceil(len(rows) / config.optim.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(step, steps, config.optim)
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    learner = Learner(wrapped, optimizer, scheduler, rows, negatives)
    if accelerator.process_index:  # the weights come from the first process, dropout is one's own
        torch.manual_seed(config.run.seed + accelerator.process_index)
    stage = "fit" if refit_epochs is None else "refit"
    log = EpochLog(task.folder, stage, config.run.select, task.console, config.run.tensorboard)
    best, best_epoch, validation, train_seconds = -math.inf, 0, None, 0.0
    for epoch in range(1, (refit_epochs or config.optim.epochs) + 1):
        began = time.perf_counter()
        loss = train_epoch(task, learner, epoch)
        seconds, score = time.perf_counter() - began, math.nan
        train_seconds += seconds
        if refit_epochs is None:
            ranking = evaluate(task, model, "valid")
            score = float(Measure.parse(config.run.select).per_case(ranking).mean())
        log.add(epoch, seconds, loss, float(scheduler.get_last_lr()[0]), score)
        if refit_epochs is not None or score > best:
            best, best_epoch, validation = score, epoch, ranking if refit_epochs is None else None
            save(task, model, stage, epoch)
        elif epoch - best_epoch >= config.optim.patience:
            break
    log.close()
    accelerator.wait_for_everyone()
    load(task, model, stage, best_epoch)
    cost = {
        "train_seconds": train_seconds,
        "epochs": epoch,
        "selected_epoch": best_epoch,
        "trainable_parameters": trainable,
        "flops": model.flops * accelerator.num_processes,
    }
    return Fitted(model, best_epoch, validation, cost)


def train_epoch(task: Task, learner: Learner, epoch: int) -> float:
    """One pass over all rows; the mean loss of a position."""
    optim, accelerator = task.config.optim, task.accelerator
    plan = np.random.default_rng((task.config.run.seed, epoch))  # the same on every process
    draws = np.random.default_rng((task.config.run.seed, epoch, 1 + accelerator.process_index))
    smallest = accelerator.num_processes * optim.accumulate
    batches = learner.rows.batches(optim.batch_size, smallest, plan)
    summed, positions = torch.zeros((), device=accelerator.device), 0
    learner.model.train()
    with progress_bar(task.console) as progress:
        bar = progress.add_task(f"epoch {epoch}", total=len(batches))
        for number, batch in enumerate(batches, start=1):
            summed += train_step(task, learner, batch, draws)
            positions += int(learner.rows.lengths[batch].sum())
            if optim.clip != "off":
                accelerator.clip_grad_norm_(learner.model.parameters(), optim.clip)
            learner.optimizer.step()
            learner.scheduler.step()
            learner.optimizer.zero_grad()
            progress.update(bar, completed=number)
            if (number % 50 == 0 or number == len(batches)) and not torch.isfinite(summed):
                raise UsageError(
                    f"the loss is not finite in epoch {epoch}, by step {number}. Lower "
                    f"optim.lr={optim.lr:g} or optim.clip={optim.clip}; nothing of this "
                    "epoch was written."
                )
    return float(accelerator.reduce(summed, "sum")) / positions


def train_step(task: Task, learner: Learner, batch: Int64, rng: np.random.Generator) -> Tensor:
    """Gradients of one step; returns this process's summed loss.

    The gradient is that of the mean over all positions of the step, however many processes and
    pieces share them: each piece's sum is divided by the whole step's positions, and DDP's
    averaging is undone.
    """
    accelerator, rows = task.accelerator, learner.rows
    world = accelerator.num_processes
    positions = int(rows.lengths[batch].sum())
    pieces = np.array_split(batch[accelerator.process_index :: world], task.config.optim.accumulate)
    summed = torch.zeros((), device=accelerator.device)
    for number, piece in enumerate(pieces, start=1):
        inputs, targets = rows.pairs(piece)
        drawn = np.empty((*inputs.shape, 0), np.int64)
        if learner.negatives is not None:
            drawn = learner.negatives.draw(
                rows.users[piece], (inputs.shape[1], task.config.loss.negatives), rng
            )
        moved = Batch(*map(torch.from_numpy, (inputs, targets, drawn))).to(accelerator.device)
        waiting = number < len(pieces)
        with accelerator.no_sync(learner.model) if waiting else contextlib.nullcontext():
            loss = learner.model(moved)
            accelerator.backward(loss * (world / positions))
        summed += loss.detach()
    return summed


def evaluate(task: Task, model: Recommender, part: Part) -> Ranking:
    """Rank the validation or test cases, shared by the processes; each of them gets all."""
    cases = task.split.test if part == "test" else task.split.valid
    interactions, device = task.dataset.interactions, task.accelerator.device
    model.eval()
    with torch.inference_mode():
        items = model.item_vectors()

    @torch.inference_mode()
    def users(block: Int64) -> Tensor:
        pieces = []
        for start in range(0, len(block), HISTORIES):
            piece = block[start : start + HISTORIES]
            seen = windows(
                interactions, cases.user[piece], cases.end[piece], task.config.model.max_length
            )
            pieces.append(model.user_vectors(torch.from_numpy(seen).to(device), items))
        return torch.cat(pieces)

    return rank_cases(task, users, items, part)


def rank_cases(task: Task, users: UserVectors, items: Tensor, part: Part) -> Ranking:
    """Rank this process's blocks of cases and gather everybody's."""
    test, accelerator = part == "test", task.accelerator
    cases = task.split.test if test else task.split.valid
    candidates = task.split.test_candidates if test else task.split.valid_candidates
    if not len(cases):
        raise UsageError(
            f"the split has no {part} case. "
            f"Change split.{part}_share or data.min_user_interactions."
        )
    ranked = rank(
        users,
        items,
        task.dataset.interactions,
        cases,
        candidates,
        task.config.evaluation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    return merge(gather_object([ranked]), len(cases))


def save(task: Task, model: Recommender, stage: str, epoch: int) -> None:
    """Write a checkpoint beside the older ones, then delete those of the same stage."""
    if task.accelerator.is_main_process:
        path = task.folder / CHECKPOINTS / f"{stage}-epoch-{epoch:03d}"
        with new_folder(path) as folder:
            weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
            save_file(weights, folder / "model.safetensors")
        remove_others(path, f"{stage}-epoch-*")


def load(task: Task, model: Recommender, stage: str, epoch: int) -> None:
    """Put a checkpoint's weights into the model."""
    path = task.folder / CHECKPOINTS / f"{stage}-epoch-{epoch:03d}"
    check_folder(path, f"Train again with --run.folder {task.folder} --run.overwrite true.")
    model.load_state_dict(load_file(path / "model.safetensors"))


def finish(task: Task, rankings: dict[str, Ranking], cost: dict[str, Any]) -> None:
    """Write per-user values and the result, and say the main figures."""
    config = task.config
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    if task.accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(task.accelerator.device)
    facts = RunFacts(
        name=task.folder.name,
        label=config.run.label,
        seed=config.run.seed,
        config=as_dict(config),
        data_source=config.data.source,
        split=config.split.method,
        filter_seen=str(config.evaluation.filter_seen).lower(),
        fit_on=config.run.fit_on,
        selection=config.run.select if "valid" in rankings else "none",
        cost=cost | {"peak_memory_bytes": peak},
    )
    result = build_result(facts, task.dataset, task.split, rankings)
    write_result(task.folder, result)
    test = result.record["metrics"]["test"]
    shown = ", ".join(f"{name} {test[name]['mean']:.4f}" for name in ("HR@10", "NDCG@10"))
    task.console.print(f"{config.run.label}, seed {config.run.seed}: test {shown} -> {task.folder}")


if __name__ == "__main__":
    sys.exit(main())
