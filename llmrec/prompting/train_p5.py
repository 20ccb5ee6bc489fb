"""Train one language model on recommendation prompts and score it once (P5, OpenP5).

accelerate launch llmrec/prompting/train_p5.py                  a small new model on simulated data
accelerate launch llmrec/prompting/train_p5.py --config configs/p5/amazon-beauty-2014-t5-small.yaml
torchrun --nproc_per_node 2 llmrec/prompting/train_p5.py ...    two processes
llmrec p5 train ...                                             the same, from the console
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # by path: the repository's root comes first, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmrec import checkpoints
from llmrec.data.interactions import Dataset, Int64, Split
from llmrec.data.readers import DataConfig, effective, load_dataset
from llmrec.data.splits import FitOn, SplitConfig, fit_ends, split, summary
from llmrec.encoders.loading import Location
from llmrec.encoders.text import out_of_memory
from llmrec.errors import UsageError, exit_code
from llmrec.evaluation.card import run_card
from llmrec.evaluation.config import EvaluationConfig
from llmrec.evaluation.metrics import MEASURES, Measure, Ranking, measure_matrix, merge
from llmrec.evaluation.pools import Pools, write_pools
from llmrec.evaluation.result import (
    build_result,
    identity,
    metrics_of,
    write_result,
)
from llmrec.evaluation.significance import compare
from llmrec.launch import sharded, start
from llmrec.models.optim import OptimConfig, build_optimizer, set_rate
from llmrec.options import as_dict, as_yaml, parse
from llmrec.progress import progress_bar
from llmrec.prompting.asking import (
    Asker,
    Barred,
    DecodingConfig,
    answer_trie,
    list_ranking,
    other_answers,
    other_templates,
    sample,
)
from llmrec.prompting.families import P5Template, load_family_templates
from llmrec.prompting.indexing import Indexing, IndexingConfig, build_indexing, save_indexing
from llmrec.prompting.language_model import LanguageModel
from llmrec.prompting.p5 import Example, PromptConfig, PromptGenerator
from llmrec.prompting.pretrained import LanguageModelConfig, load_tokenizer, located
from llmrec.prompting.tokens import train_tokenizer
from llmrec.prompting.trie import Trie
from llmrec.questions import pool_cases
from llmrec.runs import RunOptions, alone, check_vacant, write_atomically
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
    "llmrec p5 train",
    "Train one language model on recommendation prompts, score it once on test.",
)
TOKENIZER_PROMPTS = 50_000
"""Training prompts that the tokenizer of a new model is learned from, at most."""
LISTED = tuple(measure for measure in MEASURES if measure.cutoff)
"""What lists have; an AUC reads a full ranking."""
INDEXING, TOKENIZER = "indexing.json", "tokenizer.json"


@dataclass(frozen=True)
class P5Config:
    """Everything that decides a run; the defaults are a small new model on simulated data."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    indexing: IndexingConfig = field(default_factory=IndexingConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            epochs=10, batch_size=64, lr=1e-3, weight_decay=0.01, warmup_share=0.05
        )
    )
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        """Refuse what means nothing to lists of answers."""
        if self.evaluation.block_megabytes != EvaluationConfig().block_megabytes:
            raise UsageError(
                "evaluation.block_megabytes means nothing to answers in words. Leave it out; "
                "decoding.batch_prompts bounds memory."
            )
        if self.run.select.strip().upper() == "AUC":
            raise UsageError(
                "run.select=AUC reads a full ranking, and a model that is asked lists "
                f"{self.decoding.beams} items. Use a measure with a cut-off, such as NDCG@10."
            )


@dataclass(frozen=True)
class Task:
    """What every stage of a run looks at."""

    config: P5Config
    dataset: Dataset
    split: Split
    pools: Pools | None
    """What each test case is ranked among; None: among all candidates."""
    templates: tuple[P5Template, ...]
    place: Location | None
    """Where a pretrained model's files are."""
    identity: dict[str, Any]
    """What decides the run's numbers: options, data, prompts, model."""
    accelerator: Accelerator
    console: Console

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.folder)

    @property
    def template(self) -> P5Template:
        """The prompt whose answers are ranked."""
        return next(t for t in self.templates if t.id == self.config.decoding.template)


