"""The options of a rating run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from llmrec.data.readers import DataConfig
from llmrec.data.splits import SplitConfig
from llmrec.encoders.tuning import TunableEncoder
from llmrec.errors import UsageError
from llmrec.models.optim import OptimConfig
from llmrec.prompting.rating_models import COUNTED, RatingModelConfig
from llmrec.runs import RunOptions

READS = {"bias": ("model.item_shrinkage", "model.user_shrinkage")}
"""Options of model, optim and encoder that a counted model reads, beside its name."""
OF_ALL_ROWS = ("encoder.max_item_tokens", "optim.training_pairs")
"""What makes a suite of ratings larger or smaller: given on its command line, it reaches the
counted rows too, where it may stand without effect."""


@dataclass(frozen=True)
class RatingEncoder(TunableEncoder):
    """The language model that reads prompts."""

    max_item_tokens: int = 128
    """Tokens of a whole prompt, special ones included: the item asked about and as many of the
    user's latest ratings as fit."""
    tune: str = "frozen"
    """frozen: every prompt is read once and its vector kept in memory: ratings (training, valid and
    test) x the model's width x 4 bytes, such as 1.5 GB for a million at width 384; lora: low-rank
    adapters; qlora: adapters over a quantised model (encoder.quantisation; none means nf4 here);
    top:k: the highest k blocks; full: all weights. Tuned, prompts are read anew at every step."""


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
    encoder: RatingEncoder = field(default_factory=RatingEncoder)
    """The language model."""
    model: RatingModelConfig = field(default_factory=RatingModelConfig)
    optim: RatingOptimConfig = field(default_factory=RatingOptimConfig)
    run: RatingRunConfig = field(default_factory=RatingRunConfig)

    def __post_init__(self) -> None:
        """Refuse what would be ignored: by a counted model, without text, and with prompts."""
        encoder, name = self.encoder, self.model.name
        if encoder.tuned and name != "language_model":
            raise UsageError(
                f"encoder.tune={encoder.tune} means nothing to model.name={name}, which reads no "
                "text. Use encoder.tune=frozen, or model.name=language_model."
            )
        if name in COUNTED:
            self._refuse_uncounted()
        defaults = RatingEncoder()
        for option in ("step_tokens", "cache_states", "cache_dtype", "cache_gigabytes"):
            if getattr(encoder, option) != getattr(defaults, option):
                raise UsageError(
                    f"encoder.{option} is for item texts, which repeat, and means nothing to "
                    "prompts. Leave it out; optim.accumulate bounds the memory of a step."
                )

    def _refuse_uncounted(self) -> None:
        """Refuse options that only a model which learns by gradients reads."""
        name, plain = self.model.name, RatingRunConfig()
        given = {"run.select": self.run.select} if self.run.select != plain.select else {}
        given |= _changed("model", self.model) | _changed("optim", self.optim)
        given |= _changed("encoder", self.encoder)
        read = ("model.name", *OF_ALL_ROWS, *READS.get(name, ()))
        for option, value in given.items():
            if option not in read:
                raise UsageError(
                    f"{option}={value} means nothing to model.name={name}, which is counted, not "
                    "trained. Leave it out; in a suite, set it in the rows that learn."
                )


def _changed(group: str, config: Any) -> dict[str, Any]:
    """The options of a group that are not at their default, by dotted name."""
    plain = type(config)()
    return {
        f"{group}.{field.name}": getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != getattr(plain, field.name)
    }
