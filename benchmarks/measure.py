"""What the benchmarks share. Import it first: it limits threads before torch is loaded.

Times are CPU-seconds of this process with one thread. The compared functions take turns, and a
ratio is the median over turns of the ratio within a turn, so that whatever else the machine
does falls on both sides.
"""

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import llmrec
from llmrec.data.interactions import Catalog, Dataset, Interactions
from llmrec.data.readers import DataConfig, data_root, load_dataset

torch.set_num_threads(1)
RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One comparison: ours against another way of doing the same."""

    what: str
    other_is: str
    ours: float
    other: float | None
    unit: str
    ratio: float | None
    """Ours / other, median within turns; below 1 is better, but for speeds."""
    target: str
    """`<= 1.3` bounds the ratio (or `ours` where there is no ratio); empty: for information."""

    @property
    def verdict(self) -> str:
        """met, missed, or empty where there is no target."""
        if not self.target:
            return ""
        sign, bound = self.target.split()[:2]
        value = self.ours if self.ratio is None else self.ratio
        met = value <= float(bound) if sign == "<=" else value >= float(bound)
        return "met" if met else "missed"


class Times:
    """CPU-seconds of functions that took turns, (turns,) each."""

    def __init__(
        self, functions: dict[str, Callable[[], object]], turns: int, warm: int = 1
    ) -> None:
        """Run every function `warm` times unmeasured, then all of them in turn, `turns` times."""
        self.seconds: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(-warm, turns):
            for name, function in functions.items():
                gc.collect()
                began = time.process_time()
                function()
                if turn >= 0:
                    self.seconds[name].append(time.process_time() - began)

    def median(self, name: str) -> float:
        """Median CPU-seconds of one function."""
        return statistics.median(self.seconds[name])

    def ratio(self, ours: str, other: str) -> float:
        """Median over turns of ours / other."""
        pairs = zip(self.seconds[ours], self.seconds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def row(self, what: str, ours: str, other: str, target: str) -> Row:
        """A comparison of two of the functions."""
        return Row(
            what,
            other,
            self.median(ours),
            self.median(other),
            "CPU-s",
            self.ratio(ours, other),
            target,
        )

    def speed_row(self, what: str, ours: str, other: str, items: int, target: str) -> Row:
        """The same as items per CPU-second; the ratio is ours / other, so above 1 is better."""
        speeds = (items / self.median(name) for name in (ours, other))
        return Row(what, other, *speeds, "items per CPU-s", self.ratio(other, ours), target)


def extra_memory(prepare: Callable[[], Callable[[], object]]) -> float:
    """Peak resident MiB of what `prepare` returns, beyond what is resident before. Linux only."""
    run = prepare()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmHWM")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_fresh_process(script: str, *arguments: object) -> float:
    """The number that `script` prints last, run with these arguments in its own process."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def report(name: str, rows: list[Row], **facts: object) -> None:
    """Print the comparisons and write benchmarks/results/NAME.json."""
    for row in rows:
        other = "" if row.other is None else f"  {row.other_is} {row.other:.3f}"
        ratio = "" if row.ratio is None else f"  ratio {row.ratio:.2f}"
        target = f"  target {row.target}: {row.verdict}" if row.target else ""
        print(f"{row.what}: ours {row.ours:.3f}{other} {row.unit}{ratio}{target}")
    packages = ("torch", "numpy", "transformers", "accelerate", "sentence-transformers")
    record = {
        "name": name,
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"llmrec": llmrec.__version__}
        | {package: version(package) for package in packages},
        "facts": facts,
        "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{name or platform.processor()}, {os.cpu_count()} logical"


def movielens() -> Dataset:
    """MovieLens-1M where the data root has it as `ml-1m`, else random interactions of its shape.

    The stand-in: 6,040 users, 3,416 items, log-normal lengths from 18 to 2,275 of mean 165,
    popularity falling as 1 / (rank + 50). Nothing can be learned from it.
    """
    if (data_root() / "ml-1m").is_dir():
        return load_dataset(DataConfig(source="ml-1m"))
    rng = np.random.default_rng(0)
    users, items = 6040, 3416
    lengths = rng.lognormal(4.62, 1.0, users).clip(18, 2275).astype(np.int64)
    popularity = 1 / (np.arange(items) + 50)
    drawn = rng.choice(items, size=lengths.sum(), p=popularity / popularity.sum()) + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = [str(item) for item in range(1, items + 1)]
    catalog = Catalog(ids, {}, [""] * items)
    user_ids = [str(user) for user in range(users)]
    return Dataset(
        "random, ML-1M shape", Interactions(drawn.astype(np.int32), offsets), catalog, user_ids
    )
