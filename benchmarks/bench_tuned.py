"""A step that tunes MiniLM against the plain loop; the modes against full; memory under a cap.

    LLMREC_DATA=data python benchmarks/bench_tuned.py

Real batches of amazon-games-2018 (3,000 users, titles of at most 30 tokens; simulated data where it
is missing): each turn takes another one, from short histories to long. A step is gradients,
clipping and AdamW, the same in-batch loss and SASRec everywhere. The plain loop reads every slot of
the batch, each padded to 30 tokens, in one pass, as public code does; before anything is timed its
loss and gradients are held to ours. It gets our batches of similar histories: with histories padded
to 50 items it would be slower still. Memory is the growth of resident memory within a step, each in
a fresh process; AdamW's moments are there before, the gradients are not.
"""

from measure import Row, Times, extra_memory, in_fresh_process, report  # isort: skip  # limits threads

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from llmrec.assembly import RunConfig, TrainConfig
from llmrec.data.batches import TrainingRows
from llmrec.data.interactions import Dataset, Split
from llmrec.data.readers import DataConfig, data_root, load_dataset
from llmrec.data.splits import SplitConfig, split
from llmrec.encoders.store import Encoded
from llmrec.encoders.text import MINILM, EncoderConfig, locate
from llmrec.encoders.tower import TowerConfig, TunedTextTower
from llmrec.encoders.tuning import LoraOptions, TunableEncoder
from llmrec.models.losses import LossConfig
from llmrec.models.optim import OptimConfig
from llmrec.models.sasrec import UserModelConfig
from llmrec.train_tcf import Task, start_stage, train_step

SOURCE = "amazon-games-2018"
USERS, MAX_TOKENS, LENGTH = 64, 30, 50
QUANTILES = (0.2, 0.4, 0.6, 0.8)
"""The batches that are timed, by their slots among all batches of an epoch."""
MEMORY_USERS = (16, 64, 256)
CAP, UNCAPPED = 512, 10**9
"""encoder.step_tokens; 512 is one piece, which 16 users exceed already."""
FLAT_MIB = 64
"""Growth from the smallest batch to the largest that counts as flat."""
BASE = TrainConfig(
    encoder=TunableEncoder(model=MINILM, pooling="mean", max_item_tokens=MAX_TOKENS, tune="full"),
    tower=TowerConfig(projection_width=192, projection_dropout=0.0),
    model=UserModelConfig(width=64, blocks=1, heads=1, dropout=0.1, max_length=LENGTH),
    loss=LossConfig(name="in_batch"),
    optim=OptimConfig(batch_size=USERS),
)


@dataclass(frozen=True)
class Data:
    """What all steps read, and the batches of one epoch."""

    dataset: Dataset
    parts: Split
    rows: TrainingRows

    @classmethod
    def load(cls) -> "Data":
        config = DataConfig()
        if (data_root() / SOURCE).is_dir():
            config = DataConfig(source=SOURCE, sample_users=3000, item_text="title")
        dataset = load_dataset(config)
        parts = split(dataset, SplitConfig(method="leave_one_out"))
        return cls(dataset, parts, TrainingRows.of(dataset.interactions, parts.train_end, LENGTH))

    def batches(self, users: int, quantiles: tuple[float, ...]) -> list[NDArray[np.int64]]:
        """Full batches of so many users, at quantiles of their slots within an epoch."""
        batches = self.rows.batches(users, np.random.default_rng(0))
        batches = [batch for batch in batches if len(batch) == users]
        batches.sort(key=lambda batch: self.rows.lengths[batch].max())
        return [batches[int(share * len(batches))] for share in quantiles]


class Ours:
    """llmrec's own step for one way of tuning, by the functions that a run calls."""

    def __init__(self, data: Data, store: str, **encoder: Any) -> None:
        config = replace(BASE, encoder=replace(BASE.encoder, **encoder))
        config = replace(config, run=RunConfig(folder=f"{store}/run", store=store))
        accelerator, console = Accelerator(cpu=True), Console(quiet=True)
        self.task = Task(config, data.dataset, data.parts, {}, accelerator, console)
        drawn = np.random.default_rng(0).normal(size=(data.dataset.item_count, 384))
        encoded = Encoded(drawn.astype(np.float32), {}, {})  # only the whitening is taken from it
        self.learner = start_stage(self.task, encoded, data.parts.train_end, "fit")
        self.model = self.learner.model.train()
        tower = self.model.tower
        assert isinstance(tower, TunedTextTower)
        self.tower, self.language = tower, tower.encoder

    def gradients(self, batch: NDArray[np.int64]) -> float:
        """Of one step; returns the summed loss."""
        return float(train_step(self.task, self.learner, batch, np.random.default_rng(0)))

    def step(self, batch: NDArray[np.int64], step_tokens: int = UNCAPPED) -> None:
        self.language.step_tokens = step_tokens
        self.gradients(batch)
        self.task.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.learner.optimizer.step()
        self.learner.optimizer.zero_grad()


