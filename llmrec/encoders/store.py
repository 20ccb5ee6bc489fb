"""The embedding store: a text is encoded once and its vector never taken for another encoder's.

    STORE/<model>-<key>/shard-<id>/     texts.npy (n, 32) sha256 of each text, vectors.npy (n, H),
                                        tokens.npy (n,), shard.json, manifest.json

The key covers model, revision, weights, layers, final norm, pooling, prompt, token limit, number
format, quantisation and item-text template; every shard.json repeats in full what made its vectors,
and a shard that says otherwise than its folder's key is refused. Within a key a vector is found by
its text's hash. A shard is written under a temporary name and never changed afterwards, so
processes may read and write at the same time (what two encode at once is there twice, and the first
is read) and a kill loses at most the shard in the making. Every byte of a shard is compared with
its manifest's sha256 before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import DTypeLike, NDArray
from rich.console import Console

from llmrec.data.interactions import Catalog
from llmrec.data.readers import DataConfig, effective, load_dataset
from llmrec.encoders.loading import EncoderConfig, Location, locate, with_own_reading
from llmrec.encoders.text import TextEncoder
from llmrec.errors import UsageError, exit_code
from llmrec.options import parse
from llmrec.progress import progress_bar
from llmrec.runs import check_folder, new_folder

ABANDONED_SECONDS = 24 * 3600
"""Age after which a shard in the making belongs to no living process."""
SHARD_ITEMS = 50_000
"""Texts encoded between two writes: what a kill can cost."""
METHOD = 1
"""To be raised when this package reads a text otherwise than before, or lays out shards anew."""


@dataclass(frozen=True)
class Encoded:
    """The vectors of a catalogue's texts and what they cost, now or when they were made."""

    vectors: NDArray[np.float32]
    """(N, H), in the catalogue's order; zero where the text is empty."""
    encoder: dict[str, Any]
    """What made them: model, revision, weights, layers, pooling, parameters."""
    cost: dict[str, Any]
    """items, tokens, seconds, flops of all these vectors; items encoded in this call."""


def encode_catalog(
    catalog: Catalog, config: EncoderConfig, store: Path, device: torch.device
) -> Encoded:
    """Vectors of all item texts: those in the store are read, the others encoded and added.

    Raises:
        UsageError: No text, an unreachable model, a damaged shard, a store that cannot be written.
    """
    if not any(catalog.texts):
        raise UsageError(
            f"none of the {len(catalog)} items has a text. Give an items file or a text column and "
            "name it in a data.item_text template, or use tower.name=id."
        )
    digests = [text_digest(text) for text in catalog.texts]
    wanted = {digest: text for digest, text in zip(digests, catalog.texts, strict=True) if text}
    place = locate(config)
    if place.revision:
        config = replace(config, revision=place.revision)  # a branch may move before it is loaded
    folder, description = encoder_folder(store, config, place, catalog.template_sha256)
    shards = _shards(folder, description)
    known = {digest for shard in shards for digest in shard.digests}
    missing = {digest: text for digest, text in wanted.items() if digest not in known}
    if missing:
        _encode(missing, folder, description, config, device)
        shards = _shards(folder, description)
    return _gather(digests, wanted, shards, len(missing))


@dataclass(frozen=True)
class _Shard:
    """One written piece of the store, checked against its manifest, its vectors memory-mapped."""

    path: Path
    digests: list[str]
    vectors: NDArray[np.float32]
    tokens: NDArray[np.int32]
    encoder: dict[str, Any]
    seconds: float


def text_digest(text: str) -> str:
    """What a text is found by."""
    return hashlib.sha256(text.encode()).hexdigest()


