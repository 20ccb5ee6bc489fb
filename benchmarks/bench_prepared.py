"""Opening a prepared folder against reading the source files it was made from.

    LLMREC_DATA=data python benchmarks/bench_prepared.py

Both give the same data set, which is checked. Opening includes comparing every file with its
sha256; reading includes ordering, filtering and rendering the items' text. Files are in the page
cache on both sides.
"""

from measure import Row, Times, report  # isort: skip

import statistics
import tempfile
import time
from pathlib import Path

from llmrec.data.prepared import write_prepared
from llmrec.data.readers import DataConfig, data_root, load_dataset

DATA_SETS = ("amazon-games-2018", "ml-1m")


def rows_of(source: str, folder: Path) -> list[Row]:
    config, opened = DataConfig(source=source), DataConfig(source=str(folder))
    dataset = load_dataset(config)
    write_prepared(folder, dataset, config)
    again = load_dataset(opened)
    same = again.catalog == dataset.catalog and again.counts == dataset.counts
    if not same or again.fingerprint() != dataset.fingerprint():
        raise SystemExit(f"{source}: the prepared folder gives other data")
    times = Times(
        {"opening": lambda: load_dataset(opened), "reading": lambda: load_dataset(config)}, turns=7
    )
    seconds = [_seconds(opened) for _ in range(5)]
    wall = Row(
        f"opening prepared {source}, wall time", "", statistics.median(seconds), None, "s", None,
        "<= 0.1 s",
    )  # fmt: skip
    compared = times.row(f"opening prepared {source}", "opening", "reading", "<= 0.2")
    return [compared, wall]


def _seconds(config: DataConfig) -> float:
    began = time.perf_counter()
    load_dataset(config)
    return time.perf_counter() - began


def main() -> None:
    found = [name for name in DATA_SETS if (data_root() / name).is_dir()] or ["simulated"]
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in found for row in rows_of(name, Path(folder) / name)]
    report("prepared", rows, data=", ".join(found))


if __name__ == "__main__":
    main()