@dataclass(frozen=True)
class Learner:
    """One stage of training: what a step moves, the prompts it reads, and how far it is."""

    model: LanguageModel
    wrapped: nn.Module
    """The model as Accelerate distributes it."""
    optimizer: torch.optim.Optimizer
    generator: PromptGenerator
    indexing: Indexing
    trie: Trie
    epochs: Epochs


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``llmrec p5 train`` and of this file run by path."""
    return exit_code(run, sys.argv[1:] if argv is None else argv)


def configure(argv: Sequence[str]) -> P5Config:
    """The config of a command line, with the run's label and folder filled in."""
    words = [f"--run.{w[2:]}" if w.partition("=")[0] == "--resume" else w for w in argv]
    config, given = parse(P5Config, words, PROG, DESCRIPTION)
    config = replace(config, data=effective(config.data, given))
    Measure.parse(config.run.select)
    name = Path(config.model.name.replace("scratch:", "")).name
    tune = "" if config.model.tune == "full" else f"-{config.model.tune}"
    label = config.run.label or f"p5-{name}-{config.indexing.name}{tune}"
    folder = config.run.folder or f"runs/{Path(config.data.source).stem}-{label}-s{config.run.seed}"
    return replace(config, run=replace(config.run, label=label, folder=folder))


def run(argv: Sequence[str]) -> int:
    """Data -> prompts -> language model -> one test -> run folder."""
    config = configure(argv)
    joined = torch.distributed.is_initialized()  # by a suite, whose processes stay together
    accelerator = start(config.run.precision)
    if sharded():
        raise UsageError(
            "FSDP is not supported by llmrec p5 train. Use --config_file "
            "configs/accelerate/multi_gpu.yaml, and model.tune=lora or qlora for large models."
        )
    console = console_of(accelerator)
    check_vacant(Path(config.run.folder), config.run.overwrite)
    task = prepare(config, accelerator, console)
    with alone(task.folder) if accelerator.is_main_process else contextlib.nullcontext():
        first = start_stage(task)  # may refuse, so before the folder is made
        refuse_unmeasurable(task, first)
        open_or_resume(config.run, as_yaml(config), task.identity, accelerator)
        if accelerator.is_main_process:
            write_names(task, first)
        learner, cost = train(task, first)
        if accelerator.is_main_process and learner is not first:  # names follow what is learned
            write_names(task, learner)
        tested = ask_test(task, learner)
        if accelerator.is_main_process:
            finish(task, learner, cost, tested)
        accelerator.wait_for_everyone()
    if not joined:
        accelerator.end_training()
    return 0


def prepare(config: P5Config, accelerator: Accelerator, console: Console) -> Task:
    """Read the data, the templates and where the model is; refuse what cannot be asked."""
    dataset = load_dataset(config.data)
    ends, cut = fit_ends(dataset.interactions, config.split), split(dataset, config.split)
    asked, pools = pool_cases(config.evaluation.pool, dataset, cut, ends, str(accelerator.device))
    templates = load_family_templates(config.prompts.templates)
    known = {template.id: template for template in templates}
    wanted = known.get(config.decoding.template)
    if wanted is None or wanted.family != "sequential" or wanted.group != "next":
        able = [t.id for t in templates if (t.family, t.group) == ("sequential", "next")]
        raise UsageError(
            f"decoding.template={config.decoding.template} is no prompt that asks for the next "
            f"item. Use one of {', '.join(able) or 'the shipped ones'}."
        )
    place = located(config.model)
    told = dataset.told_fingerprint()
    who: dict[str, Any] = {"ratings and reviews": told}  # first, so that a resumed run names them
    who |= identity(as_dict(config), dataset.fingerprint(), reader_of(config, told))
    who |= {
        "number format": accelerator.mixed_precision,
        "device": accelerator.device.type,
    }
    console.print(
        f"{config.run.label}, seed {config.run.seed}: {dataset.name}, "
        f"{dataset.interactions.user_count} users, {dataset.item_count} items, "
        f"{len(dataset.interactions.items)} interactions; "
        f"{accelerator.num_processes} x {accelerator.device.type}, {number_format(accelerator)}"
    )
    console.print(f"  {summary(dataset, asked)}")
    return Task(config, dataset, asked, pools, templates, place, who, accelerator, console)