def encoder_folder(
    store: Path, config: EncoderConfig, place: Location, template_sha256: str
) -> tuple[Path, dict[str, Any]]:
    """The folder of what this very encoder made, and the description that its key hashes.

    The weights' identity covers every file of the model's folder: config, tokeniser, and what
    sentence-transformers reads of pooling and prompts, though only `EncoderConfig` decides these
    here: the description names the pooling and prompt that ``auto`` and ``name:`` came to. Not in
    the key, for they move a vector by rounding alone: the device (a store filled on a GPU is read
    without one), the placement of weights, the attention kernel, the batch a text was in, and the
    versions of torch and transformers. A shard records device and versions.
    """
    options = asdict(with_own_reading(config, place))
    for name in ("batch_tokens", "attention", "placement"):
        del options[name]
    for name, default in (("prompt", ""), ("quantisation", "none")):
        if options[name] == default:  # a store filled before there was the option stays valid
            del options[name]
    description = options | {
        "method": METHOD,
        "revision": place.revision,
        "weights": place.identity,
        "template_sha256": template_sha256,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(
        r"[^A-Za-z0-9._-]+",
        "-",
        Path(config.model).name if Path(config.model).is_dir() else config.model,
    )
    return store / f"{name}-{key}", description


def _shards(folder: Path, description: dict[str, Any]) -> list[_Shard]:
    """All shards of an encoder's folder, oldest name first, every byte checked."""
    shards = [_read_shard(path, description) for path in sorted(folder.glob("shard-*"))]
    for shard in shards:
        width, expected = shard.vectors.shape[1], shards[0].vectors.shape[1]
        if width != expected:
            raise UsageError(
                f"{shard.path / 'vectors.npy'} holds vectors of width {width}, "
                f"{shards[0].path.name} of width {expected}. {remedy(folder)}"
            )
    return shards


def remedy(folder: Path) -> str:
    """What helps against damage in a folder of the store."""
    return f"Delete the folder {folder}; its texts will be encoded again."


def _read_shard(path: Path, description: dict[str, Any]) -> _Shard:
    """A shard whose bytes are those of its manifest and whose parts belong together.

    Raises:
        UsageError: They do not; names the file and the remedy.
    """
    check_folder(path, remedy(path))
    try:
        about = json.loads((path / "shard.json").read_text(encoding="utf-8"))
        encoder, seconds = about["encoder"], float(about["seconds"])
        other = [name for name, value in description.items() if encoder[name] != value]
        int(encoder["non_embedding_parameters"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{path / 'shard.json'} does not say what made its vectors. {remedy(path)}"
        ) from error
    if other:
        raise UsageError(
            f"{path / 'shard.json'} names another encoder than its folder ({', '.join(other)}). "
            f"{remedy(path)}"
        )
    texts = read_array(path / "texts.npy", np.uint8, ("n", 32))
    return _Shard(
        path,
        [row.tobytes().hex() for row in texts],
        read_array(path / "vectors.npy", np.float32, (len(texts), "H")),
        read_array(path / "tokens.npy", np.int32, (len(texts),)),
        encoder,
        seconds,
    )


def read_array(file: Path, dtype: DTypeLike, shape: tuple[int | str, ...]) -> NDArray[Any]:
    """A memory-mapped array of this type and shape; a letter stands for any length.

    Raises:
        UsageError: The file holds something else.
    """
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError) as error:  # the latter also for a pickle, which is never loaded
        raise UsageError(f"{file} is missing or no array. {remedy(file.parent)}") from error
    fits = len(array.shape) == len(shape) and all(
        isinstance(want, str) or have == want
        for have, want in zip(array.shape, shape, strict=False)
    )
    if array.dtype != dtype or not fits:
        wanted = f"{np.dtype(dtype)} ({', '.join(map(str, shape))})"
        raise UsageError(
            f"{file} holds {array.dtype} {array.shape}, not {wanted}. {remedy(file.parent)}"
        )
    return array


def _encode(
    wanted: dict[str, str],
    folder: Path,
    description: dict[str, Any],
    config: EncoderConfig,
    device: torch.device,
) -> None:
    """Encode texts into new shards, with a progress bar on a terminal."""
    _sweep(folder)
    check_writable(folder)
    encoder = TextEncoder(config, device)
    about = description | {
        "layers_run": len(encoder.blocks),
        "layers_of_model": encoder.layer_count,
        "has_final_norm": encoder.has_final_norm,
        "non_embedding_parameters": encoder.non_embedding_parameters,
    }
    made_with = {
        "device": str(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("encoding items", total=len(wanted))
        digests = list(wanted)
        for start in range(0, len(digests), SHARD_ITEMS):
            part = digests[start : start + SHARD_ITEMS]
            began = time.perf_counter()
            vectors, tokens = encoder.encode(
                [wanted[digest] for digest in part],
                lambda count: progress.advance(task, count),
                scratch=folder,
            )
            seconds = time.perf_counter() - began
            # Weights are memory-mapped: a model saved over this one now would speak as the old.
            if locate(config).identity != description["weights"]:
                raise UsageError(
                    f"encoder.model={config.model} was changed while it was being read. "
                    "Wait until it is saved and run this again."
                )
            with new_folder(
                folder / f"shard-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
            ) as shard:
                np.save(
                    shard / "texts.npy", np.array([list(bytes.fromhex(d)) for d in part], np.uint8)
                )
                np.save(shard / "vectors.npy", vectors)
                np.save(shard / "tokens.npy", tokens)
                facts = {"encoder": about, "seconds": seconds} | made_with
                (shard / "shard.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Learn it before the model is read, and leave nothing behind: that may refuse too."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryDirectory(dir=there, prefix=".shard-probe-").cleanup()
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror or error}). "
            "Free some space or name another folder for the store."
        ) from error


def _sweep(folder: Path) -> None:
    """Delete what killed processes left half made; younger ones may still be in the making."""
    for path in folder.glob(".shard-*"):
        with contextlib.suppress(FileNotFoundError):  # finished or swept by another process
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _gather(
    digests: list[str], wanted: dict[str, str], shards: list[_Shard], encoded: int
) -> Encoded:
    """The catalogue's vectors from the shards, and their cost from what the shards recorded."""
    rows = {digest: row for row, digest in enumerate(wanted)}
    # One row more: the last stands for the empty text.
    table = np.zeros((len(rows) + 1, shards[0].vectors.shape[1]), np.float32)
    about = shards[0].encoder
    done = np.zeros(len(rows), bool)
    tokens, seconds = 0, 0.0
    for shard in shards:
        pairs = [
            (rows[d], place)
            for place, d in enumerate(shard.digests)
            if d in rows and not done[rows[d]]
        ]
        if not pairs:
            continue
        targets, places = np.array(pairs).T
        table[targets] = shard.vectors[places]
        done[targets] = True
        tokens += int(shard.tokens[places].sum())
        seconds += shard.seconds * len(places) / len(shard.digests)
    assert done.all()
    vectors = table[[rows.get(digest, -1) for digest in digests]]
    cost = {
        "items": len(digests),
        "texts": len(rows),
        "tokens": tokens,
        "seconds": seconds,
        "flops": 2 * int(about["non_embedding_parameters"]) * tokens,
        "encoded_now": encoded,
    }
    return Encoded(vectors, about, cost)


@dataclass(frozen=True)
class EmbedConfig:
    """Fill the embedding store with a data set's item texts."""

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    store: str = "cache/embeddings"
    """Folder of the embedding store."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""


def pick_device(name: str) -> torch.device:
    """The torch device that ``auto`` or an explicit name means."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={name} is not usable here. Use auto or cpu.") from error


