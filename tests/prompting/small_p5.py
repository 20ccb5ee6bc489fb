"""P5 runs of a few seconds: 61 simulated users, a model of a few thousand weights."""

import contextlib
import io
from pathlib import Path
from typing import Any

from small_runs import words

from llmrec.prompting.train_p5 import main

PROGRAM = "llmrec.prompting.train_p5"
SMALL = {
    "data.simulated.users": 61,
    "data.simulated.items": 240,
    "prompts.families": "sequential",
    "prompts.per_user.next": 2,
    "prompts.per_user.choose": 0,
    "prompts.per_user.judge": 1,
    "prompts.history_items": 5,
    "model.scratch.width": 16,
    "model.scratch.layers": 1,
    "model.scratch.heads": 2,
    "model.scratch.vocabulary": 200,
    "optim.epochs": 2,
    "optim.batch_size": 32,
    "decoding.others": "none",
    "decoding.valid_cases": 20,
}


def command(folder: Path, **changes: Any) -> list[str]:
    """The command line of a small run; ``indexing__name="title"`` sets ``--indexing.name``."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return words(SMALL | {"run.folder": str(folder)} | named)


def train(folder: Path, **changes: Any) -> Path:
    """A finished run."""
    assert main(command(folder, **changes)) == 0
    return folder


def refusal(folder: Path, **changes: Any) -> str:
    """The one sentence a run is refused with."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert main(command(folder, **changes)) == 2
    return stderr.getvalue()
