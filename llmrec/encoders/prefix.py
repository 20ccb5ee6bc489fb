"""The frozen lower part of a language model, run once per text; training runs the part above.

    STORE/<model>-states-<key>/     states.npy (tokens, H) of all texts end to end, bfloat16 as its
                                    bits in uint16; offsets.npy (n + 1,) where each text begins,
                                    tokens.npy (tokens,) its token ids, texts.npy (n, 32) the sha256
                                    of each text, states.json, manifest.json

The key covers what decides the states: model, revision, weights, prompt, token limit, number
formats, quantisation, item-text template, the layer, and the set of texts. Pooling and the closing
norm come later, so runs that differ in them share a cache. A catalogue has one folder, written
under a temporary name and never changed; every byte is compared with the manifest before use.

How the two parts run: `llmrec.encoders.halves`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from llmrec.encoders.halves import check_listed, only_lower, only_top, read_top
from llmrec.encoders.loading import EncoderConfig, locate
from llmrec.encoders.store import (
    ABANDONED_SECONDS,
    check_writable,
    encoder_folder,
    read_array,
    remedy,
    text_digest,
)
from llmrec.encoders.text import TextEncoder, in_memory, length_sorted
from llmrec.errors import UsageError
from llmrec.progress import progress_bar
from llmrec.runs import check_folder, new_folder

__all__ = ["CachedStates", "cache_states", "only_top", "read_top"]

CacheDtype = Literal["float32", "bfloat16", "float16"]
ON_DISK = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
"""numpy has no bfloat16: its bits are kept."""
STATES_METHOD = 1
"""To be raised when states are made or laid out otherwise than before."""


@dataclass(frozen=True)
class CachedStates:
    """The hidden states of a catalogue's texts after the frozen blocks, memory-mapped."""

    lengths: NDArray[np.int32]
    """(N,) tokens of each text in the catalogue's order; 0 where it is empty."""
    cost: dict[str, Any]
    """items, distinct texts, tokens, seconds and flops of all states, whenever they were made;
    encoded_now and tokens_now: texts and tokens that this call ran through the frozen blocks."""
    dtype: CacheDtype
    starts: NDArray[np.int64]
    """(N,) where a text's tokens begin; any place where it is empty."""
    tokens: NDArray[np.int32]
    """(tokens,) ids, texts end to end."""
    states: NDArray[Any]
    """(tokens, H)."""

    def ids(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Token ids of some items' texts, padded with 0 on the right, trimmed to the longest.

        Args:
            rows: (B,) rows of the catalogue, none without text.

        Returns:
            (B, T) int64 and (B, T) bool, False where padded.
        """
        places, real = self._places(rows)
        return torch.from_numpy(np.where(real, self.tokens[places], 0).astype(np.int64)), (
            torch.from_numpy(real)
        )

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """What `read_top` reads: states, ids and places of some items' texts, in their order.

        Args:
            rows: (B,) rows of the catalogue, none without text.

        Returns:
            (B, T, H) in the cache's number format, zero where padded; (B, T) int64; (B, T) bool.
        """
        places, real = self._places(rows)
        states = self.states[places]  # (B, T, H), a copy
        states[~real] = 0
        if self.dtype == "bfloat16":
            return torch.from_numpy(states.view(np.int16)).view(torch.bfloat16), *self.ids(rows)
        return torch.from_numpy(states), *self.ids(rows)

    def _places(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where tokens are on disk, (B, T), and which of them are the text's own."""
        lengths = self.lengths[rows]
        if not lengths.all():
            raise ValueError("an item without text has no states")
        steps = np.arange(lengths.max())
        real = steps < lengths[:, None]
        return np.where(real, self.starts[rows][:, None] + steps, 0), real


def cache_states(
    catalog_texts: list[str],
    encoder: TextEncoder,
    config: EncoderConfig,
    top: int,
    dtype: CacheDtype,
    limit_gigabytes: float,
    store: Path,
    template_sha256: str,
) -> CachedStates:
    """The states of a catalogue's texts below the highest blocks: read from the store, or made.

    Each distinct text runs once through the frozen blocks, in evaluation mode. Two processes that
    make the same at once do the work twice; what is there first stays.

    Args:
        catalog_texts: (N,), empty where an item has none.
        encoder: whole, its lower blocks as loaded; left in evaluation mode.
        config: what `encoder` was made from.
        top: blocks that stay out, at least 1 and fewer than there are.
        dtype: number format on disk. Only float32 (or that of the model) keeps what was computed.
        limit_gigabytes: largest size of the states, GB (10^9 bytes).
        store: folder of the embedding store.
        template_sha256: of the item-text template.

    Raises:
        UsageError: No text; an architecture that is not listed; too large; not finite; damaged; a
            store that cannot be written.
    """
    check_listed(encoder)
    below = len(encoder.blocks) - top
    if not 0 < below < len(encoder.blocks):
        raise ValueError(f"top={top} of {len(encoder.blocks)} blocks leaves none above or below")
    texts = {text_digest(text): text for text in catalog_texts if text}
    if not texts:
        raise UsageError(
            f"none of the {len(catalog_texts)} items has a text. Give an items file or a text "
            "column and name it in a data.item_text template, or use tower.name=id."
        )
    place = locate(config)
    if place.revision:
        config = replace(config, revision=place.revision)  # a branch may move meanwhile
    vectors_folder, description = encoder_folder(store, config, place, template_sha256)
    for later in ("layers", "final_norm", "pooling"):
        del description[later]
    description |= {
        "states_method": STATES_METHOD,
        "layer": below,
        "cache_dtype": dtype,
        "texts": hashlib.sha256("".join(sorted(texts)).encode()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    folder = store / f"{vectors_folder.name.rpartition('-')[0]}-states-{key}"
    made_now = not folder.exists()
    if made_now:
        _make(folder, texts, encoder, config, description, limit_gigabytes)
    return _open(
        folder, description, list(map(text_digest, catalog_texts)), limit_gigabytes, made_now
    )


def _make(
    folder: Path,
    texts: dict[str, str],
    encoder: TextEncoder,
    config: EncoderConfig,
    description: dict[str, Any],
    limit_gigabytes: float,
) -> None:
    """Run all texts (by digest) through the lower blocks and write the folder."""
    tokens = encoder.tokenize(list(texts.values()))
    lengths = np.array([len(ids) for ids in tokens], np.int32)
    model: Any = encoder.model
    width, dtype = model.config.get_text_config().hidden_size, description["cache_dtype"]
    _check_size(int(lengths.sum()), len(texts), width, dtype, limit_gigabytes)
    _sweep(folder)
    check_writable(folder)
    batches = list(length_sorted(lengths, encoder.config.batch_tokens))
    order = np.concatenate(batches)  # the order on disk: what is computed next is written next
    digests = [bytes.fromhex(digest) for digest in texts]
    began = time.perf_counter()
    try:
        with new_folder(folder) as new:
            np.save(new / "texts.npy", np.array([list(digests[n]) for n in order], np.uint8))
            np.save(new / "tokens.npy", np.concatenate([tokens[n] for n in order]).astype(np.int32))
            np.save(new / "offsets.npy", np.concatenate([[0], np.cumsum(lengths[order])]))
            with (new / "states.npy").open("wb") as file:
                _write_states(file, encoder, tokens, batches, (description["layer"], width, dtype))
            # Weights are memory-mapped: a model saved over this one now would speak as the old.
            if locate(config).identity != description["weights"]:
                raise UsageError(
                    f"encoder.model={config.model} was changed while it was being read. "
                    "Wait until it is saved and run this again."
                )
            facts = {
                "encoder": description,
                "parameters": _parameters(encoder, description["layer"]),
                "seconds": time.perf_counter() - began,
                "device": str(encoder.device),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            (new / "states.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    except UsageError:
        if not folder.exists():  # else another process has made the same meanwhile
            raise


def _check_size(tokens: int, texts: int, width: int, dtype: str, limit_gigabytes: float) -> None:
    """Refuse states beyond the limit, naming every way to fewer bytes."""
    size = tokens * width * np.dtype(ON_DISK[dtype]).itemsize / 1e9
    if size > limit_gigabytes:
        smaller = "encoder.cache_dtype bfloat16, " if dtype == "float32" else ""
        raise UsageError(
            f"cached states of {texts} texts with {tokens} tokens, width {width} in {dtype}, take "
            f"{size:.3g} GB, more than encoder.cache_gigabytes={limit_gigabytes:g}. Raise it, or "
            f"set {smaller}a smaller encoder.max_item_tokens, or encoder.cache_states false."
        )


def _write_states(
    file: IO[bytes],
    encoder: TextEncoder,
    tokens: list[list[int]],
    batches: list[NDArray[np.int64]],
    what: tuple[int, int, str],
) -> None:
    """Compute and write, one batch at a time, what is known beforehand to fill (tokens, H)."""
    below, width, dtype = what
    total = sum(map(len, tokens))
    about = {"descr": np.dtype(ON_DISK[dtype]).str, "fortran_order": False, "shape": (total, width)}
    np.lib.format.write_array_header_1_0(file, about)
    with only_lower(encoder, below) as read, progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("caching states of items", total=len(tokens))

        def rows_of(part: list[list[int]]) -> Tensor:
            ids, real = encoder.inputs(part)
            return read(ids, real)[real].cpu()

        for batch in batches:
            # (tokens of the batch, H), row by row
            states = in_memory(rows_of, [tokens[n] for n in batch])
            if not states.isfinite().all():
                raise UsageError(
                    f"encoder.model={encoder.config.model} gave states that are not finite in "
                    f"{encoder.config.dtype}. Use encoder.dtype=bfloat16 or float32."
                )
            kept = states.to(getattr(torch, dtype))
            if not kept.isfinite().all():
                raise UsageError(
                    f"a hidden state of {float(states.abs().max()):.3g} does not fit into "
                    f"encoder.cache_dtype={dtype}. Use bfloat16 or float32."
                )
            bits = kept.view(torch.int16) if dtype == "bfloat16" else kept
            file.write(bits.contiguous().numpy().data)
            progress.advance(task, len(batch))


def _parameters(encoder: TextEncoder, below: int) -> int:
    """Weights of the lowest blocks, in whatever format they are held."""
    weights = [w for block in list(encoder.blocks)[:below] for w in block.parameters()]
    return sum(
        w.quant_state.shape.numel() if hasattr(w, "quant_state") else w.numel()  # nf4: 2 in a byte
        for w in weights
    )


def _sweep(folder: Path) -> None:
    """Delete what killed processes left of these states; a younger one may be in the making."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):  # finished or swept by another process
            newest = max(part.stat().st_mtime for part in (path, *path.iterdir()))
            if time.time() - newest > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _open(
    folder: Path,
    description: dict[str, Any],
    digests: list[str],
    limit_gigabytes: float,
    made_now: bool,
) -> CachedStates:
    """The folder's states in the catalogue's order.

    Raises:
        UsageError: It is damaged, not what its name says, or larger than the limit.
    """
    check_folder(folder, remedy(folder))
    about_file, dtype = folder / "states.json", description["cache_dtype"]
    try:
        about = json.loads(about_file.read_text(encoding="utf-8"))
        seconds, parameters = float(about["seconds"]), int(about["parameters"])
        same = about["encoder"] == description
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{about_file} does not say what made its states. {remedy(folder)}"
        ) from error
    if not same:
        raise UsageError(f"{about_file} names other states than its folder. {remedy(folder)}")
    texts = read_array(folder / "texts.npy", np.uint8, ("n", 32))
    offsets = read_array(folder / "offsets.npy", np.int64, (len(texts) + 1,))
    tokens = read_array(folder / "tokens.npy", np.int32, (int(offsets[-1]),))
    states = read_array(folder / "states.npy", ON_DISK[dtype], (len(tokens), "H"))
    places = {text.tobytes().hex(): place for place, text in enumerate(texts)}
    _check_size(len(tokens), len(texts), states.shape[1], dtype, limit_gigabytes)
    empty = text_digest("")
    rows = np.array([-1 if digest == empty else places[digest] for digest in digests], np.int64)
    lengths = np.where(rows < 0, 0, np.diff(offsets)[rows]).astype(np.int32)
    cost = {
        "items": len(digests),
        "texts": len(texts),
        "tokens": len(tokens),
        "seconds": seconds,
        "flops": 2 * parameters * len(tokens),
        "encoded_now": len(texts) * made_now,
        "tokens_now": len(tokens) * made_now,
    }
    return CachedStates(lengths, cost, dtype, offsets[rows], tokens, states)