def reader_of(config: P5Config, told: str) -> str:
    """What tells the model's files, the prompts and what these are made of from any others.

    Args:
        config: the run's.
        told: fingerprint of the data's ratings and reviews.
    """
    place = located(config.model)
    templates = load_family_templates(config.prompts.templates)
    parts = [config.model.name if place is None else place.identity, told]
    parts += [f"{template.id} {template.sha256}" for template in templates]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def refuse_unmeasurable(task: Task, learner: Learner) -> None:
    """Refuse what would only fail after hours of training: options and packages of the test."""
    asked = list(other_templates(task.templates, task.config.decoding, trained_families(learner)))
    writing = [template.id for template in asked if template.group == "text"]
    missing = [name for name in ("sacrebleu", "rouge_score") if not importlib.util.find_spec(name)]
    if writing and missing:
        raise UsageError(
            f"prompt {writing[0]} asks for a text, and holding it against the true one needs an "
            "extra: pip install 'llmrec[text]'. Or name other prompts with decoding.others."
        )
    check_tensorboard(task.config.run)
    for template in asked:
        if reason := learner.generator.cannot_ask(template, "test"):
            raise UsageError(f"decoding.others names prompt {template.id}. {reason}")


def trained_families(learner: Learner) -> list[str]:
    """The families that the model is trained on, each once."""
    return list(dict.fromkeys(kind.family for kind in learner.generator.kinds))


def write_names(task: Task, learner: Learner) -> None:
    """Write how items are called and how text becomes tokens: without these weights say nothing."""
    save_indexing(task.folder / INDEXING, learner.indexing, task.dataset)
    tokenizer = learner.model.prompts.tokenizer.backend_tokenizer
    write_atomically(task.folder / TOKENIZER, tokenizer.to_str().encode())
    if task.pools is not None:
        write_pools(task.folder, task.dataset, task.split.test, task.pools)


def train(task: Task, first: Learner) -> tuple[Learner, dict[str, Any]]:
    """Select the epoch on validation; refit on train+valid if asked to."""
    cost = fit(task, first)
    if task.config.run.fit_on == "train":
        return first, cost
    second = start_stage(task, refit_epochs=cost["selected_epoch"])
    again = fit(task, second)
    cost |= {f"refit_{name}": value for name, value in again.items()}
    for name in ("train_seconds", "flops"):
        cost[name] += again[name]
    return second, cost


def start_stage(task: Task, refit_epochs: int | None = None) -> Learner:
    """Fresh weights and optimizer, or those of the latest state that a killed run left."""
    config, accelerator, dataset = task.config, task.accelerator, task.dataset
    accelerator.free_memory()  # what the stage before held
    stage: Stage = "refit" if refit_epochs else "fit"
    fit_on: FitOn = "train+valid" if refit_epochs else "train"
    ends = fit_ends(dataset.interactions, config.split, fit_on)
    indexing = build_indexing(config.indexing, dataset, ends)
    generator = PromptGenerator(
        dataset, task.split, indexing, task.templates, config.prompts, train_end=ends
    )
    for reason in generator.left_out.values() if stage == "fit" else ():
        task.console.print(f"  left out: {reason}")
    if generator.crowded:
        task.console.print(
            f"  {generator.crowded} users have few items they never met: more than half of these "
            "are told them as wrong answers"
        )
    set_seed(config.run.seed)
    with accelerator.main_process_first():
        tokenizer = tokenizer_of(task, generator, indexing)
        model = LanguageModel(
            config.model, task.place, tokenizer, indexing.tokens, accelerator.device
        )
    trie = answer_trie(model, indexing.mentions)
    optimizer = build_optimizer(model, config.optim, tables=model.tables)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    progress = resume_stage(config.run, stage, model, optimizer, accelerator, task.console)
    if progress.flops:
        model.flops = progress.flops[accelerator.process_index]
    epochs = Epochs(
        stage, config.run, config.optim, task.identity, model, optimizer, progress, accelerator,
        refit_epochs,
    )  # fmt: skip
    return Learner(model, wrapped, optimizer, generator, indexing, trie, epochs)


