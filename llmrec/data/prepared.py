"""``llmrec data prepare``: read a source once, and keep the result for any number of runs.

The folder is written under a temporary name and appears whole or not at all. Its layout, and how it
is opened when it is named as ``data.source``, stand in `llmrec.data.readers.prepared`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console

import llmrec
from llmrec.data.interactions import Dataset, Strings
from llmrec.data.readers import DataConfig, find_source, load_dataset
from llmrec.data.readers.prepared import ABOUT, ARRAYS, CATALOG, FIELD, FORMAT, REVIEWS, USERS
from llmrec.errors import UsageError, exit_code
from llmrec.options import parse
from llmrec.runs import new_folder, sha256_of, write_json

SOURCE_SUFFIXES = (".csv", ".tsv", ".parquet", ".inter", ".item")
"""Of the files that a reader may take interactions and items from."""


@dataclass(frozen=True)
class PrepareConfig:
    """Read a data set once and keep it as arrays."""

    data: DataConfig = field(default_factory=DataConfig)
    out: str = ""
    """Folder to write, which must not exist yet; name it as data.source afterwards."""


def prepare(argv: Sequence[str]) -> int:
    """Read, write, and say what came of it."""
    description = "Read a data set once; the folder written opens at once as data.source."
    config, _ = parse(PrepareConfig, argv, "llmrec data prepare", description)
    if not config.out:
        raise UsageError("--out is missing. Name the folder to write, such as --out prepared/mine.")
    out = Path(config.out)
    _refuse_existing(out)  # before anything costly
    dataset = load_dataset(config.data)
    write_prepared(out, dataset, config.data)
    Console().print(_report(out, dataset), highlight=False, markup=False, soft_wrap=True)
    return 0


def write_prepared(out: Path, dataset: Dataset, config: DataConfig) -> None:
    """Write a data set as a prepared folder.

    Args:
        out: The folder, which must not exist yet.
        dataset: What the source gave.
        config: The options it was read with.

    Raises:
        UsageError: The folder exists or cannot be written, or the data comes from such a folder.
    """
    if dataset.prepared_with is not None:
        raise UsageError(
            f"data.source={config.source} is prepared already. Prepare from what it was made of, "
            f"data.source={dataset.prepared_with['source']}, or copy the folder."
        )
    _refuse_existing(out)
    found = {name: getattr(dataset.interactions, name) for name in ARRAYS}
    arrays = {name: array for name, array in found.items() if array is not None}
    catalog, fingerprint, options = dataset.catalog, dataset.fingerprint(), asdict(config)
    both = json.dumps([fingerprint, options], sort_keys=True)
    about = {
        "format": FORMAT,
        "name": dataset.name,
        "order": dataset.order,
        "users": len(dataset.user_ids),
        "items": dataset.item_count,
        "interactions": len(dataset.interactions.items),
        "counts": dataset.counts,
        "arrays": list(arrays),
        "reviews": list(dataset.reviews),
        "template_sha256": catalog.template_sha256,
        "fingerprint": fingerprint,
        "fingerprint_with_options": hashlib.sha256(both.encode()).hexdigest(),
        "prepared_with": options,
        "source_files": _source_files(config),
        "llmrec": llmrec.__version__,
    }
    fields = {f"{FIELD}{name}": values for name, values in catalog.fields.items()}
    with new_folder(out) as folder:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        _write_table(folder / CATALOG, {"id": catalog.ids, "text": catalog.texts, **fields})
        _write_table(folder / USERS, {"id": dataset.user_ids})
        if dataset.reviews:
            _write_table(folder / REVIEWS, dataset.reviews)
        write_json(folder / ABOUT, about)


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UsageError(f"--out {out} exists already. Name another folder, or delete that one.")


def _source_files(config: DataConfig) -> dict[str, str]:
    """Name -> sha256 of the files that the source may have been read from."""
    if config.source == "simulated":
        return {}
    path = find_source(config.source)
    beside = path.iterdir() if path.is_dir() else (path, path.with_suffix(".item"))
    files = sorted(file for file in beside if file.suffix in SOURCE_SUFFIXES and file.is_file())
    return {file.name: sha256_of(file) for file in files}


def _write_table(file: Path, columns: Mapping[str, list[str] | Strings]) -> None:
    buffer = io.BytesIO()  # a full disk is then the file system's error, not one of polars' own
    pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)).write_parquet(buffer)
    file.write_bytes(buffer.getvalue())


def _report(out: Path, dataset: Dataset) -> str:
    counts = dataset.counts
    told = {"users", "items", "interactions", "items_with_empty_text"}
    found = [  # whatever a reader or filter dropped, repaired or noticed
        f"{count:,} {name.replace('_', ' ')}"
        for name, count in counts.items()
        if count and name not in told and not name.endswith("_read")
    ]
    return (
        f"{dataset.name}: {counts['users']:,} users, {counts['items']:,} items "
        f"({counts['items_with_empty_text']:,} without text), {counts['interactions']:,} "
        f"interactions ordered by {dataset.order}; fingerprint {dataset.fingerprint()[:12]}.\n"
        f"{'; '.join(found) or 'Nothing was dropped or repaired'}.\n"
        f"Written to {out}; use it with --data.source {out}."
    )


def main(argv: Sequence[str]) -> int:
    """``llmrec data prepare``."""
    return exit_code(prepare, argv)
