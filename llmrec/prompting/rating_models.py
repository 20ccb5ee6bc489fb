"""Networks that predict a rating from those before it: what they share, and the one over ids.

Each starts from what the offsets of item and user predict and learns a correction; see `Head`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.errors import UsageError
from llmrec.evaluation.metrics import Float64
from llmrec.models.config import UserModelConfig
from llmrec.models.sasrec import SASRec
from llmrec.prompting.rating_data import (
    MOST_LEVELS,
    Offsets,
    Pairs,
    Rated,
    levels_of,
    nearest_level,
)

COUNTED = ("global_mean", "user_mean", "item_mean", "bias")
"""Models that learn nothing by gradients."""


@dataclass(frozen=True)
class RatingModelConfig:
    """What predicts ratings."""

    name: Literal[
        "global_mean", "user_mean", "item_mean", "bias", "transformer_mlp", "language_model"
    ] = "transformer_mlp"
    """global_mean, user_mean, item_mean: of the training part; bias: overall mean + the item's
    offset + the user's, both shrunk; transformer_mlp: a Transformer over item ids and stars and an
    MLP, from scratch; language_model: any Hugging Face model reading a prompt (encoder.*)."""
    head: Literal["regression", "classification"] = "regression"
    """regression: one number, mean squared error; classification: a probability for each rating
    that training knows, cross-entropy, of which the expectation is the prediction."""
    base: Literal["bias", "mean"] = "bias"
    """What a network corrects. bias: what model.name=bias predicts, and its parts are told to the
    head; mean: the overall mean alone."""
    item_shrinkage: float = 2.0
    """Imagined ratings at the overall mean that every item has beside its own."""
    user_shrinkage: float = 3.0
    """The same for users, from what the item's offset leaves."""
    history: int = 50
    """Most recent ratings that a network sees; a prompt leaves out the oldest of them where
    encoder.max_item_tokens is not enough."""
    template: str = "rating/stars"
    """The prompt of language_model: a shipped name or the path of a .jinja file that reads rated
    (pairs of title and stars), candidate and, if it likes, scale (lowest and highest stars)."""
    width: int = 64
    """Item vectors and states of transformer_mlp, and the inner layer of every head."""
    blocks: int = 1
    """Blocks of transformer_mlp."""
    heads: int = 2
    """Attention heads of transformer_mlp; must divide width."""
    dropout: float = 0.2
    """In transformer_mlp and every head."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.history < 1:
            raise UsageError(f"model.history={self.history} must be at least 1.")
        if min(self.item_shrinkage, self.user_shrinkage) < 0:
            raise UsageError("model.item_shrinkage and model.user_shrinkage must not be below 0.")
        self.transformer()

    def transformer(self) -> UserModelConfig:
        """The Transformer's part; one position more than the history, for the item asked about."""
        return UserModelConfig(
            width=self.width,
            blocks=self.blocks,
            heads=self.heads,
            dropout=self.dropout,
            max_length=self.history + 1,
        )