def tokenizer_of(
    task: Task, generator: PromptGenerator, indexing: Indexing
) -> PreTrainedTokenizerFast:
    """The pretrained model's, or one learned from the training prompts of a new model."""
    if task.place is not None:
        return load_tokenizer(task.place)
    examples = itertools.islice(generator.train(task.config.run.seed, 0), TOKENIZER_PROMPTS)
    texts = (text for example in examples for text in (example.input, example.target))
    return train_tokenizer(texts, task.config.model.scratch.vocabulary, indexing.tokens)


def fit(task: Task, learner: Learner) -> dict[str, Any]:
    """The training loop; leaves the selected weights in the model and returns the cost."""
    decoding, seed = task.config.decoding, task.config.run.seed
    epochs, progress = learner.epochs, learner.epochs.progress
    log = epochs.open_log(task.console)
    while not progress.finished:
        loss, score = train_epoch(task, learner), math.nan
        if not epochs.refit_epochs:
            chosen = sample(len(task.split.valid), decoding.valid_cases, seed)
            ranking, _ = ask_items(task, learner, task.template, "valid", chosen)
            score = float(Measure.parse(task.config.run.select).per_case(ranking).mean())
        epochs.end(log, loss, score, learner.model.flops)
    epochs.close(log)
    prompts = learner.generator.count() * (progress.epoch - 1)
    return epochs.cost() | {"selected_validation": progress.best, "prompts": prompts}


def train_epoch(task: Task, learner: Learner) -> float:
    """One pass over an epoch's prompts, or the rest of it; the mean loss of an answer.

    Nothing random outlives a step: the prompts follow from seed and epoch, dropout from these, the
    step and the process. So a resumed run does what an undisturbed one does.
    """
    config, accelerator, epochs = task.config, task.accelerator, learner.epochs
    progress, optim, count = epochs.progress, config.optim, learner.generator.count()
    epoch, length = progress.epoch, math.ceil(count / optim.batch_size)
    summed = torch.zeros((), dtype=torch.float64)
    if progress.losses:
        summed += progress.losses[accelerator.process_index]
    learner.wrapped.train()
    began = time.perf_counter() - progress.epoch_seconds
    with progress_bar(task.console) as bar:
        shown = bar.add_task(f"epoch {epoch}", total=length, completed=progress.step)
        for number, batch in batches(learner, config, progress.step):
            set_rate(learner.optimizer, (epoch - 1) * length + number, optim.epochs * length, optim)
            summed += _step_in_memory(task, learner, batch, number)
            if optim.clip != "off":
                accelerator.clip_grad_norm_(learner.wrapped.parameters(), optim.clip)
            learner.optimizer.step()
            learner.optimizer.zero_grad()
            progress.step = number + 1
            bar.update(shown, completed=progress.step)
            epochs.check(summed, length)
            if epochs.due(length):
                progress.epoch_seconds = time.perf_counter() - began
                epochs.save_state(float(summed), learner.model.flops)
    progress.epoch_seconds = time.perf_counter() - began
    return sum(gather_object([float(summed)])) / count


def batches(learner: Learner, config: P5Config, done: int) -> Iterator[tuple[int, list[Example]]]:
    """The numbered steps of an epoch that are still to do, each with its prompts."""
    seed = 2 * config.run.seed + (learner.epochs.stage == "refit")
    prompts = learner.generator.train(seed, learner.epochs.progress.epoch)
    for number in itertools.count():
        batch = list(itertools.islice(prompts, config.optim.batch_size))
        if not batch:
            return
        if number >= done:
            yield number, batch


def _step_in_memory(task: Task, learner: Learner, batch: list[Example], number: int) -> float:
    """`train_step` with noise of its own; says what to do where memory runs out."""
    learner.epochs.reseed(number)
    try:
        return train_step(task, learner, batch)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UsageError(
            "memory ran out in a training step. Raise optim.accumulate, set "
            "model.checkpointing=true, or use a smaller model."
        ) from error


