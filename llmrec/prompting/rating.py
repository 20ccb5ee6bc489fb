"""Train one predictor of ratings and score it once: RMSE, MAE and AUC beside plain means.

accelerate launch llmrec/prompting/rating.py --data.source ml-100k
torchrun --nproc_per_node 2 llmrec/prompting/rating.py ...      two processes
llmrec rating ...                                               the same, from the console
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # by path: the repository's root comes first, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from torch import Tensor, nn

from llmrec import checkpoints
from llmrec.data.interactions import Dataset, Int64, Split
from llmrec.data.readers import effective, load_dataset
from llmrec.data.splits import FitOn, fit_ends, split, summary
from llmrec.data.titles import displayed
from llmrec.encoders.loading import locate
from llmrec.encoders.text import out_of_memory
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.card import run_card
from llmrec.evaluation.metrics import Float64
from llmrec.evaluation.ratings import RATING_MEASURES, mean_baselines, rating_values
from llmrec.evaluation.result import build_rating_result, identity, write_result
from llmrec.launch import sharded, start
from llmrec.models.optim import build_optimizer, set_rate
from llmrec.options import as_dict, as_yaml, parse
from llmrec.progress import progress_bar
from llmrec.prompting.rating_config import RatingConfig
from llmrec.prompting.rating_data import Offsets, Pairs, Rated
from llmrec.prompting.rating_language import LanguageRater
from llmrec.prompting.rating_models import (
    COUNTED,
    Rater,
    TransformerRater,
)
from llmrec.prompting.templates import Prompt, load_prompt
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

PROG, DESCRIPTION = (
    "llmrec rating",
    "Train one predictor of ratings, select it on validation RMSE, score it once on test.",
)
TEMPLATE = "model.template"
PAIRS = 256
"""Pairs predicted at once in an evaluation."""


@dataclass(frozen=True)
class Task:
    """What every part of a run looks at."""

    config: RatingConfig
    dataset: Dataset
    split: Split
    """Without the cases whose target has no rating."""
    rated: Rated
    identity: dict[str, Any]
    """What decides the run's numbers: options, data, ratings, language model and template."""
    accelerator: Accelerator
    console: Console

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.folder)

    def ends(self, fit_on: FitOn) -> Int64:
        """Where each user's part to learn from ends, (U,)."""
        return fit_ends(self.dataset.interactions, self.config.split, fit_on)

    def learned(self, fit_on: FitOn) -> tuple[Pairs, Offsets]:
        """Every rating of a part to learn from, and the offsets in it."""
        training, model = self.rated.training(self.ends(fit_on)), self.config.model
        shrinkages = (model.item_shrinkage, model.user_shrinkage)
        return training, Offsets.of(self.rated, training, self.dataset.item_count, *shrinkages)


@dataclass(frozen=True)
class Learner:
    """One stage of training: what a step moves, what it draws from, and how far it is."""

    model: Rater
    wrapped: nn.Module
    """The model as Accelerate distributes it."""
    optimizer: torch.optim.Optimizer
    pairs: Pairs
    epochs: Epochs


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``llmrec rating`` and of this file run by path."""
    return exit_code(run, sys.argv[1:] if argv is None else argv)


def configure(argv: Sequence[str]) -> RatingConfig:
    """The config of a command line, with the run's label and folder filled in."""
    words = [f"--run.{w[2:]}" if w.partition("=")[0] == "--resume" else w for w in argv]
    config, given = parse(RatingConfig, words, PROG, DESCRIPTION)
    config = replace(config, data=effective(config.data, given))
    label = config.run.label or _label(config)
    data = Path(config.data.source).stem
    folder = config.run.folder or f"runs/{data}-{label}-s{config.run.seed}"
    return replace(config, run=replace(config.run, label=label, folder=folder))


def _label(config: RatingConfig) -> str:
    name, parts = config.model.name, [config.model.name.replace("_", "-")]
    if name in COUNTED:
        return parts[0]
    if name == "language_model":
        parts.append(config.encoder.tune.replace(":", "-"))
    return "-".join([*parts, config.model.head])


def reader_of(config: RatingConfig, told: str) -> str:
    """What tells the ratings, and where text is read the model's files and the prompt, from others.

    Args:
        config: the run's.
        told: fingerprint of the data's ratings and reviews.
    """
    parts = [told]
    if config.model.name == "language_model":
        parts += [locate(config.encoder).identity, _prompt(config).template.sha256]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _prompt(config: RatingConfig) -> Prompt:
    prompt = load_prompt(config.model.template, TEMPLATE)
    inputs, needed = {*prompt.template.inputs}, {"rated", "candidate"}
    if not needed <= inputs or inputs - needed - {"scale"}:
        raise UsageError(
            f"{TEMPLATE}={config.model.template} reads {', '.join(sorted(inputs)) or 'nothing'}; "
            "it must read rated and candidate, and may read scale."
        )
    return prompt


