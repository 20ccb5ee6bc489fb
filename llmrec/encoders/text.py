"""Any Hugging Face language model as a reader of item texts: text -> hidden states -> one vector.

A text's vector comes from the last layer that is run (`EncoderConfig.layers` drops the layers above
it, so a shallow reading is also a cheap one) and is pooled over the text's own tokens. An empty
text is never sent to the model: its vector is zero.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import get_max_memory
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as hf_logging

from llmrec.encoders.blockwise import BlocksOnDisk, load_without_blocks, model_class
from llmrec.encoders.loading import MINILM, EncoderConfig, Location, locate, with_own_reading
from llmrec.errors import UsageError

__all__ = [
    "MINILM",
    "EncoderConfig",
    "Location",
    "TextEncoder",
    "in_memory",
    "length_sorted",
    "locate",
    "out_of_memory",
]


class TextEncoder:
    """A loaded language model, cut to the layers asked for, with its tokeniser and pooling."""

    def __init__(self, config: EncoderConfig, device: torch.device) -> None:
        """Load the model.

        Raises:
            UsageError: Unreachable model, layer out of range, more tokens than the model reads.
        """
        place = locate(config)
        self.config = config = with_own_reading(config, place)
        """As given, but for ``auto`` pooling and ``name:`` prompts: what the model says instead."""
        self.device = device
        hf_logging.disable_progress_bar()
        revision = {"revision": place.revision} if place.revision else {}
        try:
            hf_config = AutoConfig.from_pretrained(place.source, **revision)
            self.tokenizer = AutoTokenizer.from_pretrained(place.source, **revision)
            self.layer_count = self._check(hf_config)
            self._load(place.source, hf_config, self._loading_options() | revision)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"encoder.model={config.model} cannot be loaded: {reason}") from error
        self.model.eval().requires_grad_(False)
        if hasattr(self.model.config, "use_cache"):
            self.model.config.use_cache = False  # a decoder would keep every layer's keys
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self._raw: Tensor | None = None
        hook = self.blocks[-1].register_forward_hook(self._keep_raw)
        self.has_final_norm = self._probe()
        """Whether the architecture changes the last layer's states before it returns them."""
        if config.final_norm:
            hook.remove()
        self._raw = None

    def _loading_options(self) -> dict[str, Any]:
        """What ``from_pretrained`` is told besides the place of the weights."""
        config, device = self.config, self.device
        dtype = getattr(torch, config.dtype)
        options: dict[str, Any] = {
            "dtype": dtype, "use_safetensors": True, "output_loading_info": True
        }  # fmt: skip
        if config.attention == "flash_attention_2":
            half = config.dtype != "float32"
            if not (half and device.type == "cuda" and is_flash_attn_2_available()):
                raise UsageError(
                    "encoder.attention=flash_attention_2 needs the package flash-attn, a CUDA "
                    "device and encoder.dtype=bfloat16 or float16. Use encoder.attention=sdpa."
                )
        if config.attention != "auto":
            options["attn_implementation"] = config.attention
        if config.placement == "spread":
            limits = get_max_memory()
            if device.type == "cpu":
                limits = {"cpu": limits["cpu"]}
            options |= {"device_map": "auto", "max_memory": limits}
        elif config.quantisation != "none":
            options["device_map"] = {"": device}
        # It would say at every layer of every batch that int8 multiplies in float16.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if config.quantisation == "nf4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        elif config.quantisation == "int8":
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        return options

    def _load(self, source: str, hf_config: PreTrainedConfig, options: dict[str, Any]) -> None:
        """Set `model`, `blocks` and `on_disk`."""
        config = self.config
        weights = None
        if config.placement == "blocks":
            whole, info, weights = load_without_blocks(
                source, hf_config, self._parts, self.device, options
            )
        else:
            whole, info = model_class(hf_config).from_pretrained(source, **options)
        self.model, self.blocks = self._parts(whole)
        self._check_complete(whole, set(info["missing_keys"]))
        if config.layers != "all":
            del self.blocks[config.layers :]
        if config.quantisation != "none":
            check_quantised(self.model, f"encoder.quantisation={config.quantisation}")
        self.on_disk: BlocksOnDisk | None = None
        """The blocks, where they are read one at a time (placement=blocks)."""
        if weights is not None:
            self.on_disk = BlocksOnDisk(whole, self.blocks, weights, self.device, config.model)
        elif "device_map" not in options:
            self.model.to(self.device)

    def _parts(self, whole: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
        """The part of a model that reads text, and its transformer layers."""
        model = whole
        if hasattr(whole, "encoder") and isinstance(whole.encoder, PreTrainedModel):
            model = whole.encoder  # of an encoder-decoder; its decoder reads no text here
        return model, _blocks(model, self.layer_count, self.config.model)

    def _check_complete(self, whole: nn.Module, missing: set[str]) -> None:
        """Refuse a model whose layers or tables would start from noise; a pooler's may."""
        read = [m for m in self.model.modules() if isinstance(m, nn.Embedding)] + [*self.blocks]
        weights = {id(weight) for module in read for weight in module.parameters()}
        names = [n for n, w in whole.named_parameters() if n in missing and id(w) in weights]
        if names:
            raise UsageError(
                f"encoder.model={self.config.model} lacks weights ({names[0]}). "
                "Save it again with save_pretrained."
            )

    def _check(self, hf_config: PreTrainedConfig) -> int:
        """Options against the model's own limits; returns its number of layers."""
        config = self.config
        text_config = hf_config.get_text_config()
        if not hasattr(text_config, "num_hidden_layers"):
            raise UsageError(
                f"encoder.model={config.model} is of type {hf_config.model_type}, which has no "
                "transformer layers over text. Use a language model."
            )
        depth: int = text_config.num_hidden_layers
        if config.layers != "all" and not 1 <= config.layers <= depth:
            raise UsageError(
                f"encoder.layers={config.layers} but {config.model} has {depth}. "
                f"Use 1..{depth} or leave it out."
            )
        longest = self.tokenizer.model_max_length
        if hasattr(text_config, "max_position_embeddings"):
            longest = min(longest, text_config.max_position_embeddings)
        shortest = self.tokenizer.num_special_tokens_to_add() + 1
        if not shortest <= config.max_item_tokens <= longest:
            raise UsageError(
                f"encoder.max_item_tokens={config.max_item_tokens} but {config.model} "
                f"reads from {shortest} (special tokens and one more) to at most {longest}."
            )
        room = config.max_item_tokens - len(self.tokenizer(config.prompt)["input_ids"])
        if config.prompt and room < 1:
            raise UsageError(
                f"encoder.prompt leaves nothing of encoder.max_item_tokens={config.max_item_tokens}"
                f" for the text. Use at least {config.max_item_tokens - room + 1}."
            )
        return depth

    def _probe(self) -> bool:
        """Read one text of the greatest length; whether a final norm (or projection) changed it."""
        length = self.config.max_item_tokens
        ids = np.resize(np.asarray(self.tokenize(["a"])[0], dtype=np.int64), (1, length))
        text = torch.from_numpy(ids).to(self.device)
        try:
            with torch.inference_mode():
                states = self._states(text, torch.ones_like(text, dtype=torch.bool), final=True)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise UsageError(
                f"encoder.model={self.config.model} cannot read a text of {length} tokens alone "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Lower "
                "encoder.max_item_tokens or use another model."
            ) from error
        assert self._raw is not None
        return states.shape != self._raw.shape or not torch.equal(states, self._raw)

    def _keep_raw(
        self, module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]
    ) -> None:
        self._raw = output if isinstance(output, Tensor) else output[0]

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters of the layers that run, without token, position and type embeddings."""
        tables = {
            id(w)
            for m in self.model.modules()
            if isinstance(m, nn.Embedding)
            for w in m.parameters()
        }
        packed = {}
        if self.config.quantisation == "nf4":  # two weights in a byte
            from bitsandbytes.nn import Linear4bit

            packed = {
                id(m.weight): m.in_features * m.out_features
                for m in self.model.modules()
                if isinstance(m, Linear4bit)
            }
        return sum(
            packed.get(id(w), w.numel()) for w in self.model.parameters() if id(w) not in tables
        )

    def encode(
        self,
        texts: list[str],
        advance: Callable[[float], object] = lambda count: None,
        scratch: Path | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Vectors and token counts of texts, in their order.

        Args:
            texts: n texts; an empty one gets the zero vector and 0 tokens.
            advance: Called with the number of texts done in each forward pass; of a pass through
                one block alone (placement=blocks), with its share of them.
            scratch: Folder for a temporary one with the states between blocks (placement=blocks);
                the system's if not given.

        Returns:
            (n, H) float32 and (n,) int32.

        Raises:
            UsageError: No text, a value that is not finite, or one vector for different tokens.
        """
        filled = [row for row, text in enumerate(texts) if text]
        tokens = self.tokenize([texts[row] for row in filled])
        lengths = np.zeros(len(texts), np.int32)
        lengths[filled] = [len(ids) for ids in tokens]
        vectors: NDArray[np.float32] | None = None
        batches = list(length_sorted(lengths[filled], self.config.batch_tokens))
        share = 1 if self.on_disk is None else 1 / len(self.blocks)

        def read_batch(number: int) -> Tensor:
            def pooled(part: list[list[int]]) -> Tensor:
                with torch.inference_mode():
                    return self.read(*self.inputs(part))

            return in_memory(pooled, [tokens[place] for place in batches[number]])

        def done(number: int) -> None:
            advance(len(batches[number]) * share)

        read: Callable[[int], Tensor] = read_batch
        with contextlib.ExitStack() as stack:
            if self.on_disk is not None and batches:
                sizes = [len(batch) * int(lengths[filled][batch].max()) for batch in batches]
                folder = scratch or Path(tempfile.gettempdir())
                read = stack.enter_context(self.on_disk.sweep(read_batch, sizes, folder, done))
            for number, batch in enumerate(batches):
                pooled = read(number)
                if vectors is None:
                    vectors = np.zeros((len(texts), pooled.shape[1]), np.float32)
                vectors[[filled[place] for place in batch]] = pooled.cpu().numpy()
                done(number)
        if vectors is None:
            raise UsageError(
                "no item has a text to encode. Check data.item_text and the items file's columns."
            )
        if not np.isfinite(vectors).all():
            raise UsageError(
                f"encoder.model={self.config.model} gave values that are not finite in "
                f"{self.config.dtype}. Use encoder.dtype=bfloat16 or float32."
            )
        same = all(np.array_equal(vectors[row], vectors[filled[0]]) for row in filled)
        if same and len(set(map(tuple, tokens))) > 1:  # not texts: Hat and hat may be one to it
            raise UsageError(
                f"encoder.model={self.config.model} gave every text the same vector: with "
                f"encoder.pooling={self.config.pooling} and encoder.max_item_tokens="
                f"{self.config.max_item_tokens} it sees nothing of them. Use pooling mean or last."
            )
        return vectors, lengths

    def inputs(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids of some texts and which of them are real, (B, T) each, on the device."""
        lengths = np.array([len(ids) for ids in tokens])
        real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(real.shape, self.tokenizer.pad_token_id or 0, np.int64)
        ids[real] = np.concatenate(tokens)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(real).to(self.device)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, prompt and special tokens included, at least one each."""
        if not texts:
            return []
        tokens: list[list[int]] = self.tokenizer(
            [self.config.prompt + text for text in texts],
            truncation=True,
            max_length=self.config.max_item_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [ids or [self.tokenizer.unk_token_id or 0] for ids in tokens]

    def read(self, ids: Tensor, real: Tensor) -> Tensor:
        """Vectors of texts given as tokens, with gradients where any are wanted.

        Args:
            ids: (B, T) token ids, padded on the right.
            real: (B, T) bool, False where padded.

        Returns:
            (B, H) float32.
        """
        vectors = self._pool(self._states(ids, real, self.config.final_norm), real)
        self._raw = None  # with it, a whole step's graph would stay
        return vectors

    def _states(self, ids: Tensor, real: Tensor, final: bool) -> Tensor:
        """Token states of the last layer that runs, (B, T, H), with or without the final norm."""
        output = self.model(input_ids=ids, attention_mask=None if real.all() else real)
        states: Tensor | None = output.last_hidden_state if final else self._raw
        assert states is not None
        return states.to(ids.device)  # the last layer may be on another (placement=spread)

    def _pool(self, states: Tensor, real: Tensor) -> Tensor:
        """(B, T, H) and (B, T) -> (B, H) float32; texts start at column 0."""
        states = states.float()
        if self.config.pooling == "cls":
            return states[:, 0]
        if self.config.pooling == "last":
            return states[torch.arange(len(states), device=states.device), real.sum(1) - 1]
        weights = real.float()
        if self.config.pooling == "weighted_mean":
            weights = weights * torch.arange(1, real.shape[1] + 1, device=states.device)
        return torch.bmm(weights[:, None], states)[:, 0] / weights.sum(1, keepdim=True)


def check_quantised(model: nn.Module, option: str) -> None:
    """Refuse a model without a quantised layer, and keep such layers exact; see the comment."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # seconds, and seldom needed

    packed = [m for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    if not packed:
        raise UsageError(f"{option} finds no linear layer to quantise in this model. Leave it out.")
    for module in packed:
        # On CPUs with AVX512-BF16 its eval mode would round the scales to bfloat16 for good,
        # multiply in bfloat16 whatever the number format, and lose all gradients from then on.
        module.support_avx512bf16_for_cpu = False


def _blocks(model: nn.Module, depth: int, name: str) -> nn.ModuleList:
    """The list of a model's transformer layers, whatever the architecture calls it."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UsageError(
        f"encoder.model={name} keeps its {depth} layers in no list that llmrec can find."
        " Use another model, one whose layers do not share their weights."
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def in_memory(read: Callable[[list[list[int]]], Tensor], tokens: list[list[int]]) -> Tensor:
    """What `read` makes of texts, one after the other; of halves of them where memory runs out.

    Raises:
        UsageError: A single text does not fit.
    """
    try:
        return read(tokens)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    if len(tokens) == 1:
        raise UsageError(
            "memory does not even suffice for one item text at a time. Lower "
            "encoder.max_item_tokens, or use a smaller model."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(tokens) // 2
    return torch.cat([in_memory(read, tokens[:half]), in_memory(read, tokens[half:])])


def length_sorted(lengths: NDArray[np.int32], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Places of texts in batches of similar length, longest first, so that little is padded.

    The longest batch runs first: what does not fit in memory fails at once, not after an hour.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size
