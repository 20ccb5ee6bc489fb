"""Which weights of a language model a recommender's loss may move, and how they are set up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmrec.encoders.text import EncoderConfig, TextEncoder
from llmrec.errors import UsageError


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by PEFT; for tune=lora and qlora."""

    rank: int = 8
    """Width of the two factors."""
    alpha: float = 16.0
    """The product of the factors is scaled by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: float = 0.0
    """On the adapters' inputs."""
    targets: str = "linear"
    """linear: every linear layer of the tuned blocks; attention: those of their attention alone; or
    the last parts of their names, such as query,value."""
    layers: int | Literal["all"] = "all"
    """Only the highest n blocks get adapters; those below then run once and are cached."""
    dora: bool = False
    """Whether magnitude and direction are learned apart (DoRA, arXiv 2402.09353)."""
    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank), which keeps large ranks useful."""

    def check(self, option: str) -> None:
        """Refuse values without a meaning; `option` is what the group is called there."""
        if self.rank < 1 or (self.layers != "all" and self.layers < 1):
            raise UsageError(f"{option}.rank and {option}.layers must be at least 1.")
        if not self.alpha > 0:
            raise UsageError(f"{option}.alpha={self.alpha} must be above 0.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{option}.dropout={self.dropout} must lie in [0, 1).")


@dataclass(frozen=True)
class TunableEncoder(EncoderConfig):
    """A language model that reads item texts, frozen or tuned by the recommender's loss."""

    tune: str = "frozen"
    """frozen: encode once, train on the vectors; lora: low-rank adapters; qlora: adapters over a
    quantised model (encoder.quantisation; none means nf4 here); top:k: the highest k blocks; full:
    all weights. Every item of a step is read with gradients, so prefer loss.name=in_batch: the
    full softmax's step reads the whole catalogue."""
    lr: float = 5e-5
    """Peak learning rate of the language model's weights; the projection above it learns at
    optim.lr. Adapters like 1e-4 and more."""
    weight_decay: float = 0.01
    """Decoupled decay of the language model's matrices and adapters."""
    dropout: bool = False
    """Whether the language model's own drop-out is on in training. Whitening enlarges its noise, so
    that the recommender then learns more slowly; lora.dropout is apart from it."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """The adapters of lora and qlora."""
    checkpointing: bool = False
    """Whether a block keeps only its inputs and computes the rest again on the way back: less
    memory, a third more work."""
    step_tokens: int = 16384
    """Tokens per step, padding included, whose activations are held for the way back; pieces of
    encoder.batch_tokens beyond that are read a second time then, so that memory stays flat."""
    cache_states: bool = True
    """Whether blocks below the tuned ones run once per item, their output kept in the store
    (top:k, and lora.layers); false runs them at every step."""
    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of these cached states on disk."""
    cache_gigabytes: float = 20.0
    """Largest size of the cached states, GB; a larger cache is refused before it is begun."""

    def __post_init__(self) -> None:
        """Refuse what cannot be tuned, and options that the mode would ignore."""
        super().__post_init__()
        self.lora.check("encoder.lora")
        mode, _, count = self.tune.partition(":")
        counted = mode == "top" and count.isdecimal() and int(count) > 0
        if self.tune not in ("frozen", "lora", "qlora", "full") and not counted:
            raise UsageError(
                f"encoder.tune={self.tune} is none of frozen, lora, qlora, top:k (such as top:2) "
                "and full."
            )
        if not self.lr > 0 or not self.weight_decay >= 0:
            raise UsageError("encoder.lr must be above 0 and encoder.weight_decay not below it.")
        if self.step_tokens < 1 or not self.cache_gigabytes > 0:
            raise UsageError("encoder.step_tokens and encoder.cache_gigabytes must be above 0.")
        adapters = mode in ("lora", "qlora")
        self._refuse_ignored(mode == "top" or (adapters and self.lora.layers != "all"))
        if self.placement == "blocks" and mode != "frozen":
            raise UsageError(
                f"encoder.placement=blocks only reads; encoder.tune={self.tune} needs all weights "
                "in memory. Use encoder.placement=one_device or spread."
            )
        if mode == "qlora" and self.quantisation == "none":
            object.__setattr__(self, "quantisation", "nf4")  # said in the option's help
        if self.quantisation != "none" and mode not in ("frozen", "qlora"):
            raise UsageError(
                f"encoder.quantisation={self.quantisation} leaves no weight that "
                f"encoder.tune={self.tune} could move. Use encoder.tune=qlora."
            )
        if mode in ("top", "full") and self.dtype != "float32":
            raise UsageError(
                f"encoder.dtype={self.dtype} is too coarse for the small steps of encoder.tune="
                f"{self.tune}. Use float32 (run.precision=bf16 still computes in bf16), or lora."
            )

    def _refuse_ignored(self, partial: bool) -> None:
        """Refuse options without effect; `partial`: whether some blocks stay frozen below."""
        defaults = TunableEncoder.__dataclass_fields__
        tuning = ("dropout", "lr", "weight_decay", "checkpointing", "step_tokens")
        reads = dict.fromkeys(tuning, self.tuned)
        reads |= {"cache_states": partial}
        reads |= dict.fromkeys(("cache_dtype", "cache_gigabytes"), partial and self.cache_states)
        for option, read in reads.items():
            if not read and getattr(self, option) != defaults[option].default:
                raise UsageError(
                    f"encoder.{option}={str(getattr(self, option)).lower()} means nothing to "
                    f"encoder.tune={self.tune}"
                    f"{_where_no_cache(partial) if option[:5] == 'cache' else ''}. Leave it out."
                )
        if self.lora != LoraOptions() and self.tune not in ("lora", "qlora"):
            raise UsageError(
                f"encoder.lora means nothing to encoder.tune={self.tune}. Leave it out, or use "
                "encoder.tune=lora or qlora."
            )

    @property
    def tuned(self) -> bool:
        """Whether training moves the language model."""
        return self.tune != "frozen"

    @property
    def frozen_encoder(self) -> EncoderConfig:
        """The same model as nothing has tuned it: what the embedding store knows it by."""
        names = [f.name for f in fields(EncoderConfig)]
        return EncoderConfig(**{name: getattr(self, name) for name in names})

    def tuned_blocks(self, depth: int) -> int:
        """How many of the highest blocks are tuned, of `depth` that run.

        Raises:
            UsageError: More than there are, or all of them and options of a cache.
        """
        option, count = "encoder.lora.layers", self.lora.layers
        if self.tune.startswith("top:"):
            option, count = "encoder.tune", int(self.tune[4:])
        elif self.tune == "full" or count == "all":
            return depth
        if count > depth:
            raise UsageError(
                f"{option}={self.tune if option == 'encoder.tune' else count} but "
                f"{self.model} runs {depth} blocks. Use at most {depth}."
            )
        if count == depth:
            self._refuse_ignored(partial=False)
        return count