def run(argv: Sequence[str]) -> int:
    """Data -> network -> training -> one test -> run folder."""
    config = configure(argv)
    joined = torch.distributed.is_initialized()  # by a suite, whose processes stay together
    accelerator = start(config.run.precision)
    console = console_of(accelerator)
    check_vacant(Path(config.run.folder), config.run.overwrite)
    task = prepare(config, accelerator, console)
    console.print(
        f"{config.run.label}, seed {config.run.seed}: {task.dataset.name}, "
        f"{task.dataset.interactions.user_count} users, {task.dataset.item_count} items, "
        f"{len(task.rated.rows)} ratings, {len(task.split.test)} to predict; "
        f"{accelerator.num_processes} x {accelerator.device.type}, {number_format(accelerator)}"
    )
    console.print(f"  {summary(task.dataset, task.split)}")
    if unrated := task.split.counts["interactions_without_rating"]:
        left_out = task.split.counts["test_cases_without_rating"]
        console.print(f"  {unrated} interactions have no rating; {left_out} test cases left out")
    with alone(task.folder) if accelerator.is_main_process else contextlib.nullcontext():
        open_or_resume(config.run, as_yaml(config), task.identity, accelerator)
        counted = config.model.name in COUNTED
        predicted, cost = count(task) if counted else train(task)
        if accelerator.is_main_process:
            finish(task, predicted, cost)
        accelerator.wait_for_everyone()
    if not joined:
        accelerator.end_training()
    return 0


def prepare(config: RatingConfig, accelerator: Accelerator, console: Console) -> Task:
    """Read the data and refuse what cannot be rated, before any folder is made."""
    dataset = load_dataset(config.data)
    rated, cut = Rated.of(dataset.interactions, dataset.name), split(dataset, config.split)
    training = rated.training(cut.train_end)
    valid, test = rated.rated(cut.valid), rated.rated(cut.test)
    unrated = {
        "interactions_without_rating": len(dataset.interactions.items) - len(rated.rows),
        "valid_cases_without_rating": len(cut.valid) - len(valid),
        "test_cases_without_rating": len(cut.test) - len(test),
    }
    cut = replace(cut, valid=valid, test=test, counts=cut.counts | unrated)
    for part, cases in (("training", training), ("valid", valid), ("test", test)):
        if not len(cases):
            raise UsageError(
                f"data.source={dataset.name} has no rating in the {part} part. Name another "
                "data.rating_column, or cut otherwise (split.method)."
            )
    refuse_untrainable(config, accelerator, len(drawn(config, training)), dataset)
    told = dataset.told_fingerprint()
    who = {"ratings and reviews": told}  # first, so that a resumed run names them
    who |= identity(as_dict(config), dataset.fingerprint(), reader_of(config, told)) | {
        "number format": accelerator.mixed_precision,
        "device": accelerator.device.type,
    }
    return Task(config, dataset, cut, rated, who, accelerator, console)


def refuse_untrainable(
    config: RatingConfig, accelerator: Accelerator, pairs: int, dataset: Dataset
) -> None:
    """Refuse options that do not fit the data or the processes."""
    if config.model.name in COUNTED:
        return
    if sharded():
        raise UsageError(
            "llmrec rating does not share out weights among processes. Leave out --config_file "
            "configs/accelerate/fsdp2.yaml, and tune with encoder.tune=lora or qlora."
        )
    share = accelerator.num_processes * config.optim.accumulate
    if min(config.optim.batch_size, pairs) < share:
        raise UsageError(
            f"optim.accumulate={config.optim.accumulate} on {accelerator.num_processes} processes "
            f"needs {share} ratings a step; optim.batch_size={config.optim.batch_size} and "
            f"{pairs} are trained on. Lower optim.accumulate."
        )
    if config.model.name == "language_model":
        _prompt(config)
        if not any(dataset.catalog.texts):
            raise UsageError(
                "model.name=language_model reads titles, and no item has one. Name a template "
                "with data.item_text, or use model.name=transformer_mlp."
            )
    check_tensorboard(config.run)


def drawn(config: RatingConfig, training: Pairs) -> Pairs:
    """The ratings that are trained on."""
    wanted = config.optim.training_pairs
    if wanted == "all" or wanted >= len(training):
        return training
    rng = np.random.default_rng(config.run.seed)
    return training.take(np.sort(rng.choice(len(training), wanted, replace=False)))


