"""Which language model answers prompts, where it comes from, and what of it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from llmrec.encoders.loading import EncoderConfig, Location, locate
from llmrec.encoders.text import check_quantised
from llmrec.encoders.tuning import LoraOptions, add_adapters
from llmrec.errors import UsageError

SCRATCH = ("scratch:t5", "scratch:llama")
OPTION = "model.name"


@dataclass(frozen=True)
class ScratchConfig:
    """A model that starts from nothing, with a tokenizer of its own."""

    width: int = 64
    """Of the hidden states; heads divide it."""
    layers: int = 2
    """Transformer blocks; of scratch:t5, as many again in the decoder."""
    heads: int = 4
    """Attention heads; the feed-forward layers are four times as wide as the model."""
    dropout: float = 0.1
    """Of scratch:t5; scratch:llama has none."""
    vocabulary: int = 4000
    """Most tokens that the tokenizer learns from the training prompts."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no model."""
        if min(self.width, self.layers, self.heads, self.vocabulary) < 1:
            raise UsageError(
                "model.scratch.width, layers, heads and vocabulary must be at least 1."
            )
        if self.width % (2 * self.heads):
            raise UsageError(
                f"model.scratch.width={self.width} must be a multiple of twice the number of "
                f"heads ({self.heads})."
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"model.scratch.dropout={self.dropout} must lie in [0, 1).")


@dataclass(frozen=True)
class LanguageModelConfig:
    """The language model that answers."""

    name: str = "scratch:t5"
    """Hugging Face id or local folder of an encoder-decoder (google-t5/t5-small) or decoder-only
    (Qwen/Qwen3-0.6B) model; or scratch:t5, scratch:llama: a new one of model.scratch's sizes."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    """The sizes of a new model."""
    tune: Literal["full", "lora", "qlora"] = "full"
    """full: all weights learn; lora: low-rank adapters; qlora: adapters over weights in 4 bits."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """The adapters of lora and qlora."""
    whole_words: bool | Literal["auto"] = "auto"
    """Whether each token also gets an embedding of its word's number, which ties the pieces of an
    id together (P5). auto: encoder-decoder models do."""
    max_input_tokens: int = 1024
    """Tokens of a prompt; a longer one loses its beginning, and how many did is reported."""
    max_target_tokens: int = 64
    """Tokens of an answer, the end token included."""
    checkpointing: bool = False
    """Whether blocks keep only their inputs and compute the rest again: less memory, more work."""

    def __post_init__(self) -> None:
        """Refuse options that the model would ignore."""
        self.lora.check("model.lora")
        if self.max_input_tokens < 2 or self.max_target_tokens < 2:
            raise UsageError(
                "model.max_input_tokens and model.max_target_tokens must be at least 2."
            )
        if self.tune == "full" and self.lora != LoraOptions():
            raise UsageError(
                "model.lora means nothing to model.tune=full. Leave it out, or use "
                "model.tune=lora or qlora."
            )
        if self.lora.layers != "all":
            raise UsageError(
                f"model.lora.layers={self.lora.layers}: adapters go to all layers. Leave it out."
            )
        if self.name in SCRATCH and self.tune != "full":
            raise UsageError(
                f"model.tune={self.tune} would leave the random weights of model.name={self.name} "
                "as they are. Use model.tune=full."
            )
        if self.name not in SCRATCH and self.scratch != ScratchConfig():
            raise UsageError(
                f"model.scratch means nothing to model.name={self.name}. Leave it out, or use one "
                f"of {', '.join(SCRATCH)}."
            )

    @property
    def from_scratch(self) -> bool:
        """Whether no weights are loaded."""
        return self.name in SCRATCH


def located(config: LanguageModelConfig) -> Location | None:
    """Where a pretrained model's files are; None for one that starts from nothing.

    Raises:
        UsageError: It is neither a local folder nor reachable.
    """
    if config.from_scratch:
        return None
    return locate(EncoderConfig(model=config.name, revision=config.revision), OPTION)


def load_tokenizer(place: Location) -> PreTrainedTokenizerFast:
    """A pretrained model's own tokenizer."""
    try:
        made = AutoTokenizer.from_pretrained(place.source, revision=place.revision or None)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(
            f"{OPTION}: the tokenizer in {place.source} cannot be loaded ({_brief(error)}). Save "
            "the model again with its tokenizer."
        ) from error
    return cast(PreTrainedTokenizerFast, made)


