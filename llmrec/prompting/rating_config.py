"""The options of a rating run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmrec.data.readers import DataConfig
from llmrec.data.splits import SplitConfig
from llmrec.encoders.tuning import TunableEncoder
from llmrec.errors import UsageError
from llmrec.models.optim import OptimConfig
from llmrec.prompting.rating_models import RatingModelConfig
from llmrec.runs import RunOptions


@dataclass(frozen=True)
class RatingOptimConfig(OptimConfig):
    """How weights are moved; see `OptimConfig`."""

    epochs: int = 8
    """Most passes over the training ratings; also the length of the cosine schedule."""
    batch_size: int = 256
    """Ratings per step, over all processes and accumulated pieces together."""
    accumulate: int = 1
    """Pieces a process cuts its share of a step into, one after the other, to save memory."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; that of a tuned language model is encoder.lr."""
    patience: int = 2
    """Epochs without a better validation RMSE before training stops."""
    training_pairs: int | Literal["all"] = "all"
    """Ratings trained on, drawn once at random from the training part where it has more: a large
    language model need not read all. Means, offsets and histories are of all ratings."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        super().__post_init__()
        if self.training_pairs != "all" and self.training_pairs < 1:
            raise UsageError(f"optim.training_pairs={self.training_pairs} must be at least 1.")


@dataclass(frozen=True)
class RatingRunConfig(RunOptions):
    """A rating run: as any run, selected by errors."""

    select: Literal["RMSE", "MAE"] = "RMSE"
    """Validation measure that picks the epoch, the lowest one."""


@dataclass(frozen=True)
class RatingConfig:
    """Everything that decides a rating run."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    encoder: TunableEncoder = field(default_factory=lambda: TunableEncoder(max_item_tokens=128))
    """The language model; encoder.max_item_tokens is the length of a whole prompt."""
    model: RatingModelConfig = field(default_factory=RatingModelConfig)
    optim: RatingOptimConfig = field(default_factory=RatingOptimConfig)
    run: RatingRunConfig = field(default_factory=RatingRunConfig)

    def __post_init__(self) -> None:
        """Refuse a tuned encoder that nothing reads, and what is of item texts alone."""
        encoder, name = self.encoder, self.model.name
        if encoder.tuned and name != "language_model":
            raise UsageError(
                f"encoder.tune={encoder.tune} means nothing to model.name={name}, which reads no "
                "text. Use encoder.tune=frozen, or model.name=language_model."
            )
        defaults = TunableEncoder()
        for option in ("step_tokens", "cache_states", "cache_dtype", "cache_gigabytes"):
            if getattr(encoder, option) != getattr(defaults, option):
                raise UsageError(
                    f"encoder.{option} is for item texts, which repeat, and means nothing to "
                    "prompts. Leave it out; optim.accumulate bounds the memory of a step."
                )
