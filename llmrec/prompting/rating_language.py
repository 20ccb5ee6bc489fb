"""A language model that predicts a rating: it reads the ratings before it as a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrec.encoders.text import TextEncoder, length_sorted
from llmrec.encoders.tuning import TunableEncoder, make_trainable
from llmrec.prompting.rating_data import Offsets, Pairs, Rated
from llmrec.prompting.rating_models import Rater, RatingModelConfig, linear_weights
from llmrec.prompting.templates import Prompt

AT_ONCE = 4096
"""Prompts of a frozen model that are written and read before the next are."""


class PromptReader:
    """Writes a pair as a prompt and cuts it to the tokens that the model is to read."""

    def __init__(
        self,
        template: Prompt,
        titles: Sequence[str],
        rated: Rated,
        offsets: Offsets,
        history: int,
        encoder: TextEncoder,
    ) -> None:
        """`titles` (N,) as they stand in a prompt."""
        self.template, self.titles, self.rated = template, titles, rated
        self.history, self.encoder = history, encoder
        self.scale = (f"{offsets.low:g}", f"{offsets.high:g}")

    def prompt(self, pair: Pairs, count: int) -> str:
        """The prompt of a single pair with its `count` most recent ratings."""
        rows = range(int(pair.stop[0]) - count, int(pair.stop[0]))
        rated = [(self.titles[self.rated.items[r] - 1], f"{self.rated.stars[r]:g}") for r in rows]
        candidate = self.titles[int(pair.item[0]) - 1]
        return self.template.render(rated=rated, candidate=candidate, scale=self.scale)

    def fitted(self, pair: Pairs) -> str:
        """The prompt of a single pair with as many of its latest ratings as fit in the tokens.

        Whole ratings are left out, the oldest first, so that what is read stays well-formed; a
        prompt that is too long without any is cut by the tokeniser.
        """
        limit, config = self.encoder.config.max_item_tokens, self.encoder.config
        count = int(min(pair.stop[0] - pair.first[0], self.history))
        while True:
            text = self.prompt(pair, count)
            tokens = len(self.encoder.tokenizer(config.prompt + text, verbose=False)["input_ids"])
            if tokens <= limit or not count:
                return text
            count = min(count - 1, count * limit // tokens)

    def texts(self, pairs: Pairs) -> list[str]:
        """All prompts, (P,)."""
        return [self.fitted(pairs.take(np.array([row]))) for row in range(len(pairs))]


class LanguageRater(Rater):
    """A language model that reads a prompt; frozen, each prompt is read once and kept."""

    def __init__(
        self,
        config: RatingModelConfig,
        encoder: TunableEncoder,
        template: Prompt,
        titles: Sequence[str],
        rated: Rated,
        offsets: Offsets,
        training: Pairs,
        device: torch.device,
    ) -> None:
        """Load the model.

        Raises:
            UsageError: It cannot be loaded or tuned so.
        """
        super().__init__(config, rated, offsets, training)
        self.tune = encoder
        self.encoder = TextEncoder(encoder, device)
        # Whatever the model's files say: the instruction of a prompt that is too long must stay.
        self.encoder.tokenizer.truncation_side = "right"
        self.reader = PromptReader(template, titles, rated, offsets, config.history, self.encoder)
        self.frozen_vectors: dict[int, NDArray[np.float32]] = {}
        """By the pair's target, where nothing of the language model learns."""
        with torch.inference_mode():
            width = self.encoder.read(*self.encoder.inputs(self.encoder.tokenize(["a"]))).shape[1]
        self.tuned_blocks: list[nn.Module] = []
        if encoder.tuned:
            blocks = list(self.encoder.blocks)
            self.tuned_blocks = blocks[-encoder.tuned_blocks(len(blocks)) :]
            make_trainable(self.encoder, encoder)
            self.model = self.encoder.model
        self._add_head(width)

    @property
    def language_model(self) -> nn.Module | None:
        """The language model where it learns."""
        return self.encoder.model if self.tune.tuned else None

    def train(self, mode: bool = True) -> LanguageRater:
        """Drop-out of the language model's own only where asked for; adapters' always."""
        super().train(mode)
        self.encoder.model.train(mode and self.tune.dropout)
        for block in self.tuned_blocks:
            block.training = mode  # its own flag: without it, it would not checkpoint
            for name, module in block.named_modules():
                if name.endswith("lora_dropout"):
                    module.train(mode)
        return self

    def prepare(self, pairs: Pairs, advance: Callable[[float], object]) -> None:
        """Read the prompts, where the language model is frozen and they are not known yet."""
        if self.tune.tuned:
            return
        new = [
            row for row, key in enumerate(pairs.target.tolist()) if key not in self.frozen_vectors
        ]
        for start in range(0, len(new), AT_ONCE):
            part = pairs.take(np.array(new[start : start + AT_ONCE]))
            vectors, _ = self.encoder.encode(self.reader.texts(part), advance)
            self.frozen_vectors.update(zip(part.target.tolist(), vectors, strict=True))

    def state(self, pairs: Pairs) -> Tensor:
        """(B, H); prompts of similar length are read together."""
        if not self.tune.tuned:
            vectors = np.stack([self.frozen_vectors[key] for key in pairs.target.tolist()])
            return torch.from_numpy(vectors).to(self.head.levels.device)
        tokens = self.encoder.tokenize(self.reader.texts(pairs))
        lengths = np.array([len(ids) for ids in tokens], np.int32)
        pieces = list(length_sorted(lengths, self.tune.batch_tokens))
        read = [
            self.encoder.read(*self.encoder.inputs([tokens[row] for row in piece]))
            for piece in pieces
        ]
        if torch.is_grad_enabled():
            # On the way there all weights, back those of tuned blocks, then what is to change.
            weights, blocks = self.encoder.non_embedding_parameters, len(self.encoder.blocks)
            back = weights * len(self.tuned_blocks) // blocks
            learned = linear_weights(self.encoder.model, learned=True)
            self.flops += 2 * int(lengths.sum()) * (weights + back + learned)
        order = np.argsort(np.concatenate(pieces))
        return torch.cat(read)[torch.from_numpy(order).to(read[0].device)]