def check_positions(config: LanguageModelConfig, hf_config: PreTrainedConfig) -> None:
    """Refuse prompts that are longer than the places a model knows, where it counts them."""
    known = hf_config.to_dict() | {n: getattr(hf_config, n) for n in hf_config.attribute_map}
    places = known.get("max_position_embeddings")
    needed = config.max_input_tokens
    if not hf_config.is_encoder_decoder:
        needed += config.max_target_tokens
    if isinstance(places, int) and needed > places:
        raise UsageError(
            f"{OPTION}={config.name} knows {places} places, and model.max_input_tokens="
            f"{config.max_input_tokens} with model.max_target_tokens={config.max_target_tokens} "
            f"needs {needed}. Lower them."
        )


def hf_config_of(
    config: LanguageModelConfig, place: Location | None, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedConfig:
    """The model's architecture: as its files say, or of the sizes asked for."""
    if place is not None:
        try:
            return AutoConfig.from_pretrained(place.source, revision=place.revision or None)
        except (ValueError, OSError) as error:
            raise UsageError(
                f"{OPTION}={config.name} cannot be loaded ({_brief(error)}). Use a model that this "
                "version of transformers knows without code of its own."
            ) from error
    sizes = config.scratch
    special: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if config.name == "scratch:t5":
        return T5Config(
            d_model=sizes.width,
            d_kv=sizes.width // sizes.heads,
            d_ff=4 * sizes.width,
            num_layers=sizes.layers,
            num_decoder_layers=sizes.layers,
            num_heads=sizes.heads,
            dropout_rate=sizes.dropout,
            decoder_start_token_id=tokenizer.pad_token_id,
            **special,
        )
    return LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=config.max_input_tokens + config.max_target_tokens,
        tie_word_embeddings=True,
        **special,
    )


def load_model(
    config: LanguageModelConfig,
    place: Location | None,
    hf_config: PreTrainedConfig,
    device: torch.device,
) -> PreTrainedModel:
    """The model with its weights, or with new ones; on the device where it is quantised."""
    family = AutoModelForSeq2SeqLM if hf_config.is_encoder_decoder else AutoModelForCausalLM
    if place is None:
        return cast(PreTrainedModel, family.from_config(hf_config))
    options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
    if config.tune == "qlora":
        half = device.type == "cuda"
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
        )
    try:
        model, info = family.from_pretrained(
            place.source,
            config=hf_config,
            revision=place.revision or None,
            output_loading_info=True,
            **options,
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise UsageError(
            f"{OPTION}={config.name} cannot be loaded as a language model that writes "
            f"({_brief(error)}). Use an encoder-decoder or decoder-only model."
        ) from error
    if info["missing_keys"]:
        raise UsageError(
            f"{OPTION}={config.name} lacks weights ({min(info['missing_keys'])}), so its answers "
            "would start from noise. Use a model with a language-model head."
        )
    if config.tune == "qlora":
        check_quantised(model, "model.tune=qlora")
    return cast(PreTrainedModel, model)


def choose_learning(
    model: PreTrainedModel, config: LanguageModelConfig, new_from: int | None
) -> None:
    """Freeze what does not learn; `new_from` is the first token that the model has never seen."""
    if config.tune == "full":
        return
    parts = [model.base_model]
    if model.config.is_encoder_decoder:
        parts = [model.get_encoder(), model.get_decoder()]
    add_adapters(model, parts, config.lora, config.name, "model.lora")
    if new_from is None:
        return
    # New tokens have rows of noise in the tables, which must learn; all other rows stay.
    for table in {model.get_input_embeddings(), model.get_output_embeddings()}:
        weight = table.weight
        weight.requires_grad_(True)
        rows = torch.arange(len(weight), device=weight.device)[:, None] >= new_from
        weight.register_hook(lambda gradient, rows=rows: gradient * rows.to(gradient.device))


def _brief(error: BaseException) -> str:
    """The first line of an error, for a sentence."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
