"""The embedding store: a text is encoded once and its vector never taken for another encoder's.

    STORE/<model>-<key>/encoder.json    what made the vectors; the key is its hash
    STORE/<model>-<key>/shard-<id>/     texts.npy (n, 32) sha256 of each text, vectors.npy (n, H),
                                        tokens.npy (n,), shard.json, manifest.json

The key covers model, revision, weights, layers, final norm, pooling, token limit, number format and
item-text template; within it a vector is found by its text's hash. A shard is written under a
temporary name, never changed afterwards, and adds only texts that no earlier shard has, so
processes may read and write at the same time and a kill loses at most the shard in the making.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from llmrec.data.interactions import Catalog
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.encoders.text import EncoderConfig, Location, TextEncoder, locate
from llmrec.errors import UsageError, exit_code
from llmrec.options import parse
from llmrec.progress import progress_bar
from llmrec.runs import check_folder, new_folder, write_json

ABANDONED_SECONDS = 24 * 3600
"""Age after which a shard in the making belongs to no living process."""
SHARD_ITEMS = 50_000
"""Texts encoded between two writes: what a kill can cost."""


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
        UsageError: No text, an unreachable model, a damaged shard.
    """
    if not any(catalog.texts):
        raise UsageError(
            f"none of the {len(catalog)} items has a text. Give an items file or a text column and "
            "name it in a data.item_text template, or use tower.name=id."
        )
    digests = [_digest(text) for text in catalog.texts]
    wanted = {digest: text for digest, text in zip(digests, catalog.texts, strict=True) if text}
    folder, description = _folder(store, config, locate(config), catalog.template_sha256)
    known = {digest for shard in _shards(folder) for digest in shard.digests}
    missing = [digest for digest in wanted if digest not in known]
    if missing:
        _encode({digest: wanted[digest] for digest in missing}, folder, description, config, device)
    return _gather(digests, wanted, folder, len(missing))


@dataclass(frozen=True)
class _Shard:
    """One written piece of the store, checked against its manifest, its vectors memory-mapped."""

    digests: list[str]
    vectors: NDArray[np.float32]
    tokens: NDArray[np.int32]
    seconds: float


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _folder(
    store: Path, config: EncoderConfig, place: Location, template_sha256: str
) -> tuple[Path, dict[str, Any]]:
    """The folder of what this very encoder made, and the description that its key hashes."""
    options = asdict(config)
    del options["batch_tokens"]  # changes speed, not vectors
    description = options | {
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


def _shards(folder: Path) -> list[_Shard]:
    """All shards of an encoder's folder, oldest name first."""
    found = []
    for path in sorted(folder.glob("shard-*")):
        check_folder(path, f"Delete the folder {path}; its texts will be encoded again.")
        about = json.loads((path / "shard.json").read_text())
        digests = [row.tobytes().hex() for row in np.load(path / "texts.npy")]
        vectors = np.load(path / "vectors.npy", mmap_mode="r")
        found.append(_Shard(digests, vectors, np.load(path / "tokens.npy"), about["seconds"]))
    return found


def _encode(
    wanted: dict[str, str],
    folder: Path,
    description: dict[str, Any],
    config: EncoderConfig,
    device: torch.device,
) -> None:
    """Encode texts into new shards, with a progress bar on a terminal."""
    _sweep(folder)
    encoder = TextEncoder(config, device)
    about = description | {
        "layers_run": len(encoder.blocks),
        "layers_of_model": encoder.layer_count,
        "has_final_norm": encoder.has_final_norm,
        "non_embedding_parameters": encoder.non_embedding_parameters,
    }
    write_json(folder / "encoder.json", about)
    with progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("encoding items", total=len(wanted))
        digests = list(wanted)
        for start in range(0, len(digests), SHARD_ITEMS):
            part = digests[start : start + SHARD_ITEMS]
            began = time.perf_counter()
            vectors, tokens = encoder.encode(
                [wanted[digest] for digest in part], lambda count: progress.advance(task, count)
            )
            seconds = time.perf_counter() - began
            with new_folder(
                folder / f"shard-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
            ) as shard:
                np.save(
                    shard / "texts.npy", np.array([list(bytes.fromhex(d)) for d in part], np.uint8)
                )
                np.save(shard / "vectors.npy", vectors)
                np.save(shard / "tokens.npy", tokens)
                (shard / "shard.json").write_text(
                    json.dumps({"seconds": seconds, "device": str(device)})
                )


def _sweep(folder: Path) -> None:
    """Delete what killed processes left half made; younger ones may still be in the making."""
    for path in folder.glob(".shard-*"):
        with contextlib.suppress(FileNotFoundError):  # finished or swept by another process
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _gather(digests: list[str], wanted: dict[str, str], folder: Path, encoded: int) -> Encoded:
    """The catalogue's vectors from the shards, and their cost from what the shards recorded."""
    try:
        about = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        parameters = int(about["non_embedding_parameters"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{folder / 'encoder.json'} is missing or damaged. Delete the folder {folder}; its "
            "texts will be encoded again."
        ) from error
    rows = {digest: row for row, digest in enumerate(wanted)}
    table: NDArray[np.float32] | None = None
    done = np.zeros(len(rows), bool)
    tokens, seconds = 0, 0.0
    for shard in _shards(folder):
        pairs = [
            (rows[d], place)
            for place, d in enumerate(shard.digests)
            if d in rows and not done[rows[d]]
        ]
        if not pairs:
            continue
        targets, places = np.array(pairs).T
        if table is None:
            table = np.empty((len(rows), shard.vectors.shape[1]), np.float32)
        table[targets] = shard.vectors[places]
        done[targets] = True
        tokens += int(shard.tokens[places].sum())
        seconds += shard.seconds * len(places) / len(shard.digests)
    assert table is not None and done.all()
    table = np.concatenate(
        [table, np.zeros((1, table.shape[1]), np.float32)]
    )  # last row: empty text
    vectors = table[[rows.get(digest, -1) for digest in digests]]
    cost = {
        "items": len(digests),
        "texts": len(rows),
        "tokens": tokens,
        "seconds": seconds,
        "flops": 2 * parameters * tokens,
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
    config = parse(EmbedConfig, argv, "llmrec embed", description)
    dataset = load_dataset(config.data)
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
