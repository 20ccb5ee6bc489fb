"""Tiny chat models for the real engine: a tokeniser trained on the spot and random Llamas."""

from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|end|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
POSITIONS = 4096


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; frequent words, and lines that all texts share, are one token."""
    shared = set.intersection(*(set(text.splitlines()) for text in texts)) - {""}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # As chat models have them: an answer of one token must be able to say yes.
    words = ["yes\nno"] * len(texts)
    bpe.train_from_iterator([*texts, *words], trainer)
    bpe.add_tokens(sorted(shared))  # instructions: half of a prompt, and the same in each
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
    )


def llama(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> torch.nn.Module:
    """A random Llama whose vocabulary is the tokeniser's."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,  # the least that vLLM's kernels for processors take
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    # The usual .02 is made for widths in the thousands: with it so narrow a model starts blind.
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=width**-0.5)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def save_adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter of rank 12 with weights as large as the model's own."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(r=12, lora_alpha=24, target_modules=["q_proj", "v_proj", "o_proj"])
    adapted = peft.get_peft_model(plain, config)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(folder)
    return folder
