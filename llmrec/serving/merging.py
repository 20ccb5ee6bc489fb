"""A tuned or quantised language model as plain float32 weights, and as files of any loader's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModelForTextEncoding

from llmrec.encoders.text import TextEncoder
from llmrec.errors import UsageError

ADAPTER = "default"
"""The name under which `llmrec.encoders.tuning` adds adapters."""
PER_BLOCK = ("layer_types", "mlp_layer_types")
"""Lists in a configuration with one entry per block."""


def make_plain(encoder: TextEncoder) -> None:
    """Turn quantised layers and adapters into plain ones, all in float32, in place.

    A layer's 4- or 8-bit weights are dequantised first, then its adapter's product is added, so the
    sum is never rounded back. What the layer computed before stays up to rounding, but for int8,
    which also rounds the layer's inputs.

    Args:
        encoder: whole; adapters, where there are any, come from PEFT and are called default.
    """
    model: Any = encoder.model
    if encoder.config.quantisation != "none":
        _dequantise(model)
        if hasattr(model, "hf_quantizer"):  # the half of an encoder-decoder has none
            model.hf_quantizer.remove_quantization_config(model)
    nn.Module.float(model)  # transformers' own refuses what was loaded quantised
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            _replace(model, name, _merged(module))


def _dequantise(model: nn.Module) -> None:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # seconds, and seldom needed

    for name, module in list(model.named_modules()):
        packed: Any = module
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        elif isinstance(module, Linear8bitLt):
            # The scales move from the weight to the layer's state when it is first used.
            scales = packed.weight.SCB if packed.state.SCB is None else packed.state.SCB
            weight = int8_vectorwise_dequant(packed.weight.data, scales)
        else:
            continue
        _replace(model, name, _linear(weight.float(), packed.bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain layer with these weights, (out, in) and (out,)."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return layer


def _merged(module: BaseTunerLayer) -> nn.Module:
    """The layer below an adapter, with what the adapter adds in its weight."""
    if not isinstance(module, LoraLayer):
        raise TypeError(f"{type(module).__name__} is no adapter that llmrec adds")
    base: Any = module.get_base_layer()
    layer: Any = module
    with torch.no_grad():
        if ADAPTER in layer.lora_variant:  # DoRA: a magnitude of its own for each row
            merged = layer.lora_variant[ADAPTER].merge_safe(layer, ADAPTER, base.weight)
        else:
            merged = base.weight + layer.get_delta_weight(ADAPTER)
        base.weight = nn.Parameter(merged, requires_grad=False)
    return base  # type: ignore[no-any-return]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def save_plain(encoder: TextEncoder, folder: Path) -> None:
    """Write a plain model, cut to the blocks that run, and its tokeniser, as transformers does.

    Args:
        encoder: after `make_plain`.
        folder: an existing one; gets config.json, model.safetensors and the tokeniser's files.

    Raises:
        UsageError: It is half of an encoder-decoder that transformers does not load alone.
    """
    model: Any = encoder.model
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(encoder.blocks)
    for name in PER_BLOCK:
        if hasattr(config, name):
            setattr(config, name, getattr(config, name)[: len(encoder.blocks)])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    if _is_whole(model):
        model.config = config
    else:
        model = _as_half(encoder, config)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # its name for the disk's refusals
        raise OSError(str(error)) from error
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = encoder.config.max_item_tokens
    tokenizer.padding_side = "right"  # as texts are read in training
    tokenizer.save_pretrained(folder)


def _is_whole(model: Any) -> bool:
    """Whether transformers makes this very class of the model's configuration."""
    kinds = MODEL_MAPPING.get(type(model.config), ())
    return isinstance(model, kinds)


def _as_half(encoder: TextEncoder, config: Any) -> Any:
    """The encoder of an encoder-decoder in the class that loads it without the decoder."""
    try:
        with torch.device("meta"):
            half = AutoModelForTextEncoding.from_config(config)
        fits = type(half.encoder) is type(encoder.model) and hasattr(half, "shared")
    except (ValueError, AttributeError):
        fits = False
    if not fits:
        raise UsageError(
            f"encoder.model={encoder.config.model} is the encoder of a {config.model_type}, which "
            "transformers does not load without its decoder. Export the items (--what items)."
        )
    model: Any = encoder.model
    half.encoder, half.shared = model, model.get_input_embeddings()
    return half
