"""Finished runs without any training."""

import numpy as np
import polars as pl
from rich.console import Console

from llmrec.evaluation.metrics import Measure
from llmrec.evaluation.result import Result
from llmrec.reporting.record import Question
from llmrec.reporting.render import print_table

QUESTION = Question(measures=[Measure("HR", 10), Measure("NDCG", 10)])


def run(label="ID", seed=0, mean_place=60, users=400, **changes):
    """A finished run whose targets lie near `mean_place` of 1,000 candidates."""
    rng = np.random.default_rng(sum(map(ord, label)) * 10 + seed)
    greater = np.minimum(rng.geometric(1 / mean_place, users) - 1, 999)
    places = changes.get("places")  # how many candidates are before each user's target
    if places is not None:
        greater, users = np.array(places), len(places)
    per_user = pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in range(users)],
            "target_item_id": ["i"] * users,
            "greater": greater.astype(np.int64),
            "equal": np.zeros(users, np.int64),
            "candidates": np.full(users, 1000),
            "reachable": np.ones(users, bool),
            **changes.get("facts", {}),
        }
    )
    protocol = {
        "split": "leave_one_out", "fit_on": "train", "candidates": 1000, "filter_seen": "true",
        "ties": "averaged", "order": "timestamp",
    }  # fmt: skip
    record = {
        "label": label,
        "seed": seed,
        "metrics": {},
        "protocol": protocol | {k: v for k, v in changes.items() if k in protocol},
        "data": {
            "name": "tiny", "source": "simulated", "users": users, "items": 1000,
            "interactions": changes.get("interactions", 9000),
            "fingerprint": changes.get("data", "0123456789abcdef"),
            "template_sha256": changes.get("template", "title"),
            "counts": {"users_read": 450, "interactions_read": 9100} | changes.get("counts", {}),
        },
        "cases": {"count": users, "fingerprint": changes.get("cases", "same")},
        "config": changes.get("config", {"run": {"seed": seed}}),
        "cost": {"train_seconds": 12.34, "trainable_parameters": 1_234_567, "flops": 2.5e12}
        | changes.get("cost", {}),
    }  # fmt: skip
    if "pool" in changes:
        lists = {"size": 100, "source": "random", "users": 1024, "seed": 0, "sha256": "a" * 64}
        record["protocol"] |= {"candidates": 100, "pool": lists | changes["pool"]}
    if "beyond" in changes:
        record["beyond_accuracy"] = changes["beyond"]
    return Result(record, per_user)


def text(record, width=100):
    console = Console(width=width, record=True, color_system=None, file=None, quiet=False)
    with console.capture() as captured:
        print_table(record, console)
    return captured.get()