def count(task: Task) -> tuple[Float64, dict[str, Any]]:
    """Predict by means or offsets: what learns nothing by gradients."""
    began, name, fit_on = time.perf_counter(), task.config.model.name, task.config.run.fit_on
    cases, interactions = task.split.test, task.dataset.interactions
    if name == "bias":
        offsets = task.learned(fit_on)[1]
        predicted = offsets.clip(offsets.expected(task.rated.pairs(cases)))
    else:
        means = mean_baselines(interactions, task.ends(fit_on), cases, task.dataset.item_count)
        predicted = means[name.replace("_", " ")]
    seconds = time.perf_counter() - began
    return predicted, {"train_seconds": seconds, "trainable_parameters": 0, "flops": 0}


def train(task: Task) -> tuple[Float64, dict[str, Any]]:
    """Select the epoch on validation, refit on train+valid if asked to, predict test once."""
    config = task.config
    model, cost = fit(task)
    if config.run.fit_on == "train+valid":
        model, more = fit(task, refit_epochs=cost["selected_epoch"])
        cost |= {f"refit_{name}": value for name, value in more.items()}
        for name in ("train_seconds", "flops"):
            cost[name] += more[name]
    return predict(task, model, task.rated.pairs(task.split.test)), cost


def fit(task: Task, refit_epochs: int | None = None) -> tuple[Rater, dict[str, Any]]:
    """The training loop; a trained network and what it cost.

    Args:
        task: data, config, accelerator.
        refit_epochs: train on train+valid for so many epochs and keep the last weights; otherwise
            validate after each, stop early and keep the best.
    """
    learner, select = start_stage(task, refit_epochs), task.config.run.select
    epochs, model, progress = learner.epochs, learner.model, learner.epochs.progress
    valid = task.rated.pairs(task.split.valid)
    log = epochs.open_log(task.console)
    while not progress.finished:
        loss, score = train_epoch(task, learner), math.nan
        if not refit_epochs:
            score = rating_values(valid.stars, predict(task, model, valid))[select]
        epochs.end(log, loss, score, model.flops)
    epochs.close(log)
    cost = epochs.cost() | {"training_pairs": len(learner.pairs)}
    return model, cost if refit_epochs else cost | {f"valid_{select}": progress.best}


def start_stage(task: Task, refit_epochs: int | None) -> Learner:
    """Fresh weights and optimizer, or those of the latest state that a killed run left."""
    config, accelerator = task.config, task.accelerator
    accelerator.free_memory()  # what the stage before held
    training, offsets = task.learned("train+valid" if refit_epochs else "train")
    pairs = drawn(config, training)
    set_seed(config.run.seed)
    model = build(task, training, offsets)
    for part in (pairs, *map(task.rated.pairs, (task.split.valid, task.split.test))):
        read_ahead(task, model, part)
    optimizer = build_optimizer(model, config.optim, model.language_model, config.encoder)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    stage: Stage = "refit" if refit_epochs else "fit"
    progress = resume_stage(config.run, stage, model, optimizer, accelerator, task.console)
    if progress.flops:
        model.flops = progress.flops[accelerator.process_index]
    epochs = Epochs(
        stage, config.run, config.optim, task.identity, model, optimizer, progress, accelerator,
        refit_epochs, lowest=True,
    )  # fmt: skip
    return Learner(model, wrapped, optimizer, pairs, epochs)


def build(task: Task, training: Pairs, offsets: Offsets) -> Rater:
    """A network with fresh weights."""
    config, catalog = task.config, task.dataset.catalog
    if config.model.name == "transformer_mlp":
        return TransformerRater(config.model, task.rated, offsets, training, len(catalog))
    titles = [displayed(text) for text in catalog.texts]
    return LanguageRater(
        config.model, config.encoder, _prompt(config), titles, task.rated, offsets,
        training, task.accelerator.device,
    )  # fmt: skip


def train_epoch(task: Task, learner: Learner) -> float:
    """One pass over the training ratings, or the rest of it; the mean loss of one.

    Nothing random outlives a step: the order follows from seed and epoch, dropout from these, the
    step and the process. So a resumed run does what an undisturbed one does.
    """
    config, accelerator, epochs = task.config, task.accelerator, learner.epochs
    progress = epochs.progress
    optim, epoch, total = config.optim, progress.epoch, len(learner.pairs)
    order = np.random.default_rng(epochs.entropy()).permutation(total)
    batches = np.split(order, range(optim.batch_size, total, optim.batch_size))
    summed = torch.zeros((), device=accelerator.device)
    if progress.losses:
        summed += progress.losses[accelerator.process_index]
    learner.wrapped.train()
    began = time.perf_counter() - progress.epoch_seconds
    with progress_bar(task.console) as bar:
        shown = bar.add_task(f"epoch {epoch}", total=len(batches), completed=progress.step)
        for number in range(progress.step, len(batches)):
            epochs.reseed(number)
            summed += train_step(task, learner, batches[number])
            if optim.clip != "off":
                accelerator.clip_grad_norm_(learner.wrapped.parameters(), optim.clip)
            step = (epoch - 1) * len(batches) + number
            set_rate(learner.optimizer, step, optim.epochs * len(batches), optim)
            learner.optimizer.step()
            learner.optimizer.zero_grad()
            progress.step = number + 1
            bar.update(shown, completed=progress.step)
            epochs.check(summed, len(batches))
            if epochs.due(len(batches)):
                progress.epoch_seconds = time.perf_counter() - began
                epochs.save_state(float(summed), learner.model.flops)
    progress.epoch_seconds = time.perf_counter() - began
    return float(accelerator.reduce(summed, "sum")) / total