def embed(argv: Sequence[str]) -> int:
    """Encode what the store lacks and say what it now holds."""
    description = (
        "Encode item texts into the embedding store; only new or changed ones are encoded."
    )
    config, given = parse(EmbedConfig, argv, "llmrec embed", description)
    data = effective(config.data, given)
    dataset = load_dataset(data)
    encoded = encode_catalog(
        dataset.catalog, config.encoder, Path(config.store), pick_device(config.device)
    )
    about, cost = encoded.encoder, encoded.cost
    norm = "no final norm in this architecture"
    if about["has_final_norm"]:
        norm = "final norm in" if about["final_norm"] else "final norm left out"
    empty = sum(not text for text in dataset.catalog.texts)
    Console().print(
        f"{dataset.name}: {cost['items']} items, {empty} without text, "
        f"{cost['texts']} distinct texts; {cost['encoded_now']} encoded now, "
        f"{cost['texts'] - cost['encoded_now']} from the store.\n"
        f"{about['model']}, layer {about['layers_run']} of {about['layers_of_model']}, {norm}, "
        f"{about['pooling']} pooling: vectors of width {encoded.vectors.shape[1]}, "
        f"{cost['tokens']} tokens.",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def main(argv: Sequence[str]) -> int:
    """``llmrec embed``."""
    return exit_code(embed, argv)