def train_step(task: Task, learner: Learner, batch: list[Example]) -> float:
    """Gradients of one step; returns this process's summed loss.

    The gradient is that of the mean over all answer tokens of the step, however many processes and
    pieces share them: each piece's sum is divided by the whole step's tokens, and DDP's averaging
    is undone.
    """
    accelerator, prompts = task.accelerator, learner.model.prompts
    world, rank = accelerator.num_processes, accelerator.process_index
    tokens = sum(map(len, prompts.answers([example.target for example in batch])))
    mine = batch[rank::world]
    counts = len(mine) > 0  # else this process joins in with a prompt that counts for nothing
    pieces = np.array_split(np.arange(max(1, len(mine))), task.config.optim.accumulate)
    pieces = [piece for piece in pieces if len(piece)]
    mine = mine or batch[:1]
    summed = 0.0
    for number, piece in enumerate(pieces, start=1):
        part = [mine[row] for row in piece]
        texts, answers = [e.input for e in part], [e.target for e in part]
        packed = learner.model.batches(texts, answers)
        moved = tuple(batch.to(accelerator.device) for batch in packed)
        waiting = number < len(pieces)
        with accelerator.no_sync(learner.wrapped) if waiting else contextlib.nullcontext():
            with accelerator.autocast():
                loss = learner.wrapped(moved)
            accelerator.backward(loss * (counts * world / tokens))
        summed += float(loss.detach()) * counts
    return summed


def asker_of(task: Task, learner: Learner) -> Asker:
    """The trained model, ready to be asked."""
    autocast = task.accelerator.autocast
    return Asker(learner.model, learner.trie, task.config.decoding, autocast)


def ask_items(
    task: Task,
    learner: Learner,
    template: P5Template,
    part: Literal["valid", "test"],
    chosen: Int64 | None = None,
) -> tuple[Ranking, dict[str, int]]:
    """Ask some cases for the next item, shared by the processes; each of them gets all.

    Args:
        task: data and config.
        learner: the model.
        template: asks for an item without candidates.
        part: of the split.
        chosen: rows of its cases; None for all.
    """
    accelerator, test = task.accelerator, part == "test"
    cases = task.split.test if test else task.split.valid
    if not len(cases):
        raise UsageError(
            f"the split has no {part} case. "
            f"Change split.{part}_share or data.min_user_interactions."
        )
    chosen = np.arange(len(cases)) if chosen is None else chosen
    own = np.arange(len(chosen))[accelerator.process_index :: accelerator.num_processes]
    wanted = set(chosen[own].tolist())
    examples = [
        example
        for row, example in enumerate(learner.generator.questions(template, part))
        if row in wanted
    ]
    rows = chosen[own]
    candidates = task.split.test_candidates if test else task.split.valid_candidates
    barred = Barred(
        task.dataset.interactions,
        cases,
        candidates,
        task.pools if test else None,
        task.config.evaluation.filter_seen,
    )
    listed = asker_of(task, learner).items(examples, lambda row: barred.items(int(rows[row])))
    targets = task.dataset.interactions.items[cases.target[rows]]
    sizes = barred.sizes(rows)
    ranking = list_ranking(listed, targets, sizes, task.config.evaluation.top_k)
    gathered = gather_object([(own, ranking, listed.counts)])
    merged = merge([(index, part) for index, part, _ in gathered], len(chosen))
    counts = {name: sum(found[name] for *_, found in gathered) for name in listed.counts}
    return merged, counts


@dataclass(frozen=True)
class Tested:
    """What the trained model answered to the test cases."""

    ranking: Ranking
    """By the prompt that tables show."""
    answers: dict[str, int]
    """How many answers it gave, and how many of these were no use."""
    prompts: dict[str, Any]
    """Every prompt asked, by id: what it asks, of how many cases, with which measures."""
    seconds: float
    """Spent on the prompt that tables show."""


