"""Files to data sets. A new format is a module with `read(path, config)` and a line in READERS."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path

from llmrec.data.columns import assemble
from llmrec.data.interactions import Dataset
from llmrec.data.item_text import load_template
from llmrec.data.readers import recbole, table
from llmrec.data.readers.config import DataConfig
from llmrec.data.readers.prepared import is_prepared, open_prepared, prepared_config
from llmrec.data.simulated import simulate
from llmrec.errors import UsageError, nearest

__all__ = ["READERS", "DataConfig", "data_root", "effective", "find_source", "load_dataset"]

READERS = {"table": table.read, "recbole": recbole.read}


def data_root() -> Path:
    """Where data sets are looked for by name: LLMREC_DATA, else data/."""
    return Path(os.environ.get("LLMREC_DATA") or "data")


def _found(source: str) -> Path | None:
    """The path that a `data.source` means, where there is one."""
    places = (Path(source).expanduser(), data_root() / source)
    return next((path for path in places if source and path.exists()), None)


def find_source(source: str) -> Path:
    """The folder or file a `data.source` means: as it stands, else under the data root.

    Raises:
        UsageError: If it is in neither place; the message lists what the data root holds.
    """
    root, path = data_root(), _found(source)
    if path is not None:
        return path
    names = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    held = nearest(source, names) if names else "it holds nothing."
    raise UsageError(
        f"data.source={source} is neither in the working directory nor under the data root "
        f"{root} (set LLMREC_DATA to change it); {held}"
    )


def effective(config: DataConfig, given: Set[str]) -> DataConfig:
    """The options that decide the data: for a prepared folder those it was prepared with.

    Args:
        config: As parsed.
        given: Names of the options that command line and YAML hold, as `options.parse` returns.

    Raises:
        UsageError: A named option disagrees with the prepared folder.
    """
    path = None if config.source == "simulated" else _found(config.source)
    return prepared_config(path, config, given) if path and is_prepared(path) else config


def load_dataset(config: DataConfig) -> Dataset:
    """Read, order, filter and render one data set; or open one that this was done to before.

    `Dataset.counts` tells everything that was dropped or repaired on the way.

    Raises:
        UsageError: If the data or an option is wrong; one sentence with the way out.
    """
    if config.source == "simulated":
        template = load_template(config.item_text)
        name, columns = "simulated", simulate(config.simulated)
    else:
        path = find_source(config.source)
        if is_prepared(path):
            return open_prepared(path, config)
        template = load_template(config.item_text)
        name = path.resolve().name if path.is_dir() else path.stem
        columns = READERS[_format(path, config)](path, config)
    limit, size = config.max_user_interactions, config.sample_users
    if size == "all" and config.sample_seed != DataConfig.sample_seed:
        raise UsageError(
            f"data.sample_seed={config.sample_seed} draws nobody while data.sample_users=all. "
            "Leave it out, or say how many users to draw."
        )
    return assemble(
        name,
        columns,
        template,
        config.min_user_interactions,
        maximum=None if isinstance(limit, str) else limit,
        sample=None if isinstance(size, str) else size,
        sample_seed=config.sample_seed,
    )


def _format(path: Path, config: DataConfig) -> str:
    if config.format != "auto":
        return config.format
    atomic = path.suffix == ".inter" or (path.is_dir() and any(path.glob("*.inter")))
    return "recbole" if atomic else "table"
