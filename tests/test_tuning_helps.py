"""Tuning must find what the frozen vectors of an untrained reader hide, with a p that means it."""

import json
import re

import pytest
import torch
import transformers
import yaml
from small_runs import record
from tiny_models import tokenizer

from llmrec.data.simulated import SimulatedConfig, simulate
from llmrec.evaluation.suite import main as evaluate

SHOP = {"users": 1200, "items": 3000, "distractors": 2}


def small_reader(folder):
    """A BERT of two layers that was never trained: its frozen vectors are a muddle of words."""
    titles = simulate(SimulatedConfig(**SHOP)).fields["title"]
    words = sorted({word for title in titles for word in re.findall(r"\w+|[^\w\s]", title.lower())})
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=4 + len(words), max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_tuning_beats_frozen_vectors_where_titles_also_name_what_an_item_is_not(tmp_path, figure):
    suite = {
        "title": "planted",
        "baseline": "frozen",
        "measures": ["HR@10", "NDCG@10"],
        "seeds": [0, 1, 2],
        "base": {
            "data": {"source": "simulated", "simulated": SHOP},
            "encoder": {"model": str(small_reader(tmp_path / "model"))},
            "tower": {"name": "text", "projection_dropout": 0.0},
            "model": {"heads": 1, "dropout": 0.1},
            "loss": {"name": "in_batch"},
            "optim": {"epochs": 15, "batch_size": 32, "lr": 3e-3, "patience": 4},
            "run": {"store": str(tmp_path / "store")},
        },
        "rows": {
            "frozen": {"encoder.tune": "frozen"},
            "full": {"encoder": {"tune": "full", "lr": 1e-4}},
        },
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert evaluate([str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    frozen, full = table["rows"]
    found = full["difference"]["NDCG@10"]
    figure("test NDCG@10, frozen", f"{frozen['metrics']['NDCG@10']['mean']:.4f}")
    figure("test NDCG@10, tuned", f"{full['metrics']['NDCG@10']['mean']:.4f}")
    figure("p of tuned against frozen, 3 seeds", f"{found['p']:.4f}")
    epochs = [record(tmp_path / "out" / f"{row}-{s}")["cost"]["selected_epoch"]
              for row in ("frozen", "full") for s in (0, 1, 2)]  # fmt: skip
    figure("selected epochs, frozen and tuned", str(epochs))
    assert found["difference"] > 0
    assert found["p"] < 0.05