def ask_test(task: Task, learner: Learner) -> Tested:
    """Ask the test cases once, by the prompt that is ranked and by the others."""
    began, main_one = time.perf_counter(), task.template
    ranking, answers = ask_items(task, learner, main_one, "test")
    seconds = time.perf_counter() - began
    others = other_templates(task.templates, task.config.decoding, trained_families(learner))
    found: dict[str, Any] = {}
    for template in (main_one, *others):
        about: dict[str, Any] = {"family": template.family, "asks for": template.target}
        about |= {"held out": template.held_out, "template sha256": template.sha256}
        if (template.family, template.group) == ("sequential", "next"):
            listed, useless = ranking, answers
            if template.id != main_one.id:
                listed, useless = ask_items(task, learner, template, "test")
            values = metrics_of(listed, LISTED)
            found[template.id] = about | {"cases": len(listed), "measures": values} | useless
            if listed is not ranking:
                found[template.id]["less the ranked prompt"] = differences(listed, ranking)
        elif task.accelerator.is_main_process:
            asker, seed = asker_of(task, learner), task.config.run.seed
            found[template.id] = about | other_answers(asker, learner.generator, template, seed)
    return Tested(ranking, answers, found, seconds)


def differences(listed: Ranking, ranked: Ranking) -> dict[str, Any]:
    """What one prompt's answers are worth more than another's, paired on the cases."""
    measures = [Measure.parse(name) for name in ("HR@10", "NDCG@10")]
    ours, theirs = (measure_matrix(ranking, measures)[None] for ranking in (listed, ranked))
    compared = compare(ours, theirs)
    return {str(m): asdict(found) for m, found in zip(measures, compared, strict=True)}


def finish(task: Task, learner: Learner, cost: dict[str, Any], tested: Tested) -> None:
    """Write per-user values and the result, and say the main figures."""
    config = task.config
    cost |= {"answer_seconds": tested.seconds, "encoder": about_model(task)}
    facts = run_facts(config, task.accelerator, cost, config.evaluation.filter_seen)
    learned = fit_ends(task.dataset.interactions, config.split, config.run.fit_on)
    result = build_result(
        facts,
        task.dataset,
        task.split,
        {"test": tested.ranking},
        LISTED,
        learned_end=learned,
        pools=task.pools,
    )
    result.record["p5"] = {
        "template": config.decoding.template,
        "answers": tested.answers,
        "prompts": tested.prompts,
        "families": {kind.name: kind.family for kind in learner.generator.kinds},
        "left_out": learner.generator.left_out,
        "indexing": learner.indexing.fingerprint,
        "packs": learner.model.packs,
        "templates": {template.id: template.sha256 for template in task.templates},
    }
    record = write_result(task.folder, result, run_card)
    checkpoints.finish_checkpoints(task.folder)
    test = record["metrics"]["test"]
    shown = ", ".join(f"{name} {test[name]['mean']:.4f}" for name in ("HR@10", "NDCG@10"))
    task.console.print(f"{config.run.label}, seed {config.run.seed}: test {shown} -> {task.folder}")
    for name, about in tested.prompts.items():
        task.console.print(f"  {told(name, about)}")


def about_model(task: Task) -> dict[str, Any]:
    """What a reader of the result is told of the language model."""
    place, config = task.place, task.config
    return {
        "model": config.model.name,
        "revision": "" if place is None else place.revision,
        "files": "none" if place is None else place.identity,
        "tune": config.model.tune,
        "weights": task.identity["encoder weights"],
    }


def told(name: str, about: dict[str, Any]) -> str:
    """One prompt's measures as a line."""
    values = about["measures"]
    main_ones = ("HR@10", "NDCG@10", "accuracy", "AUC", "RMSE", "MAE", "BLEU-4", "ROUGE-L")
    means = {n: v["mean"] if isinstance(v, dict) else v for n, v in values.items()}
    shown = ", ".join(
        f"{n} {means[n]:.4f}"
        for n in main_ones
        if n in means and not (n == "AUC" and "HR@10" in means)
    )
    part = "held out" if about["held out"] else "seen"
    return f"prompt {name} ({about['family']}, {part}, {about['cases']} cases): {shown}"


if __name__ == "__main__":
    sys.exit(main())
