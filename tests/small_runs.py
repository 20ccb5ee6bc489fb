"""Training runs of a fraction of a second: 61 simulated users (an odd number), 187 items met."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.train_tcf import main

SMALL = {
    "data.simulated.users": 61,
    "data.simulated.items": 240,
    "tower.name": "id",
    "model.width": 16,
    "model.heads": 1,
    "model.blocks": 1,
    "model.max_length": 20,
    "optim.epochs": 2,
    "optim.batch_size": 16,
}


def words(options: dict[str, Any]) -> list[str]:
    """Options as a command line."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in options.items()
    ]


def train(folder: Path, **changes: Any) -> Path:
    """A finished run; ``tower__name="text"`` sets ``--tower.name``."""
    assert main(command(folder, **changes)) == 0
    return folder


def command(folder: Path, **changes: Any) -> list[str]:
    """The command line of a small run."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return words(SMALL | {"run.folder": str(folder)} | named)


def refusal(folder: Path, **changes: Any) -> str:
    """The one sentence a run is refused with."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert main(command(folder, **changes)) == 2
    return stderr.getvalue()


def record(folder: Path) -> dict[str, Any]:
    """result.json."""
    return dict(json.loads((folder / "result.json").read_text()))


def journal(folder: Path, stage: str = "fit") -> list[dict[str, float]]:
    """One entry per epoch."""
    lines = (folder / f"{stage}-journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def per_user(folder: Path) -> pl.DataFrame:
    """per_user.parquet."""
    return pl.read_parquet(folder / "per_user.parquet")


def mean(folder: Path, measure: str, part: str = "test") -> float:
    """One figure of result.json."""
    return float(record(folder)["metrics"][part][measure]["mean"])
