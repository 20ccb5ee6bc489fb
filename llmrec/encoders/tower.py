"""Item towers: item ids in, vectors of the user model's width out.

`ItemTower.vectors(ids)` is all that losses, user models and the evaluator know of items.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrec.errors import UsageError


@dataclass(frozen=True)
class TowerConfig:
    """How an item becomes a vector."""

    name: Literal["id", "text", "id_text"] = "text"
    """id: a learned vector per item; text: the encoder's vector, projected; id_text: both."""
    combine: Literal["add", "concat", "gated"] = "add"
    """How id_text joins the two: their sum, a linear layer over both, or a learned gate."""
    projection_layers: int = 2
    """Linear + GELU layers from the encoder's vector to the user model; 2 as in TCF's SASRec."""
    projection_width: int | Literal["model"] = "model"
    """Width between projection layers: model.width, or a number; such as three times that."""
    projection_dropout: float = 0.1
    """Dropout before each projection layer but the first."""
    whiten: bool = True
    """Whether text vectors are centred and decorrelated over the catalogue first: mean-pooled ones
    share a large common direction, which says nothing of an item."""
    control: Literal["none", "shuffled", "random", "tfidf"] = "none"
    """What replaces the true text vectors: nothing, the same shuffled among items, noise, or the
    texts' TF-IDF in 384 dimensions (no language model)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.name == "id" and self.control != "none":
            raise UsageError(
                f"tower.control={self.control} replaces text, which tower.name=id does not read. "
                "Leave it out, or use tower.name=text."
            )
        if self.projection_layers < 1:
            raise UsageError(
                f"tower.projection_layers={self.projection_layers} must be at least 1."
            )
        if self.projection_width != "model" and self.projection_width < 1:
            raise UsageError(f"tower.projection_width={self.projection_width} must be at least 1.")
        if not 0 <= self.projection_dropout < 1:
            raise UsageError(
                f"tower.projection_dropout={self.projection_dropout} must lie in [0, 1)."
            )


class ItemTower(nn.Module, ABC):
    """What every tower offers."""

    @abstractmethod
    def vectors(self, ids: Tensor) -> Tensor:
        """Item ids (n,) -> (n, D); the padding item 0 gets the zero vector."""


class IdTower(ItemTower):
    """A learned vector for each item."""

    def __init__(self, item_count: int, width: int) -> None:
        """N items of width D; initial standard deviation .02 as in BERT4Rec and MoRec."""
        super().__init__()
        self.table = nn.Embedding(item_count + 1, width, padding_idx=0)
        nn.init.trunc_normal_(self.table.weight, std=0.02)
        with torch.no_grad():
            self.table.weight[0] = 0

    def vectors(self, ids: Tensor) -> Tensor:
        """(n,) -> (n, D)."""
        vectors: Tensor = self.table(ids)
        return vectors


class TextTower(ItemTower):
    """Frozen text vectors through a learned projection, as in TCF.

    Linear + GELU, then Dropout + Linear + GELU for each further layer.
    """

    features: Tensor

    def __init__(self, features: NDArray[np.float32], width: int, config: TowerConfig) -> None:
        """`features` (N, H), item i + 1 in row i; they are a buffer that training never changes."""
        super().__init__()
        padded = np.concatenate([np.zeros((1, features.shape[1]), np.float32), features])
        self.register_buffer("features", torch.from_numpy(padded), persistent=False)
        inner = width if config.projection_width == "model" else config.projection_width
        widths = [features.shape[1], *[inner] * (config.projection_layers - 1), width]
        layers: list[nn.Module] = []
        for number, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [nn.Dropout(config.projection_dropout)] * (number > 0) + [linear, nn.GELU()]
        nn.init.trunc_normal_(linear.weight, std=0.02)  # scores start as small as an ID tower's
        self.projection = nn.Sequential(*layers)

    def vectors(self, ids: Tensor) -> Tensor:
        """(n,) -> (n, D)."""
        vectors: Tensor = self.projection(self.features[ids])
        return vectors * (ids > 0)[:, None]


class IdTextTower(ItemTower):
    """Both: identity and text of an item, added, concatenated or gated."""

    def __init__(
        self, item_count: int, features: NDArray[np.float32], width: int, config: TowerConfig
    ) -> None:
        """See `IdTower` and `TextTower`."""
        super().__init__()
        self.id, self.text = IdTower(item_count, width), TextTower(features, width, config)
        self.combine = config.combine
        if config.combine != "add":
            self.join = nn.Linear(2 * width, width)

    def vectors(self, ids: Tensor) -> Tensor:
        """(n,) -> (n, D)."""
        identity, text = self.id.vectors(ids), self.text.vectors(ids)  # (n, D) each
        if self.combine == "add":
            return identity + text
        joined: Tensor = self.join(torch.cat([identity, text], dim=1))  # (n, 2 D) -> (n, D)
        if self.combine == "gated":
            gate = torch.sigmoid(joined)
            return gate * identity + (1 - gate) * text
        return joined * (ids > 0)[:, None]


def prepare_features(
    vectors: NDArray[np.float32], config: TowerConfig, seed: int
) -> NDArray[np.float32]:
    """Whiten text vectors, or put a control in their place; (N, H) -> (N, H)."""
    rng = np.random.default_rng(seed)
    if config.whiten:
        vectors = whiten(vectors)
    if config.control == "random":  # noise of the same spread, and nothing where there is no text
        filled = np.any(vectors != 0, axis=1)
        noise = rng.normal(0, vectors[filled].std(), vectors.shape)
        return (filled[:, None] * noise).astype(np.float32)
    return vectors[rng.permutation(len(vectors))] if config.control == "shuffled" else vectors


def whiten(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centre and decorrelate to unit variance (PCA whitening); rows of zeros (no text) stay zero.

    Directions with less than a millionth of the largest variance carry rounding only and are left
    out, so that the width may shrink: (N, H) -> (N, H' <= H).
    """
    filled = np.any(vectors != 0, axis=1)
    centred = vectors[filled].astype(np.float64)
    centred -= centred.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred / max(1, len(centred)))
    kept = variances > 1e-6 * variances[-1]
    result = np.zeros((len(vectors), int(kept.sum())), np.float32)
    result[filled] = centred @ (directions[:, kept] / np.sqrt(variances[kept]))
    return result


def build_tower(
    config: TowerConfig, item_count: int, width: int, features: NDArray[np.float32] | None
) -> ItemTower:
    """The tower a config names; `features` (N, H) for those that read text."""
    if config.name == "id":
        return IdTower(item_count, width)
    assert features is not None, "text towers need the encoder's vectors"
    if config.name == "text":
        return TextTower(features, width, config)
    return IdTextTower(item_count, features, width, config)
