"""Small runs of every kind of tower, and what `llmrec export` makes of them."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import small_runs
import torch
from numpy.typing import NDArray

from llmrec.assembly import restore
from llmrec.serving.export import main

CPU = torch.device("cpu")
STEPS = {"optim__epochs": 2, "optim__batch_size": 61, "optim__lr": 0.01, "loss__name": "in_batch"}
# Rates large enough that a merge left out would show in the second digit.
TEXT = {"tower__name": "text", "tower__whiten": False, "encoder__layers": 2}
TUNED = TEXT | {"encoder__lr": 0.01, "encoder__model": "bert"}
LORA = TUNED | {"encoder__tune": "lora"}

KINDS: dict[str, dict[str, Any]] = {
    "ids": {},
    "ids, trained again on both parts": {"run__fit_on": "train+valid"},
    "popularity": {"model__name": "popularity"},
    "frozen": TEXT | {"encoder__model": "bert", "tower__whiten": True},
    "frozen, in 4 bits": TEXT | {"encoder__model": "bert", "encoder__quantisation": "nf4"},
    "frozen beside ids": TEXT | {
        "encoder__model": "qwen3", "tower__name": "id_text", "encoder__prompt": "red shoe for ",
        "encoder__pooling": "last",
    },
    "shuffled": TEXT | {"encoder__model": "bert", "tower__control": "shuffled"},
    "before the norm": TEXT | {"encoder__model": "qwen3", "encoder__final_norm": False},
    "lora": LORA,
    "lora, whitened": LORA | {"tower__whiten": True},
    "rslora": LORA | {
        "encoder__model": "opt", "encoder__lora__rslora": True, "encoder__pooling": "weighted_mean",
    },
    "dora": LORA | {
        "encoder__model": "qwen3", "encoder__lora__dora": True, "encoder__pooling": "last",
    },
    "lora, spread": LORA | {"encoder__placement": "spread"},
    "lora of the highest block": LORA | {"encoder__lora__layers": 1},
    "qlora": TUNED | {"encoder__tune": "qlora"},
    "qlora with dora": TUNED | {"encoder__tune": "qlora", "encoder__lora__dora": True},
    "qlora over 8 bits": TUNED | {"encoder__tune": "qlora", "encoder__quantisation": "int8"},
    "lora in bfloat16": LORA | {"encoder__dtype": "bfloat16"},
    "top:1": TUNED | {"encoder__tune": "top:1"},
    "full": TUNED | {"encoder__tune": "full", "encoder__model": "t5", "encoder__pooling": "cls"},
}  # fmt: skip
"""Name -> options; a model is the name of one in tiny_models.py."""


def train(folder: Path, **changes: Any) -> Path:
    """A finished run of two steps, its store beside it."""
    return small_runs.train(
        folder, **{**STEPS, "run__store": str(folder.parent / "store")}, **changes
    )


def export(run: Path, out: Path, *words: str) -> Path:
    """The folder that an export wrote."""
    assert main([str(run), "--out", str(out), "--device", "cpu", *words]) == 0
    return out


def refusal(*words: object) -> str:
    """The one sentence an export is refused with."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert main([str(word) for word in words]) == 2
    *_, said = stderr.getvalue().splitlines()  # libraries may have spoken before
    assert said.startswith("llmrec: ")
    return said


def run_vectors(run: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Texts of the catalogue, empty ones left out, and what the text tower of a run makes of them.

    By the run's own tower: adapters apart, weights quantised where the run's were.
    """
    restored = restore(run, CPU)
    tower: Any = restored.recommender.tower
    texts = restored.dataset.catalog.texts
    filled = np.flatnonzero([bool(text) for text in texts])
    with torch.inference_mode():
        vectors = getattr(tower, "text", tower).vectors(torch.from_numpy(filled + 1))
    return [texts[row] for row in filled], vectors.numpy()
