"""What an exported folder says of itself: facts for programs, and a model card for people.

Neither names a path of the machine that wrote it, nor a row of the data beyond what was exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import llmrec
from llmrec.assembly import Restored

SHOWN = ("HR@10", "NDCG@10", "MRR@10")
"""Measures on a card."""


def facts_of(restored: Restored, what: str) -> dict[str, Any]:
    """What there is to know of an export before it is made, as plain values."""
    config, record, catalog = restored.config, restored.record, restored.dataset.catalog
    return {
        "what": what,
        "llmrec": llmrec.__version__,
        "label": record["label"],
        "seed": record["seed"],
        "tower": config.tower.name,
        "control": config.tower.control,
        "width": config.model.width,
        "projection_layers": config.tower.projection_layers,
        "whiten": config.tower.whiten,
        "encoder": _encoder(restored),
        "data": {
            "name": record["data"]["name"],
            "fingerprint": record["data"]["fingerprint"],
            "items": len(catalog),
            "items_without_text": sum(not text for text in catalog.texts),
            "item_text": Path(config.data.item_text).name,
            "template_sha256": catalog.template_sha256,
        },
        "protocol": record["protocol"],
        "metrics": {name: record["metrics"]["test"][name] for name in SHOWN},
    }


def _encoder(restored: Restored) -> dict[str, Any] | None:
    """The reader of texts; None where there is none."""
    known, config = restored.record["cost"].get("encoder"), restored.config.encoder
    if known is None or "layers_run" not in known:  # IDs, or TF-IDF in the place of a model
        return None
    local = Path(config.model).is_dir()
    return {
        "model": Path(config.model).name if local else config.model,
        "on_the_hub": not local,
        "revision": known["revision"],
        "weights": known["weights"],
        "tune": config.tune,
        "layers_run": known["layers_run"],
        "layers_of_model": known["layers_of_model"],
        "pooling": known["pooling"],
        "prompt": known.get("prompt", ""),
        "max_item_tokens": config.max_item_tokens,
        "dtype": config.dtype,
        "quantisation": config.quantisation,
        "cache_dtype": config.cache_dtype,
    }


def encoder_card(facts: Mapping[str, Any], repository: str | None) -> str:
    """README.md of a sentence-transformers folder.

    Args:
        facts: `facts_of`, and ``compared``: the differences found.
        repository: USER/NAME it will be loaded from; None: a folder.
    """
    encoder, data, compared = facts["encoder"], facts["data"], facts["compared"]
    sections = [
        _front(
            facts, {"library_name": "sentence-transformers", "pipeline_tag": "feature-extraction"}
        ),
        f"# {facts['label']}: item texts as vectors of a recommender",
        f"Reads the text of an item and gives its vector, of width {facts['width']}, as the item "
        "tower of a sequential recommender does. Two vectors are compared by their dot product.",
        "## Use",
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'encoder = SentenceTransformer("{repository or "FOLDER"}")\n'
        'vectors = encoder.encode(["text of an item"])  # (n, '
        f"{facts['width']})\n```",
        f"Texts are those of the item-text template `{data['item_text']}` (sha256 "
        f"`{data['template_sha256'][:12]}`) of llmrec {facts['llmrec']}.",
        *_missing(facts),
        "## What it was made from",
        _origin(facts),
        "## How exact it is",
        f"Of {compared['texts']} texts of the catalogue, whose vectors reach "
        f"{compared['largest_value']:.3g}, no component differs by more than "
        f"{compared['folder_and_merged']:.1e} between this folder, as sentence-transformers reads "
        "it, and the run's model with adapters merged, in float32. "
        f"{_rounding(encoder)}{compared['merged_and_run']:.1e} at most.",
        *_measured(facts),
        _licence(encoder),
    ]
    return "\n\n".join(sections) + "\n"


def items_card(facts: Mapping[str, Any], repository: str | None) -> str:
    """README.md of a folder of item vectors; arguments as of `encoder_card`.

    `facts` also has ``format`` and ``shape``.
    """
    count, width = facts["shape"]
    folder = "FOLDER"
    fetch = ""
    if repository:
        fetch = (
            "from huggingface_hub import snapshot_download\n\n"
            f'FOLDER = snapshot_download("{repository}", repo_type="dataset")\n'
        )
        folder = "{FOLDER}"
    sections = [
        _front(facts, {}),
        f"# {facts['label']}: item vectors of a recommender",
        f"{count} items, a vector of width {width} each (float32), and their external ids. The dot "
        "product with a user's vector of the same recommender is the score it ranks items by; that "
        "user model is not in here.",
        "## Use",
        f"```python\n{fetch}{_reading(facts['format'], folder)}\n```",
        "## What it was made from",
        _origin(facts),
        *_measured(facts),
        _licence(facts["encoder"]),
    ]
    return "\n\n".join(sections) + "\n"


def _reading(file_format: str, folder: str) -> str:
    """Lines of Python that read a format."""
    f = "f" if folder.startswith("{") else ""
    if file_format == "parquet":
        return (
            f'import polars as pl\n\ntable = pl.read_parquet({f}"{folder}/items.parquet")\n'
            'ids, vectors = table["item_id"], table["vector"].to_numpy()  # (N,), (N, D)'
        )
    ids = f'import json\n\nids = json.load(open({f}"{folder}/ids.json"))  # (N,), row by row'
    if file_format == "npy":
        return (
            f'{ids}\nimport numpy as np\n\nvectors = np.load({f}"{folder}/vectors.npy")  # (N, D)'
        )
    return f'{ids}\nimport faiss\n\nindex = faiss.read_index({f}"{folder}/index.faiss")'


def _front(facts: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    """The block of YAML that the hub reads."""
    encoder = facts["encoder"]
    values = {**head, "tags": ["recommendation", "llmrec"]}
    if facts["what"] == "encoder" and encoder["on_the_hub"]:
        values["base_model"] = encoder["model"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _missing(facts: Mapping[str, Any]) -> list[str]:
    """What of the run's item vectors the folder cannot give."""
    empty, parts = facts["data"]["items_without_text"], []
    if facts["tower"] == "id_text":
        parts.append(
            "The recommender joins this vector with one learned for each item's id; the folder has "
            "the text's part alone."
        )
    parts.append(
        "An item without text got the projection of a zero vector in training"
        f" ({empty} of {facts['data']['items']} items). An empty text given to this folder is read "
        "like any other, so its vector is another one: leave such items out."
    )
    return parts


