"""What a finished run leaves: ``per_user.parquet``, then ``result.json``. Reports read these."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec import runs
from llmrec.data.interactions import Dataset, Int32, Int64, Split
from llmrec.data.splits import training_counts
from llmrec.errors import UsageError
from llmrec.evaluation.beyond import CUTOFF, beyond_accuracy, reference_space
from llmrec.evaluation.metrics import MEASURES, Float64, Measure, Ranking, measure_matrix
from llmrec.evaluation.pools import Pools
from llmrec.evaluation.ratings import mean_baselines, rating_intervals
from llmrec.evaluation.significance import bootstrap
from llmrec.evaluation.slices import case_facts

PER_USER = "per_user.parquet"
FORMAT = 1
"""Version of the layout of result.json."""
PACKAGES = (
    "llmrec", "torch", "numpy", "polars", "transformers", "tokenizers", "accelerate", "peft",
    "sentence-transformers", "bitsandbytes",
)  # fmt: skip


@dataclass(frozen=True)
class RunFacts:
    """What the entry point knows about its run."""

    name: str
    """The run's own name, such as its folder's."""
    label: str
    """The row in tables; runs that differ only in seed share it."""
    seed: int
    config: Mapping[str, Any]
    """The resolved config, nested."""
    data_source: str
    """Where the data came from: the reader and its file, or ``simulated``."""
    split: str
    """leave_one_out or temporal."""
    filter_seen: str
    """true, false or papers."""
    fit_on: str
    """train or train+valid."""
    selection: str
    """The validation measure the checkpoint was chosen by; ``none`` for models without training."""
    processes: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    """The number format, resolved."""
    cost: Mapping[str, float | int | None] = field(default_factory=dict)
    """train_seconds, encode_seconds, trainable_parameters, flops, peak_memory_bytes and others."""


@dataclass(frozen=True)
class Result:
    """One finished run as numbers: the record of ``result.json`` and a line per test user."""

    record: dict[str, Any]
    per_user: pl.DataFrame
    """user_id, target_item_id, greater, equal, candidates, reachable, the facts that slices are cut
    by, top_item_ids (the list recommended, best first) and one float64 column per measure; in case
    order."""
    folder: Path | None = None

    @property
    def label(self) -> str:
        """The row in tables."""
        return str(self.record["label"])

    @property
    def seed(self) -> int:
        """The training seed."""
        return int(self.record["seed"])

    @property
    def rates(self) -> bool:
        """Whether it predicts ratings, and ranks nothing."""
        return self.record.get("kind") == "rating"

    def values(self, measures: Sequence[Measure]) -> Float64:
        """Per-user values, (U, M), of any measures and cut-offs, from the stored ranks."""
        column = self.per_user.get_column
        ranking = Ranking(
            greater=column("greater").to_numpy(),
            equal=column("equal").to_numpy(),
            candidates=column("candidates").to_numpy(),
            reachable=column("reachable").to_numpy(),
            top_items=np.empty((len(self.per_user), 0), dtype=np.int32),
        )
        return measure_matrix(ranking, measures)

    def identity(self) -> dict[str, Any]:
        """What decided its numbers; see `identity`."""
        encoder = self.record["cost"].get("encoder") or {}
        fingerprint = self.record["data"]["fingerprint"]
        return identity(self.record["config"], fingerprint, encoder.get("weights"))


MOVES_NO_NUMBER = frozenset(
    {
        "run.folder", "run.overwrite", "run.store", "run.tensorboard", "run.resume",
        "run.checkpoint_steps", "run.keep_states",
        "evaluation.block_megabytes", "loss.chunk_megabytes", "encoder.batch_tokens",
        "encoder.step_tokens", "encoder.checkpointing", "encoder.cache_states",
        "encoder.cache_gigabytes", "encoder.attention", "encoder.placement",
        "server.python", "server.start_seconds", "server.api_key_variable", "server.base_url",
    }
)  # fmt: skip
"""Options that change where a run is written or how fast it goes, never what it finds."""


_OFF = {
    "encoder.tune": "frozen", "encoder.quantisation": "none", "encoder.prompt": "",
    "optim.state": "float32", "evaluation.pool.size": "all",
}  # fmt: skip
"""Options that change nothing at this value."""
_TUNING = frozenset(
    {
        "encoder.dropout", "encoder.lr", "encoder.weight_decay", "encoder.cache_dtype",
        "encoder.lora.rank", "encoder.lora.alpha", "encoder.lora.dropout", "encoder.lora.targets",
        "encoder.lora.layers", "encoder.lora.dora", "encoder.lora.rslora",
    }
)  # fmt: skip
"""Options of a tuned encoder; a frozen one refuses them."""


def identity(
    config: Mapping[str, Any], fingerprint: str, weights: str | None = None
) -> dict[str, Any]:
    """What decides a run's numbers, by name: runs that agree in it are the same run.

    Args:
        config: The resolved config, nested.
        fingerprint: `Dataset.fingerprint`, which stands for all data options: the same data read
            from elsewhere, or from a prepared folder, is the same data.
        weights: What tells the encoder's files from any other's, where text is read.
    """
    options = flatten(json.loads(json.dumps(config, default=str)))
    # Earlier versions' runs, which know no such option, are these ones.
    options = {name: v for name, v in options.items() if name not in _OFF or v != _OFF[name]}
    if "encoder.tune" not in options:
        options = {name: v for name, v in options.items() if name not in _TUNING}
    if "evaluation.pool.size" not in options:
        options = {n: v for n, v in options.items() if not n.startswith("evaluation.pool.")}
    decisive = {
        name: value
        for name, value in options.items()
        if name not in MOVES_NO_NUMBER and not name.startswith(("data.", "client."))
    }
    return decisive | {"data fingerprint": fingerprint, "encoder weights": weights}


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names under which two identities disagree, in their order."""
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options as dotted ones: ``{tower: {name: id}}`` -> ``{"tower.name": "id"}``."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def build_result(
    facts: RunFacts,
    dataset: Dataset,
    split: Split,
    rankings: Mapping[str, Ranking],
    measures: Sequence[Measure] = MEASURES,
    learned_end: Int64 | None = None,
    pools: Pools | None = None,
) -> Result:
    """Turn rankings into the numbers that are kept.

    Args:
        facts: What only the entry point knows.
        dataset: The data, for ids, counts and its fingerprint.
        split: The cases and candidates that were ranked.
        rankings: "test", and "valid" where there was one, each in case order.
        measures: Columns of ``per_user.parquet`` and entries of ``metrics``.
        learned_end: Where each user's part that was learned from ends, (U,), if not at the split's
            ``train_end``: after a refit on validation too.
        pools: The lists that test was ranked on, where it was not all candidates.

    Raises:
        UsageError: There is no test case.
        ValueError: A ranking does not belong to its cases.
    """
    for part, ranking in rankings.items():
        cases = {"test": split.test, "valid": split.valid}[part]
        if len(ranking) != len(cases):
            raise ValueError(f"{len(ranking)} ranked {part} cases, but the split has {len(cases)}.")
    _check_cases(split)
    learned = split.train_end if learned_end is None else learned_end
    popularity = training_counts(dataset.interactions, learned, dataset.item_count)
    per_user = _per_user(dataset, split, rankings["test"], popularity, measures)
    numbers = {
        "metrics": {part: metrics_of(r, measures) for part, r in rankings.items() if len(r)},
        "beyond_accuracy": _beyond_accuracy(dataset, split, rankings["test"], popularity),
    }
    return _result(facts, dataset, split, numbers, per_user, pools)