def _where_no_cache(partial: bool) -> str:
    return " with encoder.cache_states=false" if partial else " of all layers"


def make_trainable(encoder: TextEncoder, config: TunableEncoder) -> None:
    """Choose what learns; no loaded weight is changed, so the first output is the plain model's.

    Weights that no output depends on (a pooler's, the layers dropped by encoder.layers) stay
    frozen: across processes they would be waited for in vain.
    """
    count = config.tuned_blocks(len(encoder.blocks))
    tuned = list(encoder.blocks)[len(encoder.blocks) - count :]
    if config.tune == "full":
        encoder.model.requires_grad_(True)
    elif config.tune.startswith("top:"):
        for block in tuned:
            block.requires_grad_(True)
    else:
        add_adapters(encoder.model, tuned, config.lora, config.model, "encoder.lora")
    if config.checkpointing:
        if not cast(PreTrainedModel, encoder.model).supports_gradient_checkpointing:
            raise UsageError(
                f"encoder.checkpointing=true is not offered by {config.model} "
                f"({type(encoder.model).__name__}). Leave it out; encoder.step_tokens bounds "
                "memory too."
            )
        cast(PreTrainedModel, encoder.model).gradient_checkpointing_enable({"use_reentrant": False})
    _freeze_unused(encoder)


def add_adapters(
    model: nn.Module, blocks: Sequence[nn.Module], options: LoraOptions, name: str, option: str
) -> None:
    """Put low-rank adapters beside the linear layers of some blocks; all else is frozen.

    Args:
        model: changed in place.
        blocks: parts of it.
        options: rank, scale and which linear layers.
        name: what the user calls the model, for error messages.
        option: what the options are called there, such as encoder.lora.
    """
    from peft import LoraConfig, LoraModel  # seconds to import, which frozen runs need not wait for

    names = {id(module): name for name, module in model.named_modules()}
    linear = {
        names[id(module)]: names[id(block)]
        for block in blocks
        for module in block.modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    targets = [
        name for name, block in linear.items() if _targeted(name[len(block) :], options.targets)
    ]
    if not targets:
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        raise UsageError(
            f"{option}.targets={options.targets} names no linear layer of {name}. "
            f"Use linear, attention, or some of {', '.join(kinds)}."
        )
    peft = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=options.dropout,
        target_modules=targets,
        use_dora=options.dora,
        use_rslora=options.rslora,
    )
    LoraModel(model, peft, "default")  # type: ignore[arg-type]  # changes the model in place
    for weight in model.parameters():
        if weight.requires_grad:  # adapters take their layer's format, too coarse for small steps
            weight.data = weight.data.float()


def _targeted(path: str, targets: str) -> bool:
    """Whether the linear layer at a path inside its block gets an adapter."""
    if targets == "linear":
        return True
    if targets == "attention":
        return "att" in path.lower()
    return path.rpartition(".")[2] in [name.strip() for name in targets.split(",")]


def _freeze_unused(encoder: TextEncoder) -> None:
    ids = torch.tensor([encoder.tokenize(["a"])[0]], device=encoder.device)
    with torch.enable_grad():
        encoder.read(ids, torch.ones_like(ids, dtype=torch.bool)).sum().backward()
    for weight in encoder.model.parameters():
        if weight.grad is None:
            weight.requires_grad_(False)
        weight.grad = None
