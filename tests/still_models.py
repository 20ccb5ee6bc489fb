"""Tiny language models without dropout, whose tokeniser knows the words of the simulated shop.

What two ways of training find can then be compared to rounding.
"""

import copy
import re
from pathlib import Path

import torch
import transformers
from small_runs import SMALL
from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, tokenizer
from tokenizers import AddedToken

from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.simulated import SimulatedConfig

DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
    "dropout_rate",
)  # fmt: skip


def save_still_model(name: str, folder: Path) -> Path:
    """A random model with 3 layers and its tokeniser, in `folder`."""
    words = tokenizer()
    words.add_tokens([AddedToken(word, single_word=True) for word in shop_words()])
    config = copy.deepcopy((ARCHITECTURES | MORE_ARCHITECTURES)[name])
    config.vocab_size = len(words)
    for option in DROPOUTS:
        if hasattr(config, option):
            setattr(config, option, 0.0)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def shop_words() -> list[str]:
    """Every word of the titles in the runs of `small_runs`."""
    size = SimulatedConfig(users=SMALL["data.simulated.users"], items=SMALL["data.simulated.items"])
    titles = load_dataset(DataConfig(simulated=size)).catalog.texts
    return sorted({word.lower() for title in titles for word in re.findall(r"\w+", title)})
