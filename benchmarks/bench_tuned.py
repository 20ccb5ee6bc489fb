"""A step that tunes MiniLM against the plain loop; the modes against full; memory under a cap.

    LLMREC_DATA=data python benchmarks/bench_tuned.py

Real batches of amazon-games-2018 (3,000 users, titles of at most 30 tokens; simulated data where it
is missing): each turn takes another one, from short histories to long. A step is gradients,
clipping and AdamW; loss, projection and SASRec are the same everywhere. The plain loop reads every
slot of the batch, each padded to 30 tokens, in one pass, as public code does; before anything is
timed its loss and gradients are held to ours. It gets our batches of similar histories: with
histories padded to 50 items it would be slower still. Memory is what a step adds to the process at
its peak, each in a fresh one; AdamW's moments are there before, the gradients (87 MiB) are not. It
is measured where freed memory goes back at once, and its growth also with the C library's usual
settings, under which some of what is freed stays with the process.
"""

from measure import Row, Times, extra_memory, in_fresh_process, report  # isort: skip  # limits threads

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from llmrec.models.config import UserModelConfig
from llmrec.models.losses import LossConfig
from llmrec.models.optim import OptimConfig
from llmrec.train_tcf import Task, start_stage, train_step

SOURCE = "amazon-games-2018"
USERS, MAX_TOKENS, LENGTH = 64, 30, 50
QUANTILES = (0.25, 0.5, 0.75)
"""The batches that are timed, by their slots among all batches of an epoch."""
MEMORY_USERS = (16, 64, 256)
CAP, UNCAPPED = 512, 10**9
"""encoder.step_tokens, in tokens; 512 is one piece, which 16 users exceed already."""
FLAT_MIB = 16
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
        self.learner = start_stage(self.task, encoded, data.parts.train_end, None)
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
        examples = self.rows.examples(batch, np.random.default_rng(0))
        inputs, targets = map(torch.from_numpy, (examples.inputs, examples.targets))
        loss = self(inputs, targets)
        (loss / (targets > 0).sum()).backward()
        return float(loss.detach())

    def step(self, batch: NDArray[np.int64]) -> None:
        self.gradients(batch)
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def check_same(ours: Ours, plain: Plain, batch: NDArray[np.int64]) -> float:
    """Hold both to the same loss and gradients, dropout off, on some rows.

    Returns:
        The largest difference of the language model's gradients, by its weight's largest.
    """
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
    return furthest


def taking_turns(
    steps: dict[str, Callable[[NDArray[np.int64]], None]], batches: list[NDArray[np.int64]]
) -> Times:
    """Times of steps: in a turn all of them take the same batch."""

    def each_in_turn(step: Callable[[NDArray[np.int64]], None]) -> Callable[[], None]:
        upcoming = iter(batches)
        return lambda: step(next(upcoming))

    for step in steps.values():
        step(batches[0][:16])  # what only a first step does, such as making AdamW's moments
    return Times({name: each_in_turn(step) for name, step in steps.items()}, len(batches), warm=0)


def size(data: Data, ours: Ours, batch: NDArray[np.int64]) -> dict[str, int]:
    """What a step has to read."""
    slots = data.rows.examples(batch, np.random.default_rng(0)).sequences
    items = np.unique(slots[slots > 0])
    tokens = int(ours.language.lengths[items - 1].sum())
    print(f"{slots.size} slots, {len(items)} distinct items, {tokens} tokens in their texts")
    return {"slots": slots.size, "items": len(items), "tokens": tokens}


def memory(users: int, step_tokens: int) -> float:
    """Peak MiB that a full step adds, on the middle batch of so many users."""
    data = Data.load()
    with tempfile.TemporaryDirectory() as store:
        ours = Ours(data, store)
    batch = data.batches(users, (0.5,))[0]
    ours.step(batch[:2])  # AdamW's moments, and what else only a first step allocates
    return extra_memory(lambda: lambda: ours.step(batch, step_tokens))


def memory_rows() -> list[Row]:
    """Steps of more and more users under the cap; the largest also without it."""
    first, last = MEMORY_USERS[0], MEMORY_USERS[-1]
    kept = [in_fresh_process(__file__, users, CAP) for users in (first, last)]
    # From here on what is freed goes back at once, so that resident memory is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(1 << 18)
    capped = {users: in_fresh_process(__file__, users, CAP) for users in MEMORY_USERS}
    free = in_fresh_process(__file__, last, UNCAPPED)
    what = f"memory of a step, encoder.step_tokens {CAP}"
    rows = [
        Row(f"{what}, {users} users", "", capped[users], None, "MiB", None, "")
        for users in MEMORY_USERS[:-1]
    ]
    share = capped[last] / free
    rows.append(Row(f"{what}, {last} users", "no cap", capped[last], free, "MiB", share, ""))
    growth, target = capped[last] - capped[first], f"<= {FLAT_MIB} MiB"
    what = f"its growth from {first} to {last} users"
    rows.append(Row(what, "", growth, None, "MiB", None, target))
    what = f"{what}, with what the C library keeps of freed memory"
    return [*rows, Row(what, "", kept[1] - kept[0], None, "MiB", None, "")]


def main() -> None:
    torch.manual_seed(0)
    data = Data.load()
    with tempfile.TemporaryDirectory() as store:
        began = time.process_time()
        top = Ours(data, store, tune="top:1")
        cached = time.process_time()
        whole = Ours(data, store, tune="top:1", cache_states=False)
        caching = 2 * cached - began - time.process_time()  # less what loading takes anyway
        full = Ours(data, store)
        lora = Ours(data, store, tune="lora", lora=LoraOptions(rank=8))
        again = Ours(data, store, tune="lora", lora=LoraOptions(rank=8), checkpointing=True)
    plain = Plain(full)
    batches = data.batches(USERS, QUANTILES)
    sizes = [size(data, full, batch) for batch in batches]
    difference = check_same(full, plain, batches[0][:8])
    times = taking_turns(
        {
            "plain loop, every slot padded to 30 tokens": plain.step,
            "full": full.step,
            "full, all read twice": lambda batch: full.step(batch, step_tokens=1),
            "top:1 cached": top.step,
            "top:1": whole.step,
            "lora": lora.step,
            "lora, checkpointing": again.step,
        },
        batches,
    )
    plainly = "plain loop, every slot padded to 30 tokens"
    once = times.median("full")
    rows = [
        times.row("step that tunes all of MiniLM", "full", plainly, "<= 0.4"),
        times.row("step of top:1 from cached states", "top:1 cached", "full", "<= 0.2"),
        times.row("step of top:1, lower blocks run too", "top:1", "full", ""),
        times.row("step of lora, rank 8", "lora", "full", ""),
        times.row("the same with encoder.checkpointing", "lora, checkpointing", "lora", ""),
        times.row("step under a cap, every text read twice", "full, all read twice", "full", ""),
        Row(
            f"caching states of {data.dataset.item_count:,} items, once", "full", caching, once,
            "CPU-s", caching / once, "",
        ),
        *memory_rows(),
    ]  # fmt: skip
    report(
        "tuned",
        rows,
        data=data.dataset.name,
        users=USERS,
        batches=sizes,
        gradient_difference=difference,
        turns=len(batches),
        seconds=times.seconds,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(memory(*map(int, sys.argv[1:])))
    else:
        main()
