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

ENCODER = SIZES | {"intermediate_size": 64, "pad_token_id": 0}
DECODER = ENCODER | {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
WINDOW = 4  # tokens: shorter than most texts of the tests
FULL_AND_SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]

MORE_ARCHITECTURES = {
    "distilbert": transformers.DistilBertConfig(
        dim=32, n_layers=3, n_heads=2, hidden_dim=64, vocab_size=32, pad_token_id=0
    ),
    "electra": transformers.ElectraConfig(**ENCODER, embedding_size=16),
    "gemma3_text": transformers.Gemma3TextConfig(
        **DECODER, head_dim=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=2, n_inner=64, vocab_size=32, bos_token_id=2, eos_token_id=3
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**ENCODER, bos_token_id=2, eos_token_id=3),
    "llama": transformers.LlamaConfig(**DECODER),
    "mistral": transformers.MistralConfig(**DECODER, head_dim=16, sliding_window=WINDOW),
    "modernbert": transformers.ModernBertConfig(
        **ENCODER, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
        local_attention=WINDOW, layer_types=FULL_AND_SLIDING,
    ),
    "mpnet": transformers.MPNetConfig(**ENCODER),
    "opt_350m": transformers.OPTConfig(  # norms after the blocks, narrower embeddings
        **SIZES, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0,
        bos_token_id=2, eos_token_id=3, do_layer_norm_before=False,
    ),
    "qwen2": transformers.Qwen2Config(
        **DECODER, use_sliding_window=True, sliding_window=WINDOW, layer_types=FULL_AND_SLIDING
    ),
    "roberta": transformers.RobertaConfig(**ENCODER),
    "xlm-roberta": transformers.XLMRobertaConfig(**ENCODER),
}  # fmt: skip


def save_tiny_model(name: str, folder: Path) -> Path:
    """A random model with 3 layers and its tokeniser, in `folder`."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config((ARCHITECTURES | MORE_ARCHITECTURES)[name]).save_pretrained(
        folder
    )
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer(known: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """Whole words, lower case, between two special tokens."""
    vocabulary = {
        word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *known])
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