class Head(nn.Module):
    """What is known of a pair -> stars, as a correction of a base prediction.

    It begins at the base: its last layer is zero. Classes are the levels k of the scale with logits
    MLP_k - s (k - base)^2, so they begin as a bell around the base, whose sharpness s is learned.
    """

    levels: Tensor

    def __init__(self, inputs: int, config: RatingModelConfig, levels: Float64) -> None:
        """Weights.

        Args:
            inputs: numbers known of a pair.
            config: kind, width and drop-out.
            levels: (K,) distinct ratings.
        """
        super().__init__()
        self.classifies = config.head == "classification"
        self.norm = nn.LayerNorm(inputs)
        self.hidden = nn.Linear(inputs, config.width)
        self.dropout = config.dropout
        self.out = nn.Linear(config.width, len(levels) if self.classifies else 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("levels", torch.from_numpy(levels).float(), persistent=False)
        if self.classifies:
            self.log_sharpness = nn.Parameter(torch.zeros(()))

    def forward(self, known: Tensor, base: Tensor) -> Tensor:
        """(B, inputs) and (B,) -> stars (B, 1), or logits (B, K)."""
        hidden = F.gelu(self.hidden(self.norm(known)))
        out = self.out(F.dropout(hidden, self.dropout, self.training)).float()
        if not self.classifies:
            return cast(Tensor, base[:, None] + out)
        return cast(Tensor, out - self.log_sharpness.exp() * (self.levels - base[:, None]) ** 2)

    def stars(self, output: Tensor) -> Tensor:
        """The prediction, (B,): expected stars where classes are told apart."""
        return output.softmax(1) @ self.levels if self.classifies else output[:, 0]

    def loss(self, output: Tensor, stars: Tensor) -> Tensor:
        """Summed over the batch; `stars` (B,) is the truth."""
        if not self.classifies:
            return ((output[:, 0] - stars) ** 2).sum()
        right = (self.levels - stars[:, None]).abs().argmin(1)
        return F.cross_entropy(output, right, reduction="sum")


class Rater(nn.Module, ABC):
    """Pairs in, stars out; in training the summed loss."""

    def __init__(
        self, config: RatingModelConfig, rated: Rated, offsets: Offsets, training: Pairs
    ) -> None:
        """What both kinds share; `_add_head` must follow."""
        super().__init__()
        self.config, self.rated, self.offsets = config, rated, offsets
        self.levels = levels_of(training.stars)
        distinct = len(np.unique(training.stars))
        if config.head == "classification" and distinct > MOST_LEVELS:
            raise UsageError(
                f"model.head=classification tells at most {MOST_LEVELS} different ratings apart, "
                f"and this data has {distinct:,}. Use model.head=regression."
            )
        self.flops = 0
        """Of training steps so far: 6 per weight and row it meets (forward 2, backward 4)."""

    def _add_head(self, width: int) -> None:
        """Add the head above states of `width` numbers."""
        told = self.offsets.features(_nothing()).shape[1] if self.config.base == "bias" else 0
        self.head = Head(width + told, self.config, self.levels)

    def prepare(self, pairs: Pairs, advance: Callable[[float], object]) -> None:
        """Do beforehand, and once, what no step changes; `advance` hears how many are done."""

    @abstractmethod
    def state(self, pairs: Pairs) -> Tensor:
        """What the network makes of histories and items, (B, D)."""

    @property
    def language_model(self) -> nn.Module | None:
        """The part that is a language model and learns."""
        return None

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss summed over the pairs."""
        output, stars = self._output(pairs), torch.from_numpy(pairs.stars).float()
        self.flops += 6 * len(pairs) * linear_weights(self.head)
        return self.head.loss(output, stars.to(output.device))

    def predict(self, pairs: Pairs) -> Float64:
        """Stars, (P,), inside the scale seen in training."""
        stars = self.head.stars(self._output(pairs)).double().cpu().numpy()
        return self.offsets.clip(stars)

    def _output(self, pairs: Pairs) -> Tensor:
        state = self.state(pairs)
        base = np.full(len(pairs), self.offsets.overall)
        if self.config.base == "bias":
            base = self.offsets.expected(pairs)
            told = torch.from_numpy(self.offsets.features(pairs)).to(state)
            state = torch.cat([state, told], dim=1)
        return cast(Tensor, self.head(state, torch.from_numpy(base).float().to(state.device)))


class TransformerRater(Rater):
    """SASRec's Transformer over (item + stars), the item asked about last; its state and vector."""

    def __init__(
        self,
        config: RatingModelConfig,
        rated: Rated,
        offsets: Offsets,
        training: Pairs,
        item_count: int,
    ) -> None:
        """Fresh weights; `item_count` is N."""
        super().__init__(config, rated, offsets, training)
        self.items = nn.Embedding(item_count + 1, config.width, padding_idx=0)
        self.stars = nn.Embedding(len(self.levels) + 1, config.width)  # 0: asked for
        for table in (self.items, self.stars):
            nn.init.trunc_normal_(table.weight, std=0.02)
        self.transformer = SASRec(config.transformer())
        self._add_head(2 * config.width)

    def state(self, pairs: Pairs) -> Tensor:
        """(B, 2 D)."""
        rows, lengths = self.rated.windows(pairs, self.config.history)  # (B, L), (B,)
        width = rows.shape[1]
        real = np.arange(width) >= width - lengths[:, None]
        items = np.where(real, self.rated.items[rows], 0)
        stars = np.where(real, 1 + nearest_level(self.levels, self.rated.stars[rows]), 0)
        device = self.items.weight.device
        items = np.concatenate([items, pairs.item[:, None]], axis=1).astype(np.int64)
        stars = np.concatenate([stars, np.zeros((len(pairs), 1), np.int64)], axis=1)
        known = torch.from_numpy(items).to(device)  # (B, L + 1)
        vectors = self.items(known)  # (B, L + 1, D)
        told = vectors + self.stars(torch.from_numpy(stars).to(device))
        state = self.transformer.last(told, known > 0)
        self.flops += 6 * int(lengths.sum() + len(pairs)) * linear_weights(self.transformer)
        return torch.cat([state, vectors[:, -1]], dim=1)


def linear_weights(module: nn.Module, learned: bool = False) -> int:
    """Weights of matrices, all or those that learn; tables, norms and biases cost little."""
    tables = {
        id(w) for m in module.modules() if isinstance(m, nn.Embedding) for w in m.parameters()
    }
    return sum(
        weight.numel()
        for weight in module.parameters()
        if weight.dim() > 1 and id(weight) not in tables and (weight.requires_grad or not learned)
    )


def _nothing() -> Pairs:
    """No pairs."""
    whole, short = np.empty(0, np.int64), np.empty(0, np.int32)
    return Pairs(whole, short, short, np.empty(0), whole, whole)