class Plain(nn.Module):
    """The same step in plain PyTorch: slots in, every one of them read."""

    def __init__(self, ours: Ours) -> None:
        """A fresh MiniLM under a copy of our projection and user model."""
        super().__init__()
        folder = locate(EncoderConfig(model=MINILM)).source
        self.reader = AutoModel.from_pretrained(folder)
        texts = ["", *ours.task.dataset.catalog.texts]  # padding is an empty text
        tokens = AutoTokenizer.from_pretrained(folder)(
            texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        self.ids, self.real = tokens["input_ids"], tokens["attention_mask"]  # (N + 1, T)
        self.whitening = ours.tower.mean, ours.tower.directions
        self.projection = copy.deepcopy(ours.tower.projection)
        self.user_model = copy.deepcopy(ours.model.user_model)
        self.log_popularity = ours.model.log_popularity
        self.rows = ours.learner.rows
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=5e-5, fused=True)

    def vectors(self, slots: Tensor) -> Tensor:
        """(B, L + 1) -> (B, L + 1, D)."""
        ids, real = self.ids[slots.flatten()], self.real[slots.flatten()]
        states = self.reader(input_ids=ids, attention_mask=real).last_hidden_state  # (S, T, H)
        pooled = (states * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)
        mean, directions = self.whitening
        vectors = self.projection((pooled - mean) @ directions).view(*slots.shape, -1)
        return vectors * (slots > 0)[:, :, None]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """(B, L) each -> the summed in-batch loss, every slot of the batch a column (TCF)."""
        slots = torch.cat([inputs, targets[:, -1:]], dim=1)  # (B, L + 1)
        vectors = self.vectors(slots)
        states = self.user_model(vectors[:, :-1], inputs > 0)  # (B, L, D)
        columns = slots.flatten()  # (S,)
        logits = states @ vectors.flatten(0, 1).T - self.log_popularity[columns]  # (B, L, S)
        own = (slots[:, :, None] == columns).any(1)  # (B, S)
        blocked = (own | (columns == 0))[:, None].repeat(1, inputs.shape[1], 1)  # (B, L, S)
        label = torch.arange(len(columns)).view(slots.shape)[:, 1:]  # (B, L)
        blocked.scatter_(2, label[:, :, None], False)
        filled = targets > 0
        logits = logits.masked_fill(blocked, -torch.inf)[filled]  # (P, S)
        return F.cross_entropy(logits, label[filled], reduction="sum")

    def gradients(self, batch: NDArray[np.int64]) -> float:
        inputs, targets = map(torch.from_numpy, self.rows.pairs(batch))
        loss = self(inputs, targets)
        (loss / (targets > 0).sum()).backward()
        return float(loss)

    def step(self, batch: NDArray[np.int64]) -> None:
        self.gradients(batch)
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def check_same(ours: Ours, plain: Plain, batch: NDArray[np.int64]) -> None:
    """Both compute the same: their loss and gradients, dropout off, on some rows."""
    ours.model.eval()
    plain.eval()
    mine, other = ours.gradients(batch), plain.gradients(batch)
    weights = ours.language.model.state_dict(keep_vars=True)
    furthest = max(
        float((weights[name].grad - weight.grad).abs().max() / weight.grad.abs().max())
        for name, weight in plain.reader.named_parameters()
        if weight.grad is not None and not name.endswith("key.bias")  # its gradient is rounding
    )
    print(f"loss {mine:.4f} and {other:.4f}; furthest gradient {furthest:.1e} of its largest")
    if abs(mine - other) > 1e-4 * other or furthest > 1e-3:
        raise SystemExit("the plain step does not compute what ours does")
    ours.learner.optimizer.zero_grad()
    plain.optimizer.zero_grad()
    ours.model.train()
    plain.train()


def taking_turns(
    steps: dict[str, Callable[[NDArray[np.int64]], None]], batches: list[NDArray[np.int64]]
) -> Times:
    """Times of steps: in a turn all of them take the same batch."""

    def endless(step: Callable[[NDArray[np.int64]], None]) -> Callable[[], None]:
        upcoming = cycle(batches)
        return lambda: step(next(upcoming))

    for step in steps.values():
        step(batches[0][:8])  # allocates AdamW's moments
    return Times({name: endless(step) for name, step in steps.items()}, len(batches), warm=0)


def sizes(data: Data, ours: Ours, batches: list[NDArray[np.int64]]) -> list[dict[str, int]]:
    """What the steps had to read."""
    found = []
    for batch in batches:
        inputs, targets = data.rows.pairs(batch)
        slots = np.concatenate([inputs.ravel(), targets[:, -1]])
        items = np.unique(slots[slots > 0])
        tokens = int(ours.language.lengths[items - 1].sum())
        found.append({"slots": len(slots), "items": len(items), "tokens": tokens})
        print(f"{len(slots)} slots, {len(items)} distinct items of {tokens} tokens")
    return found


def memory(users: int, step_tokens: int) -> float:
    """Peak MiB of a full step on the middle batch of so many users."""
    data = Data.load()
    with tempfile.TemporaryDirectory() as store:
        ours = Ours(data, store)
    batch = data.batches(users, (0.5,))[0]
    ours.step(batch[:4])  # AdamW's moments, and what any first step allocates once
    return extra_memory(lambda: lambda: ours.step(batch, step_tokens))


def main() -> None:
    torch.manual_seed(0)
    data = Data.load()
    batches = data.batches(USERS, QUANTILES)
    with tempfile.TemporaryDirectory() as store:
        full = Ours(data, store)
        plain = Plain(full)
        began = time.process_time()
        top = Ours(data, store, tune="top:1")
        print("cache", time.process_time() - began)
        whole = Ours(data, store, tune="top:1", cache_states=False)
        lora = Ours(data, store, tune="lora", lora=LoraOptions(rank=8))
        again = Ours(data, store, tune="lora", lora=LoraOptions(rank=8), checkpointing=True)
    sizes(data, full, batches)
    check_same(full, plain, batches[0][:8])
    steps = {
        "full": full.step,
        "plain": plain.step,
        "top": top.step,
        "whole": whole.step,
        "lora": lora.step,
        "again": again.step,
        "reread": lambda batch: full.step(batch, 1),
    }
    times = taking_turns(steps, batches)
    for name in steps:
        print(name, times.seconds[name], times.ratio(name, "full"), times.ratio(name, "plain"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(memory(*map(int, sys.argv[1:])))
    else:
        main()
