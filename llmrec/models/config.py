"""Options of user models and of the rows that learn nothing by gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmrec.errors import UsageError

TRANSFORMERS = ("sasrec", "bert4rec")
USED_BY = {
    "norm": TRANSFORMERS,
    "feed_forward": TRANSFORMERS,
    "positions": TRANSFORMERS,
    "mask_share": ("bert4rec",),
    "kernel": ("nextitnet",),
    "dilations": ("nextitnet",),
    "neighbours": ("item_knn",),
    "shrinkage": ("item_knn",),
    "l2": ("ease",),
    "recent_share": ("recent_popularity",),
}
"""Option -> the models that read it; set for another one it is refused, not ignored.

Not so width, blocks, heads, dropout and max_length: a suite sets them once for all of its rows.
"""


@dataclass(frozen=True)
class UserModelConfig:
    """What turns a history of item vectors into a user vector."""

    name: Literal[
        "sasrec", "bert4rec", "gru4rec", "nextitnet", "dssm_history", "dssm", "mf", "lightgcn",
        "popularity", "recent_popularity", "random", "repeat_history", "item_knn", "markov",
        "ease", "embedding", "bm25",
    ] = "sasrec"  # fmt: skip
    """A model that reads histories: sasrec (causal Transformer), bert4rec (Transformer that reads
    both ways, trained on masked items), gru4rec (recurrent), nextitnet (dilated causal
    convolutions), dssm_history (a network over the mean of the history). Or one that knows a user
    by ID alone: dssm (two networks), mf (matrix factorisation), lightgcn (both over the graph of
    users and items). Or a row that learns nothing by gradients: popularity; recent_popularity;
    random; repeat_history: the items of the history, the latest first; item_knn: likeness in users
    with those of the history; markov: what followed the last item; ease: a linear model of all
    items in closed form; embedding: mean cosine of the items' text vectors with those of the
    history; bm25: words that an item's text shares with those of the history (k1 1.5, b .75)."""
    width: int = 64
    """D, of item and user vectors alike."""
    blocks: int = 1
    """Transformer blocks, recurrent layers, times that `dilations` are gone through, hidden layers
    of each network, steps in the graph."""
    heads: int = 2
    """Attention heads; must divide width."""
    dropout: float = 0.2
    """On inputs and inside of blocks; of mf and lightgcn on both vectors."""
    max_length: int = 50
    """L: most recent items of a history that are read; of a model that knows users by ID, that it
    learns from. ease and repeat_history read all."""
    norm: Literal["post", "pre"] = "post"
    """Transformers: LayerNorm after each branch's sum, or before each branch and once at the end;
    the items are normed either way."""
    feed_forward: Literal["gelu", "gated"] = "gelu"
    """Transformers: GELU of 4 D units, or SwiGLU of 8/3 D (as many weights)."""
    positions: Literal["learned", "rotary", "relative"] = "learned"
    """Transformers: a vector per position added to the items, rotated queries and keys, or a
    learned number per head and distance added to the attention's logits."""
    mask_share: float = 0.2
    """bert4rec: share of a training row's items that are masked, at least one of them."""
    kernel: int = 3
    """nextitnet: items that a convolution looks at."""
    dilations: Sequence[int] = (1, 4)
    """nextitnet: dilation of each residual block's first convolution; its second has twice that."""
    neighbours: int | Literal["all"] = 100
    """item_knn: most similar items that are kept of each item."""
    shrinkage: float = 0.0
    """item_knn: users added to the denominator of the cosine, against likeness by chance."""
    l2: float = 500.0
    """ease: weight of the squared norm."""
    recent_share: float = 0.1
    """recent_popularity: newest share of the training interactions, by time, that is counted."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built, and what this model would ignore."""
        object.__setattr__(self, "dilations", tuple(self.dilations))  # YAML gives a list
        for option, models in USED_BY.items():
            value = getattr(self, option)
            default = UserModelConfig.__dataclass_fields__[option].default
            if self.name not in models and value != default:
                raise UsageError(
                    f"model.{option}={value} means nothing to model.name={self.name}. Leave it "
                    f"out, or use {' or '.join(models)}."
                )
        for option in ("width", "blocks", "heads", "max_length"):
            if getattr(self, option) < 1:
                raise UsageError(f"model.{option}={getattr(self, option)} must be at least 1.")
        if self.name in TRANSFORMERS and self.width % self.heads:
            raise UsageError(
                f"model.width={self.width} is not divisible by model.heads={self.heads}."
            )
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise UsageError(
                f"model.positions=rotary turns pairs of numbers, and a head of model.width="
                f"{self.width} / model.heads={self.heads} has an odd one. Change either."
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"model.dropout={self.dropout} must lie in [0, 1).")
        if not 0 < self.mask_share < 1:
            raise UsageError(f"model.mask_share={self.mask_share} must lie in (0, 1).")
        if not 0 < self.recent_share <= 1:
            raise UsageError(f"model.recent_share={self.recent_share} must lie in (0, 1].")
        if self.name == "bert4rec" and self.max_length < 2:
            raise UsageError(
                f"model.max_length={self.max_length} leaves bert4rec nothing to read beside its "
                "mask. Use 2 or more."
            )
        if self.kernel < 2:
            raise UsageError(f"model.kernel={self.kernel} must be at least 2.")
        if not self.dilations or min(self.dilations) < 1:
            raise UsageError(
                f"model.dilations={list(self.dilations)} must list whole numbers from 1 on."
            )
        if self.neighbours != "all" and self.neighbours < 1:
            raise UsageError(f"model.neighbours={self.neighbours} must be at least 1, or all.")
        if not self.shrinkage >= 0:
            raise UsageError(f"model.shrinkage={self.shrinkage} must not be below 0.")
        if not self.l2 > 0:
            raise UsageError(f"model.l2={self.l2} must be above 0.")
