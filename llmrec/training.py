"""What every training run does around its own steps: console, folder, states, epochs, facts."""

from __future__ import annotations

import importlib.util
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor, nn

from llmrec import checkpoints
from llmrec.checkpoints import Progress
from llmrec.data.readers import DataConfig
from llmrec.data.splits import SplitConfig
from llmrec.errors import UsageError
from llmrec.evaluation.result import RunFacts
from llmrec.models.optim import OptimConfig
from llmrec.options import as_dict
from llmrec.progress import EpochLog
from llmrec.runs import CONFIG, RESULT, RunOptions, open_run, write_atomically

Stage = Literal["fit", "refit"]


def console_of(accelerator: Accelerator) -> Console:
    """Where a run tells how it goes; quiet but for the main process."""
    return Console(
        stderr=True,
        quiet=not accelerator.is_main_process,
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def number_format(accelerator: Accelerator) -> str:
    """fp32 or bf16."""
    mixed = str(accelerator.mixed_precision)
    return "fp32" if mixed == "no" else mixed


def check_tensorboard(run: RunOptions) -> None:
    """Refuse curves that cannot be written."""
    if run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("run.tensorboard needs an extra: pip install 'llmrec[report]'.")


def open_or_resume(
    run: RunOptions, config_yaml: str, identity: Mapping[str, Any], accelerator: Accelerator
) -> None:
    """Start a run folder, or keep the unfinished run in it if this is the same one.

    Args:
        run: names the folder.
        config_yaml: the resolved config, which is written there.
        identity: what decides the run's numbers.
        accelerator: of this process; all of them call this.
    """
    folder = Path(run.folder)
    states = [checkpoints.newest_state(folder, stage) for stage in ("fit", "refit")]
    unfinished = [state for state in states if state]
    if run.resume == "auto" and unfinished and not (folder / RESULT).exists():
        for state in unfinished:
            checkpoints.refuse_another(state, identity, accelerator.num_processes)
        if accelerator.is_main_process:
            write_atomically(folder / CONFIG, config_yaml.encode())
    else:
        accelerator.wait_for_everyone()  # all have looked
        if accelerator.is_main_process:
            open_run(folder, config_yaml, run.overwrite)
    accelerator.wait_for_everyone()


def resume_stage(
    run: RunOptions,
    stage: Stage,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    console: Console,
) -> Progress:
    """Put the latest state that a killed run left into model and optimizer, if there is one."""
    folder, progress = Path(run.folder), Progress()
    state = checkpoints.newest_state(folder, stage)
    if state is not None:
        progress = checkpoints.load_state(state, model, optimizer)
        console.print(
            f"  resuming {stage}: {progress.epoch - 1} epochs and {progress.step} steps are done"
        )
    accelerator.wait_for_everyone()  # all have read
    if accelerator.is_main_process:
        checkpoints.tidy(folder, stage, run.keep_states)
    accelerator.wait_for_everyone()
    return progress


@dataclass
class Epochs:
    """The epochs of one stage: journal, the best one's weights, states, when to stop."""

    stage: Stage
    run: RunOptions
    optim: OptimConfig
    identity: Mapping[str, Any]
    """What decides the run's numbers; has the data's fingerprint."""
    model: nn.Module
    """The bare model, not its distributed wrapper."""
    optimizer: torch.optim.Optimizer
    progress: Progress
    accelerator: Accelerator
    refit_epochs: int | None = None
    """Train so many epochs and keep the last weights; None: select on validation."""
    lowest: bool = False
    """Whether the best validation score is the lowest one."""

    def entropy(self, *parts: int) -> np.random.SeedSequence:
        """Of one purpose in one epoch of one stage, by what else it depends on."""
        stage = 1 + (self.stage == "refit")
        # A sequence ignores zeros at its end, hence the last 1: else step 0 would be no step.
        return np.random.SeedSequence((self.run.seed, stage, self.progress.epoch, *parts, 1))

    def reseed(self, step: int) -> None:
        """Give dropout a start of its own in a step of this epoch, in this process."""
        noise = self.entropy(step, self.accelerator.process_index)
        torch.manual_seed(int(noise.generate_state(1, np.uint64)[0]))

    def open_log(self, console: Console) -> EpochLog:
        """The journal of this stage, gone on with where a killed run left it."""
        return EpochLog(
            Path(self.run.folder),
            self.stage,
            self.run.select,
            console,
            self.run.tensorboard,
            self.identity["data fingerprint"],
            self.progress.epoch - 1,
        )

    def end(self, log: EpochLog, loss: float, score: float, flops: int) -> None:
        """Close an epoch: log it, keep its weights if it is the best, say whether it is the last.

        Args:
            log: the journal.
            loss: the epoch's mean loss.
            score: its validation score; NaN in a refit.
            flops: operations of this process so far.
        """
        progress = self.progress
        lr = float(self.optimizer.param_groups[0]["lr"])
        log.add(progress.epoch, progress.epoch_seconds, loss, lr, score)
        if self.refit_epochs or progress.best is None or self._better(score, progress.best):
            progress.best = None if self.refit_epochs else score
            progress.best_epoch = progress.epoch
            folder = Path(self.run.folder)
            checkpoints.save_weights(folder, self.stage, progress.epoch, self.model)
        impatient = progress.epoch - progress.best_epoch >= self.optim.patience
        last = progress.epoch == (self.refit_epochs or self.optim.epochs)
        progress.finished = last or impatient
        progress.seconds += progress.epoch_seconds
        progress.epoch, progress.step, progress.epoch_seconds = progress.epoch + 1, 0, 0.0
        self.save_state(0.0, flops)

    def _better(self, score: float, best: float) -> bool:
        return score < best if self.lowest else score > best

    def close(self, log: EpochLog) -> None:
        """End the journal and put the selected epoch's weights into the model."""
        log.close()
        self.accelerator.wait_for_everyone()
        folder = Path(self.run.folder)
        checkpoints.load_weights(folder, self.stage, self.progress.best_epoch, self.model)

    def save_state(self, loss: float, flops: int) -> None:
        """Write what a killed run resumes from.

        Args:
            loss: this process's sum over the epoch so far.
            flops: operations of this process so far.
        """
        progress = self.progress
        progress.losses = gather_object([loss])
        progress.flops = gather_object([flops])
        checkpoints.save_state(
            Path(self.run.folder), self.stage, self.model, self.optimizer, progress, self.identity,
            self.run.keep_states,
        )  # fmt: skip

    def due(self, steps: int) -> bool:
        """Whether a state is to be saved after the step just done, of `steps` in this epoch."""
        every, step = self.run.checkpoint_steps, self.progress.step
        return every != "epoch" and step % every == 0 and step < steps

    def check(self, loss: Tensor, steps: int) -> None:
        """Refuse to go on with a loss or weights that are no numbers; looks every 50 steps.

        A loss shows its own step's damage only in the next one, hence the weights too.
        """
        step = self.progress.step
        if not (self.due(steps) or step == steps or step % 50 == 0):
            return
        if not finite((loss, *(w for w in self.model.parameters() if w.requires_grad))):
            raise UsageError(
                f"the loss is not finite in epoch {self.progress.epoch}, by step {step}. Lower "
                f"optim.lr={self.optim.lr:g} or optim.clip={self.optim.clip}, and start over with "
                "--run.resume never."
            )

    def cost(self) -> dict[str, Any]:
        """What the stage took."""
        learned = (weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        return {
            "train_seconds": self.progress.seconds,
            "epochs": self.progress.epoch - 1,
            "selected_epoch": self.progress.best_epoch,
            "trainable_parameters": sum(learned),
            "flops": sum(self.progress.flops),
        }


class TrainedConfig(Protocol):
    """What the options of all training commands have."""

    @property
    def data(self) -> DataConfig:
        """Which data."""

    @property
    def split(self) -> SplitConfig:
        """How it was cut."""

    @property
    def run(self) -> RunOptions:
        """Label, seed, folder."""


def run_facts(
    config: TrainedConfig,
    accelerator: Accelerator,
    cost: Mapping[str, Any],
    filter_seen: bool | str,
    selected: bool = True,
) -> RunFacts:
    """What a result says of its run.

    Args:
        config: the run's.
        accelerator: how it was run.
        cost: what it took; the peak of memory is added.
        filter_seen: the seen filter; empty where nothing is ranked.
        selected: whether validation chose the weights.
    """
    run = config.run
    return RunFacts(
        name=Path(run.folder).name,
        label=run.label,
        seed=run.seed,
        config=as_dict(config),
        data_source=config.data.source,
        split=config.split.method,
        filter_seen=str(filter_seen).lower(),
        fit_on=run.fit_on,
        selection=run.select if selected else "none",
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        precision=number_format(accelerator),
        cost={**cost, "peak_memory_bytes": _peak_memory(accelerator)},
    )


def finite(values: Iterable[Tensor]) -> bool:
    """Whether all are numbers."""
    return all(bool(torch.isfinite(value).all()) for value in values)


def _peak_memory(accelerator: Accelerator) -> int:
    """Most memory that this process held, bytes: of its GPU, or of the process itself."""
    if accelerator.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(accelerator.device))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
