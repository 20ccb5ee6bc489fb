"""Item towers: item ids in, vectors of the user model's width out.

`ItemTower.vectors(ids)` is all that losses, user models and the evaluator know of items.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrec.encoders.sharing import shared
from llmrec.encoders.tuned import TunedEncoder
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

    @property
    def language_model(self) -> TunedEncoder | None:
        """The one that learns with the tower, if one does."""
        return next((part for part in self.modules() if isinstance(part, TunedEncoder)), None)


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


def projection(text_width: int, width: int, config: TowerConfig) -> nn.Sequential:
    """From a text's vector to the user model: Linear + GELU, then Dropout + Linear + GELU each."""
    inner = width if config.projection_width == "model" else config.projection_width
    widths = [text_width, *[inner] * (config.projection_layers - 1), width]
    layers: list[nn.Module] = []
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [nn.Dropout(config.projection_dropout)] * (number > 0) + [linear, nn.GELU()]
    nn.init.trunc_normal_(linear.weight, std=0.02)  # scores start as small as an ID tower's
    return nn.Sequential(*layers)


class TextTower(ItemTower):
    """Frozen text vectors through a learned projection, as in TCF."""

    features: Tensor

    def __init__(self, features: NDArray[np.float32], width: int, config: TowerConfig) -> None:
        """`features` (N, H), item i + 1 in row i; they are a buffer that training never changes."""
        super().__init__()
        padded = np.concatenate([np.zeros((1, features.shape[1]), np.float32), features])
        self.register_buffer("features", torch.from_numpy(padded), persistent=False)
        self.projection = projection(features.shape[1], width, config)

    def vectors(self, ids: Tensor) -> Tensor:
        """(n,) -> (n, D)."""
        vectors: Tensor = self.projection(self.features[ids])
        return vectors * (ids > 0)[:, None]


class TunedTextTower(ItemTower):
    """A language model that learns with the recommender, then a fixed whitening, a projection.

    The whitening is the frozen model's, so that before the first step this is the frozen tower.
    """

    mean: Tensor
    directions: Tensor

    def __init__(
        self, encoder: TunedEncoder, whitening: Whitening, width: int, config: TowerConfig
    ) -> None:
        """`encoder` reads the text of item i + 1 as its row i."""
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.from_numpy(whitening.mean).float())
        self.register_buffer("directions", torch.from_numpy(whitening.directions).float())
        self.projection = projection(whitening.directions.shape[1], width, config)

    def vectors(self, ids: Tensor) -> Tensor:
        """(n,) distinct ids, the same on all processes -> (n, D); each process reads its share."""
        rows = ids.cpu().numpy() - 1
        lengths = np.where(rows >= 0, self.encoder.lengths[rows], 0)
        return shared(lengths, lambda places: self._own(rows[places], lengths[places]))

    def _own(self, rows: NDArray[np.int64], lengths: NDArray[np.int32]) -> Tensor:
        """Rows of the catalogue (m,), -1 for padding, and their tokens -> (m, D)."""
        filled = np.flatnonzero(lengths)
        # A process whose share has no text reads one for nothing: the others wait for its gradient.
        read = self.encoder(
            rows[filled] if len(filled) else np.array([self.encoder.lengths.argmax()])
        )
        vectors = (read - self.mean) @ self.directions  # (m', H) x (H, H') -> (m', H')
        features = vectors.new_zeros(len(rows), vectors.shape[1])  # empty texts stay zero
        places = torch.from_numpy(filled).to(vectors.device)
        features = features.index_add(0, places, vectors[: len(filled)])
        items: Tensor = self.projection(features)
        return items * torch.from_numpy(rows >= 0).to(items.device)[:, None]


class IdTextTower(ItemTower):
    """Both: identity and text of an item, added, concatenated or gated."""

    def __init__(
        self,
        item_count: int,
        text: Callable[[], TextTower | TunedTextTower],
        width: int,
        config: TowerConfig,
    ) -> None:
        """See `IdTower`; `text` makes the other one, its weights drawn after the IDs'."""
        super().__init__()
        self.id, self.text = IdTower(item_count, width), text()
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
    """Whiten text vectors, or put a control in their place; (N, H) -> (N, H')."""
    if config.whiten:
        vectors = whiten(vectors)
    if config.control == "random":  # noise of the same spread, and nothing where there is no text
        filled = np.any(vectors != 0, axis=1)
        noise = np.random.default_rng(seed).normal(0, vectors[filled].std(), vectors.shape)
        return (filled[:, None] * noise).astype(np.float32)
    return vectors if config.control == "none" else vectors[text_order(len(vectors), config, seed)]


def text_order(item_count: int, config: TowerConfig, seed: int) -> NDArray[np.int64]:
    """(N,): whose text each item has: its own, or another's under control=shuffled."""
    order = np.arange(item_count)
    return np.random.default_rng(seed).permutation(order) if config.control == "shuffled" else order


@dataclass(frozen=True)
class Whitening:
    """Text vectors x -> (x - mean) @ directions."""

    mean: NDArray[np.float64]
    """(H,)."""
    directions: NDArray[np.float64]
    """(H, H')."""

    @classmethod
    def none(cls, width: int) -> Whitening:
        """Changes nothing."""
        return cls(np.zeros(width), np.eye(width))

    @classmethod
    def of(cls, vectors: NDArray[np.float32]) -> Whitening:
        """PCA whitening of (N, H), rows of zeros (no text) left aside.

        Directions with less than a millionth of the largest variance carry rounding only and are
        left out, so that the width may shrink: H' <= H.
        """
        centred = vectors[np.any(vectors != 0, axis=1)].astype(np.float64)
        mean = centred.mean(axis=0)
        centred -= mean
        variances, directions = np.linalg.eigh(centred.T @ centred / max(1, len(centred)))
        kept = variances > 1e-6 * variances[-1]
        return cls(mean, directions[:, kept] / np.sqrt(variances[kept]))


def whiten(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centre and decorrelate to unit variance; rows of zeros (no text) stay zero.

    (N, H) -> (N, H' <= H), see `Whitening.of`.
    """
    whitening, filled = Whitening.of(vectors), np.any(vectors != 0, axis=1)
    result = np.zeros((len(vectors), whitening.directions.shape[1]), np.float32)
    result[filled] = (vectors[filled].astype(np.float64) - whitening.mean) @ whitening.directions
    return result


def build_tower(
    config: TowerConfig,
    item_count: int,
    width: int,
    features: NDArray[np.float32] | None,
    tuned: TunedEncoder | None = None,
) -> ItemTower:
    """The tower a config names.

    Args:
        config: what to build.
        item_count: N.
        width: D.
        features: (N, H) for towers that read text: what `prepare_features` made, or, for a tuned
            language model, its plain vectors before training, which the whitening is taken from.
        tuned: the language model that learns; None: `features` are all there is.
    """
    if config.name == "id":
        return IdTower(item_count, width)
    assert features is not None, "text towers need the encoder's vectors"
    known = features

    def text() -> TextTower | TunedTextTower:
        if tuned is None:
            return TextTower(known, width, config)
        plain = Whitening.none(known.shape[1])
        whitening = Whitening.of(known) if config.whiten else plain
        return TunedTextTower(tuned, whitening, width, config)

    return text() if config.name == "text" else IdTextTower(item_count, text, width, config)
