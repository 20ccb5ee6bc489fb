"""A language model that answers prompts: encoder-decoder or decoder-only, pretrained or new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
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
from llmrec.prompting.decoding import CausalSteps, Seq2SeqSteps, Steps
from llmrec.prompting.tokens import (
    IGNORED,
    WHOLE_WORDS,
    PromptTokenizer,
    Tokenized,
    TrainingBatch,
    add_whole_tokens,
    packed,
    question_batch,
    training_batches,
)

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


class LanguageModel(nn.Module):
    """A Hugging Face model with P5's whole-word embedding and a loss on answers alone."""

    def __init__(
        self,
        config: LanguageModelConfig,
        place: Location | None,
        tokenizer: PreTrainedTokenizerFast,
        whole: Sequence[str],
        device: torch.device,
    ) -> None:
        """Load the model, or draw a new one from torch's generator.

        Args:
            config: which, and what of it learns.
            place: where `located` found it.
            tokenizer: of a new model, its own; of a pretrained one, as `load_tokenizer` gives it.
            whole: strings that become one token each.
            device: where it is put.

        Raises:
            UsageError: It cannot be loaded, has no language-model head, or is no such model.
        """
        super().__init__()
        known = len(tokenizer)
        add_whole_tokens(tokenizer, whole)
        hf_config = _hf_config(config, place, tokenizer)
        _check_positions(config, hf_config)
        self.encoder_decoder = bool(hf_config.is_encoder_decoder)
        self.model = _load(config, place, hf_config, device)
        if len(tokenizer) > self.model.get_input_embeddings().num_embeddings:
            self.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.prompts = PromptTokenizer(
            tokenizer, self.encoder_decoder, config.max_input_tokens, config.max_target_tokens
        )
        if config.whole_words is True and not self.encoder_decoder:
            raise UsageError(
                f"model.whole_words=true is for encoder-decoder models; {OPTION}={config.name} "
                "is decoder-only. Leave it out."
            )
        _choose_learning(self.model, config, known if len(tokenizer) > known else None)
        self.words: nn.Embedding | None = None
        if self.encoder_decoder and config.whole_words is not False:
            self.words = nn.Embedding(WHOLE_WORDS, self.model.get_input_embeddings().embedding_dim)
            # A pretrained model begins close to what it has learned to read.
            nn.init.normal_(self.words.weight, std=1.0 if config.from_scratch else 0.02)
        if config.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.start = self.prompts.pad
        """What every answer of an encoder-decoder begins with."""
        if self.encoder_decoder:
            self.start = int(self.model.config.decoder_start_token_id)
        self.flops = 0
        """Operations of all training steps so far, of this process."""
        # 2 forward and 4 backward; frozen weights have no gradients of their own.
        self._flops_per_weight = 6 if config.tune == "full" else 4
        self._reading, self._writing = self._parameters_by_part()
        self.to(device)
        self.packs = self._packs(exact=config.tune != "qlora")
        """Whether the model keeps several prompts of a row apart; else each gets a row."""

    @property
    def tables(self) -> list[nn.Module]:
        """What has a row per token: the embedding, and the output layer, which may be the same."""
        return [self.model.get_input_embeddings(), self.model.get_output_embeddings()]

    def forward(self, batches: Sequence[TrainingBatch]) -> Tensor:
        """The summed cross-entropy of all answer tokens of packed batches, a scalar."""
        for batch in batches:
            self.flops += self._flops_per_weight * (
                self._reading * batch.prompt_tokens
                + (self._writing * batch.answer_tokens if self.encoder_decoder else 0)
            )
        return torch.stack([self._loss(batch) for batch in batches]).sum()

    @torch.no_grad()
    def _packs(self, exact: bool) -> bool:
        """Try it: models that count places from the row's beginning cannot, nor running states."""
        self.eval()
        questions = self.prompts.prompts(["a b c d e f", "g h a", "b c d e"])
        targets = self.prompts.answers(["yes", "no", "yes"])
        device = self.model.device
        alone = self._loss(packed(self.prompts, questions, targets, capacity=0).to(device))
        row = packed(self.prompts, questions, targets, capacity=10_000).to(device)
        together = self._loss(row)
        # Weights in 4 bits are multiplied in coarser numbers on a GPU.
        packs = bool((together - alone).abs() <= (1e-4 if exact else 1e-2) * alone.abs())
        if not self.encoder_decoder:
            # What the later prompts lose must not depend at all on what the first one says.
            first = row.segments == 1
            later = replace(row, labels=row.labels.masked_fill(first, IGNORED))
            others = (row.ids + 1) % self.model.get_input_embeddings().num_embeddings
            changed = replace(later, ids=torch.where(first, others, row.ids))
            losses = [self._loss(batch) for batch in (later, changed)]
            packs = packs and bool((losses[0] - losses[1]).abs() <= 1e-6 * losses[0].abs())
        self.train()
        return packs

    def batches(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[TrainingBatch, ...]:
        """Prompts and their answers as this model is trained on them."""
        return training_batches(self.prompts, prompts, answers, self.packs)

    def _loss(self, batch: TrainingBatch) -> Tensor:
        logits = (self._seq2seq if self.encoder_decoder else self._causal)(batch)  # (A, V)
        labels = batch.labels if self.encoder_decoder else batch.labels[:, 1:]
        return functional.cross_entropy(logits.float(), labels[labels != IGNORED], reduction="sum")

    def _seq2seq(self, batch: TrainingBatch) -> Tensor:
        """Logits of the answer tokens, (A, V)."""
        embedded = self._embedded(batch.ids, batch.words)
        own, answers = batch.segments, batch.answer_segments
        real = answers > 0
        labels = batch.labels.masked_fill(~real, self.prompts.pad)
        # Each answer begins with the start token, also in the middle of a row.
        start = self.start
        before = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        opens = torch.ones_like(real)
        opens[:, 1:] = answers[:, 1:] != answers[:, :-1]
        before = before.masked_fill(opens, start)
        later = torch.ones(labels.shape[1], labels.shape[1], device=labels.device).tril().bool()
        states = self.model.get_encoder()(
            inputs_embeds=embedded, attention_mask=_mask(own, own, embedded.dtype)
        ).last_hidden_state
        output = self.model(
            encoder_outputs=(states,),
            attention_mask=_mask(answers, own, embedded.dtype),
            decoder_input_ids=before,
            decoder_attention_mask=_mask(answers, answers, embedded.dtype, later),
            use_cache=False,
        )
        return cast(Tensor, output.logits[real])

    def _causal(self, batch: TrainingBatch) -> Tensor:
        """Logits of the answer tokens, (A, V)."""
        # Positions that begin again at 0 tell transformers where the next prompt of a row begins.
        segments = batch.segments
        places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
        opens = torch.ones_like(segments, dtype=torch.bool)
        opens[:, 1:] = segments[:, 1:] != segments[:, :-1]
        first = torch.where(opens, places, 0).cummax(dim=1).values
        body = self.model.base_model(
            input_ids=batch.ids, position_ids=places - first, use_cache=False
        ).last_hidden_state
        wanted = batch.labels[:, 1:] != IGNORED
        # The head over answers alone: over all tokens it would cost more than the model's blocks.
        return cast(Tensor, self.model.get_output_embeddings()(body[:, :-1][wanted]))

    def _embedded(self, ids: Tensor, words: Tensor) -> Tensor:
        embedded = cast(Tensor, self.model.get_input_embeddings()(ids))
        return embedded if self.words is None else embedded + self.words(words)

    def ask(self, questions: Sequence[Tokenized]) -> Steps:
        """Read some prompts; what comes back gives the next token's logits, step by step."""
        device = self.model.device
        inputs = question_batch(questions, self.prompts.pad, left=not self.encoder_decoder)
        ids, words, mask = (tensor.to(device) for tensor in inputs)
        if not self.encoder_decoder:
            return CausalSteps(self.model, ids, mask)
        return Seq2SeqSteps(self.model, self._states(ids, words, mask), mask)

    def _states(self, ids: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """What the encoder makes of prompts, (B, T, D)."""
        return cast(
            Tensor,
            self.model.get_encoder()(
                inputs_embeds=self._embedded(ids, words), attention_mask=mask
            ).last_hidden_state,
        )

    @torch.inference_mode()
    def write(self, questions: Sequence[Tokenized]) -> list[str]:
        """The likeliest answers, token by token (greedy), as text."""
        device = self.model.device
        inputs = question_batch(questions, self.prompts.pad, left=not self.encoder_decoder)
        ids, words, mask = (tensor.to(device) for tensor in inputs)
        # One of our own: a model's folder may ask for sampling, penalties or forced tokens.
        plain = GenerationConfig(
            max_new_tokens=self.prompts.max_target_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.prompts.end,
            pad_token_id=self.prompts.pad,
            decoder_start_token_id=self.start,
        )
        options = {"attention_mask": mask, "generation_config": plain}
        if self.encoder_decoder:
            from transformers.modeling_outputs import BaseModelOutput

            read = BaseModelOutput(last_hidden_state=self._states(ids, words, mask))
            made = self.model.generate(encoder_outputs=read, **options)[:, 1:]
        else:
            made = self.model.generate(input_ids=ids, **options)[:, ids.shape[1] :]
        return [
            text.strip()
            for text in self.prompts.tokenizer.batch_decode(made, skip_special_tokens=True)
        ]

    def _parameters_by_part(self) -> tuple[int, int]:
        """Non-embedding parameters that read a prompt's tokens, and that make an answer's."""
        if not self.encoder_decoder:
            count = _counted(self.model.base_model)
            return count, count
        return _counted(self.model.get_encoder()), _counted(self.model.get_decoder())


def _counted(module: nn.Module) -> int:
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(weight.numel() for weight in module.parameters() if id(weight) not in tables)


def _mask(queries: Tensor, keys: Tensor, dtype: torch.dtype, also: Tensor | None = None) -> Tensor:
    """Who sees whom among packed pieces: 0 within a piece, the lowest number elsewhere.

    A query of padding sees padding, so that no row of the softmax is empty.

    Args:
        queries: segments, (R, Q).
        keys: segments, (R, K).
        dtype: of the mask, which attention adds to its scores.
        also: (Q, K), a further condition.

    Returns:
        (R, 1, Q, K).
    """
    seen = queries[:, :, None] == keys[:, None, :]
    if also is not None:
        seen = seen & also
    seen = seen | ~seen.any(dim=2, keepdim=True)  # padding without padding to look at
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _check_positions(config: LanguageModelConfig, hf_config: PreTrainedConfig) -> None:
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


def _hf_config(
    config: LanguageModelConfig, place: Location | None, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedConfig:
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


def _load(
    config: LanguageModelConfig,
    place: Location | None,
    hf_config: PreTrainedConfig,
    device: torch.device,
) -> PreTrainedModel:
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


def _choose_learning(
    model: PreTrainedModel, config: LanguageModelConfig, new_from: int | None
) -> None:
    """Freeze what does not learn; `new_from` is the first token that the model has never seen."""
    if config.tune == "full":
        return
    parts = [model.base_model]
    if model.config.is_encoder_decoder:
        parts = [model.get_encoder(), model.get_decoder()]
    add_adapters(model, parts, config.lora, config.name)
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


__all__ = ["LanguageModel", "LanguageModelConfig", "ScratchConfig", "load_tokenizer", "located"]