def _rounding(encoder: Mapping[str, Any]) -> str:
    """Why that model and the run's own vectors may differ."""
    why = []
    if encoder["quantisation"] != "none":
        why.append(f"multiplied weights held in {encoder['quantisation']}")
    if encoder["dtype"] != "float32":
        why.append(f"computed in {encoder['dtype']}")
    start = f"The run {' and '.join(why)}: its" if why else "The run's"
    return f"{start} own vectors differ from that model's by "


def _origin(facts: Mapping[str, Any]) -> str:
    encoder, data = facts["encoder"], facts["data"]
    rows = {"tower": facts["tower"], "seed": facts["seed"], "llmrec": facts["llmrec"]}
    if facts["control"] != "none":
        rows["control in the place of the items' own texts"] = facts["control"]
    if encoder:
        rows |= {
            "language model": encoder["model"],
            "revision": encoder["revision"] or f"files with sha256 {encoder['weights'][:12]}",
            "tuned": encoder["tune"],
            "layers run": f"{encoder['layers_run']} of {encoder['layers_of_model']}",
            "pooling": encoder["pooling"],
            "prompt": f"`{encoder['prompt']}`" if encoder["prompt"] else "none",
            "tokens per text": f"at most {encoder['max_item_tokens']}",
            "whitening": "mean and directions of the untuned vectors"
            if facts["whiten"]
            else "none",
            "projection": f"{facts['projection_layers']} x (linear, GELU)",
        }
        if encoder["cache_dtype"] != "float32":
            rows["in training, states of the lower layers were rounded to"] = encoder["cache_dtype"]
    rows |= {
        "data": f"{data['name']}, {data['items']} items",
        "data sha256": data["fingerprint"][:12],
    }
    return _table({name: str(value) for name, value in rows.items()})


def _measured(facts: Mapping[str, Any]) -> list[str]:
    """The whole recommender's test figures."""
    protocol = facts["protocol"]
    rows = {
        name: f"{v['mean']:.4f} [{v['low']:.4f}, {v['high']:.4f}]"
        for name, v in facts["metrics"].items()
    }
    return [
        "## What the recommender reached",
        f"Test users, {protocol['split']} split, {protocol['candidates']} candidates, in brackets "
        f"the {protocol['interval']}:",
        _table(rows),
    ]


def _licence(encoder: Mapping[str, Any] | None) -> str:
    base = "" if encoder is None else f" of {encoder['model']} and"
    return (
        "## Licence\n\nNot stated here. State one before you pass this on, and mind the terms"
        f"{base} of the data."
    )


def _table(rows: Mapping[str, str]) -> str:
    cells = {name: value.replace("|", "\\|") for name, value in rows.items()}
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in cells.items())])
