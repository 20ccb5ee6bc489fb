"""A language model's lower and upper blocks, run apart exactly as they run together.

Both parts are run by the model's own forward, which makes masks, rotary angles, position biases and
windows as ever. To run the lower part, the upper blocks are taken out. To run the upper part, each
lower block gives way to one that does nothing, the last of them handing on the states of the lower
part in place of what came in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmrec.encoders.text import TextEncoder
from llmrec.errors import UsageError


class _Skip(nn.Module):
    """In the place of a lower block: hands on what comes in, or the cached states."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self.last = last
        self.states: Tensor | None = None
        """(B, T, H) to be handed on next; taken once."""
        if hasattr(block, "attention_type"):  # ModernBERT asks every block for its kind of mask
            self.attention_type = block.attention_type

    def take(self, incoming: Tensor) -> Tensor:
        if not self.last:
            return incoming
        if self.states is None:
            raise RuntimeError("the lower blocks are gone; read_top gives what they would")
        states, self.states = self.states, None
        # As a whole model's would be: of the residual stream's number format, on its device.
        return states.to(incoming.device, incoming.dtype)

    def forward(self, states: Tensor, *inputs: Any, **options: Any) -> Any:
        return self.take(states)


class _SkipTuple(_Skip):
    """For architectures whose blocks return a tuple."""

    def forward(self, states: Tensor, *inputs: Any, **options: Any) -> tuple[Tensor]:
        return (self.take(states),)


class _SkipT5(_Skip):
    """T5's first block makes the position bias that all others share: its table stays."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__(block, last)
        self.attention: Any = None
        attention: Any = block.get_submodule("layer.0.SelfAttention")
        if attention.has_relative_attention_bias:
            del attention.q, attention.k, attention.v, attention.o
            self.attention = attention

    def forward(
        self,
        states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        *inputs: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        if self.attention is not None:
            length = states.shape[1]
            position_bias = self.attention.compute_bias(length, length, device=states.device)
        return self.take(states), position_bias, None


SKIPS: dict[str, type[_Skip]] = {
    "bert": _Skip,
    "distilbert": _Skip,
    "electra": _Skip,
    "gemma3_text": _Skip,
    "gpt2": _Skip,
    "gpt_neox": _Skip,
    "llama": _Skip,
    "mistral": _Skip,
    "modernbert": _Skip,
    "mpnet": _SkipTuple,
    "opt": _Skip,
    "qwen2": _Skip,
    "qwen3": _Skip,
    "roberta": _Skip,
    "t5": _SkipT5,
    "xlm-roberta": _Skip,
}
"""Architectures whose upper blocks are known to need nothing of the lower ones but their states,
and T5's bias; each is held to the whole model in the tests."""


class _NoTable(nn.Module):
    """In the place of the token embeddings, whose values would go unread: zeros of their shape."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        weight = table.get_parameter("weight")
        self.width, self.dtype = weight.shape[1], weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)  # (B, T, E)


def check_listed(encoder: TextEncoder) -> type[_Skip]:
    """What takes the place of this architecture's blocks.

    Raises:
        UsageError: It is not known to run so.
    """
    model: Any = encoder.model
    kind: str = model.config.model_type
    if kind not in SKIPS:
        raise UsageError(
            f"encoder.model={encoder.config.model} is of type {kind}, of which llmrec cannot cache "
            f"hidden states (it can of {', '.join(sorted(SKIPS))}). Set encoder.cache_states "
            "false: the lower layers then run at every step."
        )
    return SKIPS[kind]


@contextlib.contextmanager
def only_lower(encoder: TextEncoder, below: int) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """A function of ids and real places, (B, T) each -> (B, T, H) after the lowest blocks.

    Those above do not run; on leaving they are back in their places. The model is left in
    evaluation mode.

    Args:
        encoder: whole.
        below: blocks that run, at least 1.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Any) -> None:
        kept.append(output if isinstance(output, Tensor) else output[0])

    def read(ids: Tensor, real: Tensor) -> Tensor:
        with torch.inference_mode():
            encoder.model(input_ids=ids, attention_mask=None if real.all() else real)
        return kept.pop().to(ids.device)

    upper = list(encoder.blocks[below:])
    encoder.model.eval()
    del encoder.blocks[below:]
    hook = encoder.blocks[-1].register_forward_hook(keep)
    try:
        yield read
    finally:
        hook.remove()
        encoder.blocks.extend(upper)


def only_top(encoder: TextEncoder, top: int) -> None:
    """Drop all blocks but the highest, and the token embeddings; what nothing else holds is freed.

    From then on only `read_top` reads. The list of blocks keeps its length, so the remaining ones
    keep their numbers, names, adapters and kinds of attention.

    Args:
        encoder: changed in place; adapters in the blocks that stay may have been added before.
        top: blocks that stay, at least 1 and fewer than there are.

    Raises:
        UsageError: The architecture is not listed.
    """
    skip = check_listed(encoder)
    below = len(encoder.blocks) - top
    if not 0 < below < len(encoder.blocks):
        raise ValueError(f"top={top} of {len(encoder.blocks)} blocks leaves none above or below")
    for place in range(below):
        encoder.blocks[place] = skip(encoder.blocks[place], last=place == below - 1)
    model: Any = encoder.model
    model.set_input_embeddings(_NoTable(model.get_input_embeddings()))


def read_top(encoder: TextEncoder, states: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Vectors of texts from the cached states of their tokens, with gradients where wanted.

    What runs is the whole model without its lower blocks, so drop-out is where modules are in
    training mode. May be called inside ``torch.utils.checkpoint``, and the blocks may checkpoint.

    Args:
        encoder: after `only_top`.
        states: (B, T, H) of any number format; those of padded places are never looked at.
        ids: (B, T) token ids, padded on the right.
        real: (B, T) bool, False where padded.

    Returns:
        (B, H) float32.
    """
    entrance = next(block for block in reversed(encoder.blocks) if isinstance(block, _Skip))
    entrance.states = states
    try:
        vectors = encoder.read(ids, real)
        if entrance.states is not None:  # a model in training mode may leave whole blocks out
            raise RuntimeError("the cached states were not read; only blocks may be in training")
    finally:
        entrance.states = None  # out of memory on the way: nothing may stay
    return vectors
