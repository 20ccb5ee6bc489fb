"""A language model in training: rows of a catalogue in, text vectors with gradients out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmrec.encoders.prefix import cache_states, only_top, read_top
from llmrec.encoders.text import TextEncoder, length_sorted, out_of_memory
from llmrec.encoders.tuning import TunableEncoder, make_trainable
from llmrec.errors import UsageError


class TunedEncoder(nn.Module):
    """The texts of a catalogue, read by a language model whose weights learn."""

    def __init__(
        self,
        config: TunableEncoder,
        texts: list[str],
        template_sha256: str,
        store: Path,
        device: torch.device,
    ) -> None:
        """Load the model, choose what learns, read what stays frozen from the store.

        Args:
            config: model and mode.
            texts: (N,), empty where an item has none.
            template_sha256: of the item-text template, for the store's key.
            store: folder of the store, for cached states.
            device: where the model is put.

        Raises:
            UsageError: The model cannot be loaded or tuned so; the cache is too large.
        """
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config, device)
        depth = len(self.encoder.blocks)
        self.tuned_blocks = config.tuned_blocks(depth)
        self.cached = None
        if config.cache_states and self.tuned_blocks < depth:
            self.cached = cache_states(
                texts, self.encoder, config.frozen_encoder, self.tuned_blocks, config.cache_dtype,
                config.cache_gigabytes, store, template_sha256,
            )  # fmt: skip
        make_trainable(self.encoder, config)
        self.token_flops = self._token_flops()
        if self.cached is not None:
            only_top(self.encoder, self.tuned_blocks)
        self.model = self.encoder.model
        tokens = iter(self.encoder.tokenize([text for text in texts if text]))
        self.tokens = [next(tokens) if text else [] for text in texts]
        self.lengths = np.array([len(ids) for ids in self.tokens], np.int32)
        """(N,): tokens of each text; 0 where there is none."""
        self.batch_tokens, self.step_tokens = config.batch_tokens, config.step_tokens
        self.halvings = 0
        """How often the two above were halved because memory ran out."""
        self.flops = 0
        """Spent with gradients so far; see `_count`."""

    def train(self, mode: bool = True) -> TunedEncoder:
        """Only what learns may drop out: cached and uncached lower blocks then agree."""
        super().train(mode)
        tuned = list(self.encoder.blocks)[-self.tuned_blocks :]
        whole = len(tuned) == len(self.encoder.blocks)
        self.model.train(mode and self.config.dropout and whole)
        for block in tuned:
            block.train(mode and self.config.dropout)
            block.training = mode  # its own flag: without it, it would not checkpoint
            for name, module in block.named_modules():
                if name.endswith("lora_dropout"):
                    module.train(mode)
        return self

    def forward(self, rows: NDArray[np.int64]) -> Tensor:
        """Vectors of some texts, in their order.

        Texts of similar length are read together, trimmed to their longest. Where memory runs out,
        the pieces are halved and everything is read again.

        Args:
            rows: (n,) rows of the catalogue, n > 0, none of them without text.

        Returns:
            (n, H) float32.

        Raises:
            UsageError: A single text does not fit in memory.
        """
        while True:
            try:
                return self._vectors(rows)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            self.halve()  # out here, where the error no longer holds what filled the memory

    def halve(self) -> None:
        """Make the pieces, and what is held of a step, half as large.

        Raises:
            UsageError: They are as small as a single text.
        """
        if self.batch_tokens <= 1:
            raise UsageError(
                "memory does not even suffice for one item text at a time. Lower "
                "encoder.max_item_tokens, set encoder.checkpointing true, or use a smaller model."
            )
        self.batch_tokens //= 2
        self.step_tokens = max(1, self.step_tokens // 2)
        self.halvings += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _vectors(self, rows: NDArray[np.int64]) -> Tensor:
        lengths = self.lengths[rows]  # (n,)
        learning = torch.is_grad_enabled()
        pieces, vectors, held = [], [], 0
        for piece in length_sorted(lengths, self.batch_tokens):
            held += len(piece) * int(lengths[piece].max())
            again = learning and held > self.step_tokens
            part = rows[piece]
            vectors.append(
                checkpoint(self._read, part, use_reentrant=False) if again else self._read(part)
            )
            pieces.append(piece)
            if learning:
                self._count(int(lengths[piece].sum()), again)
        order = np.argsort(np.concatenate(pieces))
        return torch.cat(vectors)[torch.from_numpy(order).to(vectors[0].device)]

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        """Vectors of one piece, (B, H)."""
        device = self.encoder.device
        if self.cached is not None:
            states, ids, real = (part.to(device) for part in self.cached.batch(rows))
            return read_top(self.encoder, states, ids, real)
        return self.encoder.read(*self.encoder.inputs([self.tokens[row] for row in rows]))

    def _token_flops(self) -> tuple[int, int]:
        """Floating-point operations of a token: reading it with gradients, and reading it again.

        Per weight of the blocks 2 on the way there, 2 on the way back through the tuned ones, and 2
        more to learn it. Adapters are counted among their blocks' weights.
        """
        blocks = list(self.encoder.blocks)
        weights = [sum(map(_size, block.parameters())) for block in blocks]
        learned = sum(w.numel() for b in blocks for w in b.parameters() if w.requires_grad)
        tuned = sum(weights[len(blocks) - self.tuned_blocks :])
        run = tuned if self.cached is not None else sum(weights)
        return 2 * (run + tuned + learned + self.config.checkpointing * tuned), 2 * run

    def _count(self, tokens: int, again: bool) -> None:
        once, more = self.token_flops
        self.flops += tokens * (once + again * more)

    def cost(self) -> dict[str, float]:
        """What reading the catalogue once takes, the cache, and what memory made of the options."""
        cached = {} if self.cached is None else self.cached.cost
        return {f"cache_{name}": value for name, value in cached.items()} | {
            "catalogue_flops": int(self.lengths.sum()) * self.token_flops[1],
            "encoder_batch_tokens": self.batch_tokens,
            "encoder_step_tokens": self.step_tokens,
            "memory_halvings": self.halvings,
        }


def _size(weight: Tensor) -> int:
    """Numbers that a weight stands for; nf4 packs two in a byte."""
    return weight.quant_state.shape.numel() if hasattr(weight, "quant_state") else weight.numel()
