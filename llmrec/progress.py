"""What a run tells while it lasts: a bar on a terminal, a line per epoch in console and journal."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmrec.errors import UsageError
from llmrec.runs import JOURNAL, Journal

SECONDS_BETWEEN_LINES = 30.0


def progress_bar(console: Console) -> Progress:
    """A bar of done, total and remaining time on a terminal; nothing in a log."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class Tell(Protocol):
    """Tells of requests that were answered since the last call; called with zeros too."""

    def __call__(self, answers: int, retries: int, tokens: int) -> None:
        """So many more answers, repeated sendings and tokens."""


@contextlib.contextmanager
def rate_bar(console: Console, total: int, done: int) -> Iterator[Tell]:
    """Done, total, answers per second, remaining time, retries and tokens of a chat run.

    A bar on a terminal; in a log a plain line every 30 s.

    Args:
        console: Where it is shown.
        total: Requests of the run.
        done: Those that an earlier run has answered.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("  asking", total=total, completed=done, told="")
    began = said = time.monotonic()
    answered = retried = used = 0

    def tell(answers: int, retries: int, tokens: int) -> None:
        nonlocal answered, retried, used, said
        answered, retried, used = answered + answers, retried + retries, used + tokens
        now = time.monotonic()
        rate = answered / max(now - began, 1e-9)
        told = f"{rate:.1f}/s, {retried} retries, {used:,} tokens"
        bar.update(task, advance=answers, told=told)
        if not console.is_terminal and now - said >= SECONDS_BETWEEN_LINES:
            said = now
            left = f", {(total - done - answered) / rate:.0f} s left" if answered else ""
            console.print(f"  asked {done + answered} of {total}, {told}{left}")

    with bar:
        yield tell


class EpochLog:
    """An epoch's figures, in the journal, on the console and, where asked for, in TensorBoard.

    A quiet console marks a process that is not the main one: nothing is written there.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        select: str,
        console: Console,
        tensorboard: bool,
        data: str,
        kept: int = 0,
    ) -> None:
        """Start the journal of a stage, or go on after its first `kept` epochs.

        Args:
            folder: the run folder.
            stage: fit or refit.
            select: the validation measure.
            console: where a line per epoch goes.
            tensorboard: whether curves are written too.
            data: fingerprint of the data, for every line of the journal.
            kept: epochs that a resumed run has behind it.
        """
        self.stage, self.select, self.console, self.data = stage, select, console, data
        self.curves = None
        if console.quiet:
            return
        self.journal = Journal(folder / f"{stage}-{JOURNAL}", kept)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # of the extra `report`

            self.curves = SummaryWriter(str(folder), purge_step=kept + 1)

    def add(self, epoch: int, seconds: float, loss: float, lr: float, score: float) -> None:
        """One epoch; `score` is NaN where there was no validation."""
        if self.console.quiet:
            return
        numbers = {"loss": loss, "lr": lr}
        if not math.isnan(score):
            numbers[self.select] = score
        self.journal.add(epoch=epoch, seconds=seconds, **numbers, data=self.data)
        shown = "" if math.isnan(score) else f", valid {self.select} {score:.4f}"
        self.console.print(f"  {self.stage} epoch {epoch}: loss {loss:.4f}{shown}, {seconds:.1f} s")
        if self.curves:
            with self._writing():
                for name, value in numbers.items():
                    self.curves.add_scalar(f"{self.stage}/{name}", value, epoch)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self.curves:
            with self._writing():
                self.curves.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """TensorBoard's thread fails on a full disk; it says so at one of the next calls."""
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"TensorBoard's curves in {self.journal.path.parent} cannot be written "
                f"({error.strerror or error}). Free some space or leave out --run.tensorboard."
            ) from error
