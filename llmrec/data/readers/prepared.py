"""A prepared folder: a data set read once and kept as arrays, written by ``llmrec data prepare``.

    items.npy offsets.npy        always; timestamps.npy, ratings.npy where the data has them
    catalog.parquet              a row per item: id, text, and field:NAME for each raw field
    users.parquet                a row per user: id
    reviews.parquet              where users wrote something: a row per interaction, a column per
                                 kind of text; read when it is asked for
    dataset.json                 everything else, and the options the data was prepared with
    manifest.json                sha256 of each file, compared on every opening

Arrays are memory-mapped, so processes on one machine share them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.data.interactions import Catalog, Dataset, Interactions, Strings
from llmrec.data.item_text import load_template
from llmrec.data.readers.config import DataConfig
from llmrec.data.simulated import SimulatedConfig
from llmrec.errors import UsageError
from llmrec.runs import MANIFEST, check_folder

FORMAT = 1
"""Version of the layout; a folder of another version is refused."""
ABOUT, CATALOG, USERS = "dataset.json", "catalog.parquet", "users.parquet"
REVIEWS = "reviews.parquet"
ARRAYS = {"items": np.int32, "offsets": np.int64, "timestamps": np.int64, "ratings": np.float32}
"""Attribute of `Interactions`, which also names the file -> its number type."""
FIELD = "field:"
"""Before a raw field's name in the catalogue, where `id` and `text` may be names of fields too."""


def is_prepared(path: Path) -> bool:
    """Whether a folder is, or before it lost a file was, a prepared one."""
    # Two of three: a damaged one is told so, and a source that holds its own manifest.json is not.
    return sum((path / name).is_file() for name in (ABOUT, MANIFEST, "items.npy")) >= 2


def open_prepared(path: Path, config: DataConfig) -> Dataset:
    """The data set that was prepared into a folder, equal to what its source gave.

    Args:
        path: The folder.
        config: The options asked for now; each is left at its default or equals the one the data
            was prepared with.

    Raises:
        UsageError: A file is missing, damaged or of another version, or an option disagrees.
    """
    remedy = (
        f"Delete {path} and prepare it again with llmrec data prepare --data.source SOURCE "
        f"--out {path}."
    )
    check_folder(path, remedy)
    about = _about(path, remedy)
    _refuse_other_options(path, about, config)
    sizes = {name: about["interactions"] for name in ARRAYS} | {"offsets": about["users"] + 1}
    arrays = {name: _array(path, name, sizes[name], remedy) for name in about["arrays"]}
    items = _table(path / CATALOG, about["items"], remedy)
    fields = {n.removeprefix(FIELD): values for n, values in items.items() if n.startswith(FIELD)}
    dataset = Dataset(
        name=about["name"],
        interactions=Interactions(**arrays),
        catalog=Catalog(items["id"], fields, items["text"], about["template_sha256"]),
        user_ids=_table(path / USERS, about["users"], remedy)["id"],
        counts=about["counts"],
        order=about["order"],
        reviews=_Reviews(path / REVIEWS, about.get("reviews", []), about["interactions"], remedy),
        prepared_with=about["prepared_with"],
    )
    return dataset.with_fingerprint(about["fingerprint"])  # the manifest vouches for it


class _Reviews(Mapping[str, Strings]):
    """The columns of ``reviews.parquet``, each read at its first use: most runs read none."""

    def __init__(self, file: Path, names: Sequence[str], rows: int, remedy: str) -> None:
        self._file, self._names, self._rows, self._remedy = file, names, rows, remedy
        self._read: dict[str, Strings] = {}

    def __getitem__(self, name: str) -> Strings:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            column = _frame(self._file, self._rows, self._remedy, [name])[name]
            self._read[name] = column.to_numpy()
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def prepared_config(path: Path, config: DataConfig, given: Set[str]) -> DataConfig:
    """The options that a folder was prepared with, as those of a run that names the folder.

    Args:
        path: The folder.
        config: The options asked for now.
        given: Those that were named, such as ``data.item_text``; the others are at their default.

    Raises:
        UsageError: A named option disagrees.
    """
    prepared = _about(path, "Prepare it again.")["prepared_with"]
    asked = asdict(config)
    for name, value, before in _differing(asked, asked, prepared, "data."):
        if name in given and name != "data.source":
            raise _disagreement(name, value, path, before)
    simulated = SimulatedConfig(**prepared["simulated"])
    return DataConfig(**prepared | {"simulated": simulated, "source": config.source})


def _disagreement(name: str, value: object, path: Path, before: object) -> UsageError:
    return UsageError(
        f"{name}={value} but {path} was prepared with {before}. Leave it out, or prepare the "
        "data again with it."
    )


def _about(path: Path, remedy: str) -> dict[str, Any]:
    """What ``dataset.json`` says."""
    try:
        about: dict[str, Any] = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        version = about["format"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(f"{path / ABOUT} is damaged. {remedy}") from None
    if version != FORMAT:
        raise UsageError(
            f"{path / ABOUT} has format {version}, and this version of llmrec reads {FORMAT}. "
            f"{remedy}"
        )
    return about


def _refuse_other_options(path: Path, about: Mapping[str, Any], config: DataConfig) -> None:
    given, default, prepared = asdict(config), asdict(DataConfig()), about["prepared_with"]
    del given["source"]
    for name, value, before in _differing(given, default, prepared, "data."):
        if value != _at(default, name):
            raise _disagreement(name, value, path, before)
    asked = config.item_text != default["item_text"]  # its file may have been edited since
    used = about["template_sha256"]
    if asked and used and load_template(config.item_text).sha256 != used:
        raise UsageError(
            f"data.item_text={config.item_text} is not what it was when {path} was prepared. Leave "
            "it out, or prepare the data again with it."
        )


def _differing(
    given: Mapping[str, Any], default: Mapping[str, Any], prepared: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    """Options that are not as prepared: name, value, prepared value."""
    for name, value in given.items():
        before = prepared.get(name, default[name])  # an option younger than the folder
        if isinstance(value, dict):
            yield from _differing(value, default[name], before, f"{prefix}{name}.")
        elif value != before:
            yield f"{prefix}{name}", value, before


def _at(options: Mapping[str, Any], name: str) -> object:
    """The value of a dotted option; its first word is the group's own name."""
    value: Any = options
    for part in name.split(".")[1:]:
        value = value[part]
    return value


def _array(path: Path, name: str, length: int, remedy: str) -> NDArray[Any]:
    """One memory-mapped array, read-only, (length,)."""
    file = path / f"{name}.npy"
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:  # objects, which only pickle could read, among them
        raise UsageError(f"{file} is no array of numbers. {remedy}") from error
    expected = np.dtype(ARRAYS[name])
    if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (expected, (length,)):
        raise UsageError(f"{file} does not hold {length} numbers of type {expected}. {remedy}")
    return np.asarray(array)


def _table(file: Path, rows: int, remedy: str) -> dict[str, list[str]]:
    """The columns of a parquet file of strings, each (rows,)."""
    return {column.name: column.to_list() for column in _frame(file, rows, remedy)}


def _frame(file: Path, rows: int, remedy: str, columns: list[str] | None = None) -> pl.DataFrame:
    """A parquet file of strings, or some of its columns, (rows, columns)."""
    try:
        frame = pl.read_parquet(file, columns=columns)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UsageError(f"{file} cannot be read as parquet. {remedy}") from error
    if frame.height != rows or set(frame.dtypes) != {pl.String}:
        raise UsageError(f"{file} does not hold {rows} rows of text. {remedy}")
    return frame