def train_step(task: Task, learner: Learner, batch: Int64) -> Tensor:
    """Gradients of one step; returns this process's summed loss.

    The gradient is that of the mean over the whole step, however many processes and pieces share
    it. A process or piece that a short batch leaves without a rating joins in with one that counts
    for nothing.
    """
    accelerator, pieces = task.accelerator, task.config.optim.accumulate
    world, rank = accelerator.num_processes, accelerator.process_index
    parts = np.array_split(batch[rank::world], pieces)
    summed = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(parts, start=1):
        counts = len(part) > 0
        pairs = learner.pairs.take(part if counts else batch[:1])
        waiting = number < pieces
        try:
            with accelerator.no_sync(learner.wrapped) if waiting else contextlib.nullcontext():
                with accelerator.autocast():
                    loss = learner.wrapped(pairs)
                accelerator.backward(loss * (counts * world / len(batch)))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise UsageError(
                "memory ran out in a training step. Raise optim.accumulate, lower "
                "encoder.max_item_tokens, or use a smaller model."
            ) from error
        summed += loss.detach() * counts
    return summed


def read_ahead(task: Task, model: Rater, pairs: Pairs) -> None:
    """Let a frozen language model read its prompts once, shared by the processes."""
    if not isinstance(model, LanguageRater) or model.language_model is not None:
        return
    accelerator = task.accelerator
    own = np.arange(accelerator.process_index, len(pairs), accelerator.num_processes)
    with progress_bar(task.console) as bar:
        shown = bar.add_task("reading prompts", total=len(own))
        model.prepare(pairs.take(own), lambda done: bar.advance(shown, done))
    if accelerator.num_processes > 1:
        for vectors in gather_object([model.frozen_vectors]):
            model.frozen_vectors.update(vectors)


def predict(task: Task, model: Rater, pairs: Pairs) -> Float64:
    """Stars, (P,), in blocks that do not depend on the number of processes, which share them."""
    accelerator = task.accelerator
    blocks = list(range(0, len(pairs), PAIRS))
    found: dict[int, Float64] = {}
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        for block in blocks[accelerator.process_index :: accelerator.num_processes]:
            rows = np.arange(block, min(block + PAIRS, len(pairs)))
            found[block] = model.predict(pairs.take(rows))
    everyones = {block: stars for part in gather_object([found]) for block, stars in part.items()}
    stars = np.concatenate([everyones[block] for block in blocks])
    if not np.isfinite(stars).all():  # the last step's damage, which no later loss has shown
        rate = f"optim.lr={task.config.optim.lr:g}"
        rate += f" or encoder.lr={task.config.encoder.lr:g}" if task.config.encoder.tuned else ""
        raise UsageError(
            f"the predictions are not finite. Lower {rate}, and start over with --run.resume never."
        )
    return stars


def finish(task: Task, predicted: Float64, cost: dict[str, Any]) -> None:
    """Write predictions and the result, and say the main figures."""
    config, accelerator = task.config, task.accelerator
    selected, reads = config.model.name not in COUNTED, config.model.name == "language_model"
    model = config.encoder.model if reads else "none"
    cost |= {"encoder": {"model": model, "weights": task.identity["encoder weights"]}}
    facts = run_facts(config, accelerator, cost, filter_seen="", selected=selected)
    learned = task.ends(config.run.fit_on)
    result = build_rating_result(facts, task.dataset, task.split, predicted, learned)
    test = write_result(task.folder, result, run_card)["metrics"]["test"]
    checkpoints.finish_checkpoints(task.folder)
    told = {name: test[name]["mean"] for name in RATING_MEASURES}
    shown = ", ".join(f"{n} {'-' if v is None else f'{v:.4f}'}" for n, v in told.items())
    task.console.print(f"{config.run.label}, seed {config.run.seed}: test {shown} -> {task.folder}")


if __name__ == "__main__":
    sys.exit(main())