def build_rating_result(
    facts: RunFacts,
    dataset: Dataset,
    split: Split,
    predicted: Float64,
    learned_end: Int64 | None = None,
) -> Result:
    """Turn predicted ratings into the numbers that are kept, beside those of plain means.

    Args:
        facts: What only the entry point knows.
        dataset: The data, with ratings.
        split: Its test cases were rated.
        predicted: Stars for each test case, (C,); NaN where there is no prediction.
        learned_end: Where each user's part that the means are taken over ends, (U,), if not at the
            split's ``train_end``.

    Raises:
        UsageError: There is no test case.
    """
    _check_cases(split)
    interactions, test = dataset.interactions, split.test
    assert interactions.ratings is not None
    truth = interactions.ratings[test.target].astype(np.float64)
    learned = split.train_end if learned_end is None else learned_end
    means = mean_baselines(interactions, learned, test, dataset.item_count)
    columns = {"stars": truth, "predicted": predicted, **means}
    per_user = _questions(dataset, split).with_columns(
        pl.Series(name.replace(" ", "_"), values) for name, values in columns.items()
    )
    numbers = {
        "kind": "rating",
        "metrics": {"test": _rating_metrics(truth, predicted)},
        "means": {name: _rating_metrics(truth, values) for name, values in means.items()},
        "unpredicted": int(np.isnan(predicted).sum()),
    }
    result = _result(facts, dataset, split, numbers, per_user, None)
    for ranked in ("candidates", "valid_candidates", "filter_seen", "ties", "test"):
        del result.record["protocol"][ranked]  # rules of rankings
    return result


