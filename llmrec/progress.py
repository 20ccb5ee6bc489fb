"""What a run tells while it lasts: a bar on a terminal, a line per epoch in console and journal."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmrec.runs import JOURNAL, Journal


def progress_bar(console: Console) -> Progress:
    """A bar of done, total and remaining time on a terminal; nothing in a log."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class EpochLog:
    """An epoch's figures, in the journal, on the console and, where asked for, in TensorBoard.

    A quiet console marks a process that is not the main one: nothing is written there.
    """

    def __init__(
        self, folder: Path, stage: str, select: str, console: Console, tensorboard: bool
    ) -> None:
        """Start the journal of a stage, fit or refit; `select` is the validation measure."""
        self.stage, self.select, self.console, self.curves = stage, select, console, None
        if console.quiet:
            return
        self.journal = Journal(folder / f"{stage}-{JOURNAL}")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # of the extra `report`

            self.curves = SummaryWriter(str(folder))

    def add(self, epoch: int, seconds: float, loss: float, lr: float, score: float) -> None:
        """One epoch; `score` is NaN where there was no validation."""
        if self.console.quiet:
            return
        numbers = {"loss": loss, "lr": lr}
        if not math.isnan(score):
            numbers[self.select] = score
        self.journal.add(epoch=epoch, seconds=seconds, **numbers)
        shown = "" if math.isnan(score) else f", valid {self.select} {score:.4f}"
        self.console.print(f"  {self.stage} epoch {epoch}: loss {loss:.4f}{shown}, {seconds:.1f} s")
        if self.curves:
            for name, value in numbers.items():
                self.curves.add_scalar(f"{self.stage}/{name}", value, epoch)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self.curves:
            self.curves.close()
