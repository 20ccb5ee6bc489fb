"""Tiny language models of several architectures, made on the spot."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = "red green blue shoe boot hat coat scarf for men women kids summer winter rain snow".split()

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32}

ARCHITECTURES = {
    "bert": transformers.BertConfig(**SIZES, intermediate_size=64),
    "opt": transformers.OPTConfig(
        **SIZES, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0,
        bos_token_id=2, eos_token_id=3,
    ),
    "qwen3": transformers.Qwen3Config(
        **SIZES, num_key_value_heads=1, head_dim=16, intermediate_size=64, bos_token_id=2,
        eos_token_id=3,
    ),
    "t5": transformers.T5Config(
        d_model=32, num_layers=3, num_heads=2, d_ff=64, d_kv=16, vocab_size=32, pad_token_id=0,
        eos_token_id=3, decoder_start_token_id=0,
    ),
}  # fmt: skip


def save_tiny_model(name: str, folder: Path) -> Path:
    """A random model with 3 layers and its tokeniser, in `folder`."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(ARCHITECTURES[name]).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, lower case, between two special tokens."""
    vocabulary = {
        word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