def _check_cases(split: Split) -> None:
    if not len(split.test):
        raise UsageError(
            "The split has no test case. Lower the least number of interactions per user, or "
            "choose other cuts in time."
        )


def _result(
    facts: RunFacts,
    dataset: Dataset,
    split: Split,
    numbers: Mapping[str, Any],
    per_user: pl.DataFrame,
    pools: Pools | None,
) -> Result:
    """A run's numbers with all that says what they are of."""
    record: dict[str, Any] = {
        "format": FORMAT,
        "name": facts.name,
        "label": facts.label,
        "seed": facts.seed,
        **numbers,
        "protocol": _protocol(facts, dataset, split, pools),
        "data": _data(facts, dataset, split),
        "cases": {"count": len(split.test), "fingerprint": _fingerprint(per_user)},
        "config": dict(facts.config),
        "versions": _versions(),
        "cost": dict(facts.cost),
        "environment": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpu_count": os.cpu_count(),
            "processes": facts.processes,
            "device": facts.device,
            "precision": facts.precision,
        },
    }
    return Result(json.loads(json.dumps(record)), per_user)


def write_result(
    folder: Path, result: Result, card: Callable[[Mapping[str, Any]], str] | None = None
) -> dict[str, Any]:
    """Write the files, each in one step; ``result.json`` last, so that it vouches for the others.

    Args:
        folder: The run folder.
        result: What to write.
        card: Makes ``card.md`` of what ``result.json`` will hold; None writes no card.

    Returns:
        What ``result.json`` holds.
    """
    buffer = io.BytesIO()
    result.per_user.write_parquet(buffer)
    data = buffer.getvalue()
    runs.write_atomically(folder / PER_USER, data)
    record = {**result.record, "per_user_sha256": hashlib.sha256(data).hexdigest()}
    if card is not None:
        runs.write_atomically(folder / runs.CARD, card(record).encode())
    runs.write_json(folder / runs.RESULT, record)
    return record


def read_result(folder: Path) -> Result:
    """Read a finished run.

    Raises:
        UsageError: The folder holds no finished run, or a file of it is damaged.
    """
    path = folder / runs.RESULT
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = _REQUIRED - record.keys()
        data = (folder / PER_USER).read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} holds no finished run ({Path(error.filename).name} is missing). "
            "Name a run folder such as runs/quickstart/SASRec-text-0, or train it to its end."
        ) from None
    except NotADirectoryError:
        raise UsageError(
            f"{folder} is a file; name the run folder that holds {runs.RESULT}."
        ) from None
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror or error}). Check its permissions "
            "or name another run folder."
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} is damaged (no whole JSON record). Run it again.") from None
    if missing:
        raise UsageError(
            f"{path} lacks {', '.join(sorted(missing))}. Run it again with this version."
        )
    if hashlib.sha256(data).hexdigest() != record["per_user_sha256"]:
        raise UsageError(
            f"{folder / PER_USER} is damaged: its sha256 differs from the one in {runs.RESULT}. "
            "Run it again."
        )
    for name in ("metrics", "protocol", "data", "cases", "config", "cost"):
        if not isinstance(record[name], dict):
            raise UsageError(f"{path} is damaged ({name} is no object). Run it again.")
    try:
        per_user = pl.read_parquet(io.BytesIO(data))
        ranks = ("stars", "predicted") if record.get("kind") == "rating" else _RANKS
        per_user.select(*ranks, "user_id", "target_item_id")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):  # a panic: damaged inside
        raise UsageError(
            f"{folder / PER_USER} is no parquet file of users and ranks. Run it again."
        ) from None
    return Result(record, per_user, folder)


_RANKS = ("greater", "equal", "candidates", "reachable")
_REQUIRED = {
    "label", "seed", "metrics", "protocol", "data", "cases", "config", "cost", "per_user_sha256",
}  # fmt: skip


