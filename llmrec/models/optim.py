"""How weights are moved: AdamW's options, its parameter groups, the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from llmrec.encoders.tuning import TunableEncoder
from llmrec.errors import UsageError


@dataclass(frozen=True)
class OptimConfig:
    """How weights are moved."""

    epochs: int = 15
    """Most passes over the training rows; also the length of the cosine schedule."""
    batch_size: int = 128
    """Users (of a P5 model: prompts) per step, over all processes and accumulated pieces
    together."""
    accumulate: int = 1
    """Pieces a process cuts its share of a step into, one after the other, to save memory. With
    loss.name=in_batch each piece has only its own items as negatives."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; that of a tuned language model is encoder.lr."""
    state: Literal["float32", "8bit"] = "float32"
    """Number format of AdamW's moments; 8bit (bitsandbytes) needs a quarter of their memory."""
    weight_decay: float = 0.0
    """Decoupled decay of weight matrices; never of norms, biases, positions and item tables."""
    warmup_share: float = 0.05
    """Share of all steps in which the rate rises linearly; then it falls."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The rate after warm-up: down to a tenth along a cosine, or unchanged."""
    clip: float | Literal["off"] = 1.0
    """Largest norm of the gradient; longer ones are shortened to it."""
    patience: int = 4
    """Epochs without a better validation score before training stops."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("epochs", "batch_size", "accumulate", "patience"):
            if getattr(self, name) < 1:
                raise UsageError(f"optim.{name}={getattr(self, name)} must be at least 1.")
        if not self.lr > 0:
            raise UsageError(f"optim.lr={self.lr} must be above 0.")
        if self.clip != "off" and not self.clip > 0:
            raise UsageError(f"optim.clip={self.clip} must be above 0, or off.")
        if not self.weight_decay >= 0:
            raise UsageError(f"optim.weight_decay={self.weight_decay} must not be below 0.")
        if not 0 <= self.warmup_share < 1:
            raise UsageError(f"optim.warmup_share={self.warmup_share} must lie in [0, 1).")


def build_optimizer(
    model: nn.Module,
    optim: OptimConfig,
    language: nn.Module | None = None,
    encoder: TunableEncoder | None = None,
    tables: Collection[nn.Module] = (),
) -> torch.optim.Optimizer:
    """AdamW over what learns: the recommender, and the language model at a rate of its own.

    Weight decay is for matrices of linear layers, none for norms, biases and tables.

    Args:
        model: the recommender.
        optim: rates and decay of everything but the language model.
        language: the part of `model` that learns at a rate of its own, a tuned language model.
        encoder: the rate and decay of that part.
        tables: linear layers that are tables, such as a language model's output layer.
    """
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    linear -= {id(weight) for table in tables for weight in table.parameters()}
    read = set() if language is None else {id(weight) for weight in language.parameters()}
    groups: list[dict[str, Any]] = []
    parts = [(False, optim.lr, optim.weight_decay)]
    if encoder is not None:
        parts.append((True, encoder.lr, encoder.weight_decay))
    for inside, lr, decay in parts:
        own = [w for w in model.parameters() if w.requires_grad and (id(w) in read) == inside]
        for matrices in (True, False):
            weights = [weight for weight in own if (id(weight) in linear) == matrices]
            if weights:
                group = {"params": weights, "weight_decay": decay if matrices else 0.0}
                groups.append(group | {"lr": lr, "peak_lr": lr})
    if optim.state == "8bit":
        from bitsandbytes.optim import AdamW8bit  # seconds to import

        optimizer: torch.optim.Optimizer = AdamW8bit(groups)
        return optimizer
    return torch.optim.AdamW(groups, fused=True)


def rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine to a tenth, or constant."""
    warmup = max(1, round(optim.warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "constant":
        return 1.0
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, optim: OptimConfig) -> None:
    """Give every group its learning rate at a step, counted from 0 over the whole stage."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * rate(step, steps, optim)
