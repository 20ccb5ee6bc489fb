"""The run card: all that a reader needs to judge one run, as Markdown, from its record alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec.evaluation.result import flatten
from llmrec.runs import CONFIG

SHOWN = ("HR@1", "HR@5", "HR@10", "HR@20", "NDCG@10", "MRR@10", "RMSE", "MAE", "AUC")
"""Measures on the card; the others are in result.json."""
BEYOND = {
    "coverage": "share of the candidates that somebody is recommended",
    "gini": "inequality of recommendations over candidates, 0 to 1",
    "mean_popularity": "training interactions per recommended item",
    "popularity_lift": "mean popularity of lists over that of histories, less 1",
    "novelty": "bits of self-information per recommended item",
    "intra_list_similarity": "mean TF-IDF cosine of the pairs of a list",
}


WEIGHTS = {
    "chat": "model and templates",
    "p5 train": "model, templates, ratings and reviews",
    "rating": "ratings, encoder and template",
}
"""What the hash of what was read is over, by command."""
HEADINGS = {"chat": "## Chat model", "p5 train": "## Language model"}


def _verb(record: Mapping[str, Any]) -> str:
    """The command that makes such a run."""
    config = record["config"]
    if "chat" in config:
        return "chat"
    if "prompts" in config:
        return "p5 train"
    return "rating" if record.get("kind") == "rating" else "train"


def run_card(record: Mapping[str, Any]) -> str:
    """A finished run's card from what ``result.json`` holds."""
    data, protocol, cost = record["data"], record["protocol"], dict(record["cost"])
    encoder = cost.pop("encoder", None)
    config_file = f"{record['config']['run']['folder']}/{CONFIG}"
    verb = _verb(record)
    sections = [
        f"# {record['label']}, seed {record['seed']}",
        f"    llmrec {verb} --config {config_file} --run.folder runs/again",
        "## Result",
        *_result(record),
        *_prompts(record.get("p5")),
        "## Protocol",
        _table("rule", flatten(protocol) | {"test cases": record["cases"]["count"]}),
        "## Data",
        _table("", {k: v for k, v in data.items() if not isinstance(v, Mapping)}),
        _table("count", data["counts"]),
        "## Hashes",
        _table(
            "sha256 of",
            {
                "data": data["fingerprint"],
                "test users and targets": record["cases"]["fingerprint"],
                "item-text template": data["template_sha256"] or "no text",
                WEIGHTS.get(verb, "encoder's files"): (
                    encoder["weights"] if encoder else "no encoder"
                ),
                "per-user values": record["per_user_sha256"],
            },
        ),
        *([HEADINGS.get(verb, "## Encoder"), _table("", encoder)] if encoder else []),
        "## Options",
        _table("option", flatten(record["config"])),
        "## Cost",
        _table("", flatten(cost)),
        "## Made with",
        _table("", record["versions"] | record["environment"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _result(record: Mapping[str, Any]) -> list[str]:
    if record.get("kind") == "rating":
        return [_quality({"prediction": record["metrics"]["test"], **record["means"]})]
    beyond = _table("beyond accuracy", _beyond(record["beyond_accuracy"]))
    return [_quality(record["metrics"]), beyond]


def _prompts(asked: Mapping[str, Any] | None) -> list[str]:
    """What each prompt's answers are worth, of a model that was trained on prompts."""
    if asked is None:
        return []
    lines = ["| prompt | family | | cases | measures |", "| --- | --- | --- | ---: | --- |"]
    for name, about in asked["prompts"].items():
        part = "held out" if about["held out"] else "seen in training"
        values = {
            measure: value["mean"] if isinstance(value, Mapping) else value
            for measure, value in about["measures"].items()
        }
        shown = ", ".join(
            f"{measure} {value:.4f}"
            for measure, value in values.items()
            if measure in SHOWN or "@" not in measure
        )
        cells = (name, about["family"], part, f"{about['cases']:,}", shown)
        lines.append(f"| {' | '.join(cells)} |")
    answers = _table("answers to the prompt that is ranked", asked["answers"])
    return ["## Prompts", "\n".join(lines), answers]


def _quality(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    lines = [f"| measure | {' | '.join(f'{part} [95 %]' for part in metrics)} |"]
    lines.append("| --- |" + " ---: |" * len(metrics))
    for name in SHOWN:
        cells = [values[name] for values in metrics.values() if name in values]
        shown = [
            "-" if v["mean"] is None else f"{v['mean']:.4f} [{v['low']:.4f}, {v['high']:.4f}]"
            for v in cells
        ]
        if shown:
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _beyond(found: Mapping[str, Any]) -> dict[str, Any]:
    rows = {}
    for name, meaning in BEYOND.items():
        value = found.get(name)
        if isinstance(value, Mapping):
            value = f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
        elif value is not None:
            value = f"{value:.4g}"
        rows[f"{name.replace('_', ' ')} at {found['cutoff']}: {meaning}"] = value
    return rows


def _table(heading: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {heading} | |", "| --- | --- |"]
    return "\n".join(
        [*lines, *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())]
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