def _per_user(
    dataset: Dataset,
    split: Split,
    ranking: Ranking,
    popularity: Int64,
    measures: Sequence[Measure],
) -> pl.DataFrame:
    """One line per test case, in case order."""
    values = measure_matrix(ranking, measures)
    columns: dict[str, Any] = {
        "greater": ranking.greater,
        "equal": ranking.equal,
        "candidates": ranking.candidates,
        "reachable": ranking.reachable,
        **case_facts(dataset, split.test, popularity),
        "top_item_ids": _external_ids(dataset, ranking.top_items[:, :CUTOFF]),
    }
    columns |= {str(measure): values[:, i] for i, measure in enumerate(measures)}
    return _questions(dataset, split).hstack(pl.DataFrame(columns))


def _questions(dataset: Dataset, split: Split) -> pl.DataFrame:
    """User and target of every test case, in case order."""
    targets = dataset.interactions.items[split.test.target]
    return pl.DataFrame(
        {
            "user_id": [dataset.user_ids[user] for user in split.test.user],
            "target_item_id": [dataset.catalog.ids[target - 1] for target in targets],
        }
    )


def _rating_metrics(truth: Float64, predicted: Float64) -> dict[str, dict[str, float | None]]:
    """Every measure of predicted ratings with its interval; null where it is not defined."""
    return {
        name: {k: None if np.isnan(v) else v for k, v in asdict(interval).items()}
        for name, interval in rating_intervals(truth, predicted).items()
    }


def _external_ids(dataset: Dataset, top_items: Int32) -> list[list[str]]:
    """Each case's list without its padding: (C, K) -> C lists."""
    ids = ["", *dataset.catalog.ids]
    return [[ids[item] for item in items if item] for items in top_items.tolist()]


def _beyond_accuracy(
    dataset: Dataset, split: Split, ranking: Ranking, popularity: Int64
) -> dict[str, Any]:
    """Beside accuracy, at K = 10 or as many items as were kept."""
    return beyond_accuracy(
        ranking.top_items,
        popularity,
        split.test_candidates,
        dataset.interactions,
        split.test,
        reference_space(dataset.catalog),
        min(CUTOFF, ranking.top_items.shape[1]),
    )


def metrics_of(
    ranking: Ranking, measures: Sequence[Measure] = MEASURES
) -> dict[str, dict[str, float]]:
    """Means over users with their intervals, fractions."""
    intervals = bootstrap(measure_matrix(ranking, measures)[None])
    return {
        str(measure): {"mean": i.mean, "low": i.low, "high": i.high}
        for measure, i in zip(measures, intervals, strict=True)
    }


def _protocol(
    facts: RunFacts, dataset: Dataset, split: Split, pools: Pools | None
) -> dict[str, Any]:
    """Every rule that moves numbers, with its setting."""
    candidates, drawn = int(split.test_candidates.sum()), {}
    if pools is not None:
        candidates = pools.items.shape[1]
        drawn = {"pool": asdict(pools.config) | {"sha256": pools.sha256, "counts": pools.counts}}
    return {
        "order": dataset.order,
        "order_of_ties": "file",
        "split": facts.split,
        "fit_on": facts.fit_on,
        "candidates": candidates,
        **drawn,
        "valid_candidates": int(split.valid_candidates.sum()),
        "filter_seen": facts.filter_seen,
        "ties": "averaged",
        "selection": facts.selection,
        "interval": "95 % bootstrap over users, 2000 resamples, seed 0",
        "test": "paired sign flips, 10000, seed 0",
    }


def _data(facts: RunFacts, dataset: Dataset, split: Split) -> dict[str, Any]:
    """What was read and what became of it."""
    prepared = dataset.prepared_with
    return {
        "source": facts.data_source,
        "name": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "template_sha256": dataset.catalog.template_sha256,
        "users": dataset.interactions.user_count,
        "items": dataset.item_count,
        "interactions": len(dataset.interactions.items),
        "counts": {name: int(value) for name, value in {**dataset.counts, **split.counts}.items()},
        **({} if prepared is None else {"prepared_with": prepared}),
    }


def _fingerprint(per_user: pl.DataFrame) -> str:
    """sha256 over user and target ids in case order: equal only for the same questions."""
    digest = hashlib.sha256()
    for name in ("user_id", "target_item_id"):
        for identifier in per_user[name]:
            encoded = identifier.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    """Installed versions of what can move a number; absent packages are left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
