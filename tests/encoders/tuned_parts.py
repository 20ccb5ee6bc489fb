"""Small recommenders around a language model that learns, and the same step computed plainly."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llmrec.data.batches import Examples
from llmrec.encoders.text import TextEncoder
from llmrec.encoders.tower import TowerConfig, build_tower
from llmrec.encoders.tuned import TunedEncoder
from llmrec.encoders.tuning import TunableEncoder
from llmrec.models.config import UserModelConfig
from llmrec.models.losses import LossConfig
from llmrec.models.recommender import Batch, Recommender
from llmrec.models.sasrec import SASRec

CPU = torch.device("cpu")
WORDS = "red green blue shoe boot hat coat scarf for men women kids summer winter rain snow".split()
DRAWS = np.random.default_rng(0)
TEXTS = [" ".join(DRAWS.choice(WORDS, size)) for size in DRAWS.integers(1, 9, 60)]
TEXTS[6] = ""
"""1 to 8 words, 3 to 10 tokens; item 7 has no text."""
LONGEST = 14
"""Tokens that the plain computation pads every text to."""
WIDTH = 16


def recommender(
    model: Path, store: Path, loss="in_batch", tower="text", dropout=0.0, **options
) -> Recommender:
    """A recommender of `TEXTS`; options are those of the encoder."""
    config = TunableEncoder(model=str(model), **options)
    torch.manual_seed(0)
    tuned = TunedEncoder(config, TEXTS, "0" * 64, store, CPU)
    plain = plain_vectors(config)
    towered = TowerConfig(name=tower, projection_dropout=dropout)
    built = build_tower(towered, len(TEXTS), WIDTH, plain, tuned)
    users = SASRec(UserModelConfig(width=WIDTH, dropout=dropout, max_length=8))
    negatives = {} if loss in ("in_batch", "full_softmax") else {"negatives": 5}
    popularity = torch.from_numpy(np.random.default_rng(3).integers(1, 9, len(TEXTS) + 1))
    return Recommender(built, users, LossConfig(name=loss, **negatives), popularity)


def plain_vectors(config: TunableEncoder):
    """What the frozen model makes of `TEXTS`, (N, H)."""
    return TextEncoder(config.frozen_encoder, CPU).encode(TEXTS)[0]


def scatter_adapters(model: Recommender) -> None:
    """Give LoRA's second factors values: while they are 0, the first ones have no gradient."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)


def batch(loss: str) -> Batch:
    """3 users, the first with padding; items come back within and between users."""
    draws = np.random.default_rng(1)
    items = draws.integers(1, 25, (3, 7))
    items[0, :3] = 0
    items[1, 2] = 7  # without text
    shape = {"in_batch": (3, 6, 0), "full_softmax": (3, 6, 0), "bce": (3, 6, 5)}.get(loss, (5,))
    examples = Examples.following(np.arange(3), items)
    return Batch.of(examples, draws.integers(1, len(TEXTS) + 1, shape))


def gradients(model: Recommender, loss) -> dict[str, torch.Tensor]:
    """Of everything that learns."""
    model.zero_grad()
    loss.backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.requires_grad}


def furthest(ours, plain) -> float:
    """The largest difference of two sets of gradients, each by its weight's largest gradient.

    Gradients that are nothing but rounding (a key's bias moves no attention) count by the model's
    largest.
    """
    assert ours.keys() == plain.keys()
    largest = max(float(grad.abs().max()) for grad in plain.values())
    return max(
        float((ours[name] - plain[name]).abs().max())
        / max(float(plain[name].abs().max()), 1e-4 * largest)
        for name in plain
    )


def plain_item(model: Recommender, item: int) -> torch.Tensor:
    """An item's vector (1, D): its text alone, padded to a fixed length."""
    tower = model.tower
    if not item:
        return torch.zeros(1, WIDTH)
    if not TEXTS[item - 1]:
        return tower.projection(torch.zeros(1, tower.directions.shape[1]))
    reader = tower.encoder.encoder
    tokens = reader.tokenizer(TEXTS[item - 1])["input_ids"]
    ids = torch.tensor([tokens + [0] * (LONGEST - len(tokens))])
    real = (torch.arange(LONGEST) < len(tokens))[None].long()
    states = reader.model(input_ids=ids, attention_mask=real).last_hidden_state  # (1, T, H)
    pooled = (states * real[:, :, None]).sum(1) / real.sum()
    return tower.projection((pooled - tower.mean) @ tower.directions)


def plain_loss(model: Recommender, data: Batch) -> torch.Tensor:
    """The summed loss, written out one position at a time over slots that are each read alone."""
    total = torch.zeros(())
    slots = torch.cat([data.inputs, data.targets[:, -1:]], dim=1)  # (B, L + 1)
    vectors = torch.stack(
        [torch.cat([plain_item(model, int(item)) for item in row]) for row in slots]
    )  # (B, L + 1, D)
    states = model.user_model(vectors[:, :-1], data.inputs > 0)  # (B, L, D)
    name, popularity = model.loss.name, model.log_popularity
    columns = [(r, c) for r, c in np.ndindex(*slots.shape) if slots[r, c]]
    shared = [int(item) for item in data.negatives.ravel()] if name == "sampled_softmax" else []
    rivals = shared or (range(1, len(TEXTS) + 1) if name == "full_softmax" else [])
    drawn = torch.cat([plain_item(model, item) for item in rivals]) if rivals else None
    for row, place in np.ndindex(*data.inputs.shape):
        target = int(data.targets[row, place])
        if not target:
            continue
        state = states[row, place]
        score = vectors[row, place + 1] @ state
        if name == "in_batch":
            own = {int(item) for item in slots[row]}
            logits = [score - popularity[target]] + [
                vectors[r, c] @ state - popularity[slots[r, c]]
                for r, c in columns
                if int(slots[r, c]) not in own
            ]
        elif name == "bce":
            others = [
                plain_item(model, int(item))[0] @ state for item in data.negatives[row, place]
            ]
            prior = -math.log(len(others))  # the odds of one target among so many
            total = total + F.softplus(-prior - score)
            total = total + F.softplus(prior + torch.stack(others)).sum()
            continue
        else:
            correction = np.log(len(shared) / len(TEXTS)) if shared else 0.0
            logits = [score] + [
                vector @ state - correction
                for item, vector in zip(rivals, drawn, strict=True)
                if item != target
            ]
        total = total - F.log_softmax(torch.stack(logits), dim=0)[0]
    return total
