"""Prompts as token ids: tokenizers, whole words, packed batches.

The one place where text becomes numbers, in training and in answering alike: a prompt has the same
ids and the same whole-word numbers in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llmrec.errors import UsageError

Int32 = NDArray[np.int32]

IGNORED = -100
"""A label that no loss is taken at."""
WHOLE_WORDS = 512
"""Rows of the whole-word table (P5); words from the 511th on share the last one."""
SIMILAR = 4
"""How many times longer than another a prompt of the same packed batch may be."""
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, whole: Sequence[str]
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of one's own, for models that start from nothing.

    Args:
        texts: what it will read, or a sample of it.
        vocabulary: most tokens learned; those of `whole` and 256 bytes come on top.
        whole: strings that are one token each, such as the cluster tokens of an item indexing.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True))
    # A word and the space before it are one piece, so that a token never spans two words.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    special = [PAD, END, UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary + len(special), special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )
    add_whole_tokens(made, whole)
    return made


def add_whole_tokens(tokenizer: PreTrainedTokenizerFast, whole: Sequence[str]) -> int:
    """Make strings one token each; how many of them the tokenizer did not know."""
    return int(tokenizer.add_tokens(list(whole)))


@dataclass(frozen=True)
class Tokenized:
    """One prompt, ready to be read."""

    ids: Int32
    """(T,)."""
    words: Int32
    """The number of the word each token belongs to, from 1 on, (T,); 0 for the end token, and all
    along for decoder-only models, which have no whole-word embedding."""


class PromptTokenizer:
    """Prompts and answers as ids, in the form that a kind of model reads them.

    Encoder-decoder: ``prompt </s>`` to the encoder, ``answer </s>`` from the decoder. Decoder-only:
    the prompt in the model's chat template where it has one, else followed by a line break; then
    ``answer </s>``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        encoder_decoder: bool,
        max_input_tokens: int,
        max_target_tokens: int,
    ) -> None:
        """Limits count special tokens too."""
        if not isinstance(tokenizer.eos_token_id, int):
            raise UsageError("model.name: its tokenizer has no end token. Use another model.")
        if not tokenizer.is_fast:
            raise UsageError("model.name: its tokenizer tells no offsets. Use another model.")
        self.tokenizer, self.encoder_decoder = tokenizer, encoder_decoder
        self.max_input_tokens, self.max_target_tokens = max_input_tokens, max_target_tokens
        self.end: int = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        self.pad: int = pad if isinstance(pad, int) else self.end
        self.cut_prompts = 0
        """Prompts so far that were longer than allowed."""
        self.cut_answers = 0
        """Answers so far that were longer than allowed."""

    def prompts(self, texts: Sequence[str]) -> list[Tokenized]:
        """Read prompts; one that is too long loses its first words, the oldest items among them."""
        found = self._read(texts)
        for row, prompt in enumerate(found):
            if len(prompt.ids) > self.max_input_tokens:
                self.cut_prompts += 1
                found[row] = self._shortened(texts[row])
        return found

    def _shortened(self, text: str) -> Tokenized:
        """What is left of a prompt when as few of its first words go as need be."""
        words = text.split(" ")
        low, high = 1, len(words) - 1  # words to drop: too few, and enough if that is possible
        while low < high:
            middle = (low + high) // 2
            (read,) = self._read([" ".join(words[middle:])])
            if len(read.ids) <= self.max_input_tokens:
                high = middle
            else:
                low = middle + 1
        (read,) = self._read([" ".join(words[high:])])
        # Where not even the last word fits, its last tokens.
        return Tokenized(read.ids[-self.max_input_tokens :], read.words[-self.max_input_tokens :])

    def _read(self, texts: Sequence[str]) -> list[Tokenized]:
        """Prompts of any length as tokens."""
        found = []
        written = [self._written(text) for text in texts]
        batch = self.tokenizer(
            written, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        rows = zip(written, batch["input_ids"], batch["offset_mapping"], strict=True)
        for text, pieces, offsets in rows:
            words = np.zeros(len(pieces), np.int32)
            if self.encoder_decoder:
                pieces, words = [*pieces, self.end], np.append(word_numbers(text, offsets), 0)
            found.append(Tokenized(np.array(pieces, np.int32), words.astype(np.int32)))
        return found

    def _written(self, text: str) -> str:
        if self.encoder_decoder:
            return text
        if self.tokenizer.chat_template is None:
            return f"{self.tokenizer.bos_token or ''}{text}\n"
        message = [{"role": "user", "content": text}]
        # enable_thinking is read by templates of models that can think aloud; others ignore it.
        return str(
            self.tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        )

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Answers, each with its end token."""
        batch = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        found: list[list[int]] = []
        for ids in batch["input_ids"]:
            if len(ids) >= self.max_target_tokens:
                self.cut_answers += 1
            found.append([*ids[: self.max_target_tokens - 1], self.end])
        return found


def word_numbers(text: str, offsets: Sequence[tuple[int, int]]) -> Int32:
    """The number of the word that each token is part of, from 1 on (P5's whole-word index).

    A word ends where a space begins. So the pieces of ``item_1001`` share a number, and so do the
    cluster tokens of one item.

    Args:
        text: what was tokenized.
        offsets: each token's first and past-the-last character in it.
    """
    if not offsets:
        return np.empty(0, np.int32)
    space = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32) <= ord(" ")
    begins = ~space & np.concatenate([[True], space[:-1]])
    word = np.cumsum(begins)  # of each character; a space belongs to the word before it
    last = np.array(offsets, dtype=np.int64)[:, 1] - 1
    # A token of nothing but a space opens the word behind it.
    numbers = word[last] + space[last]
    return np.minimum(numbers, WHOLE_WORDS - 1).astype(np.int32)


@dataclass(frozen=True)
class TrainingBatch:
    """Prompts with their answers, packed: several in a row, none seeing another.

    R rows of T tokens; of an encoder-decoder, L answer tokens a row. The mean row has hardly any
    padding, however long the longest prompt is.
    """

    ids: Tensor
    """Prompt tokens (decoder-only: prompts and answers), (R, T)."""
    words: Tensor
    """Whole-word numbers, (R, T)."""
    segments: Tensor
    """Which of a row's prompts a token belongs to, from 1 on; 0 is padding, (R, T)."""
    labels: Tensor
    """The token to be foretold at each place, `IGNORED` elsewhere, (R, L) or (R, T)."""
    answer_segments: Tensor
    """As `segments`, of the answers, (R, L) or (R, T)."""

    @property
    def answer_tokens(self) -> int:
        """Tokens that a loss is taken at."""
        return int((self.labels != IGNORED).sum())

    @property
    def prompt_tokens(self) -> int:
        """Tokens that are read (decoder-only: answers among them)."""
        return int((self.segments > 0).sum())

    def to(self, device: torch.device) -> TrainingBatch:
        """The same on a device."""
        return TrainingBatch(
            self.ids.to(device),
            self.words.to(device),
            self.segments.to(device),
            self.labels.to(device),
            self.answer_segments.to(device),
        )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put pieces into as few rows as first-fit, longest first, finds; row -> its pieces.

    Args:
        lengths: of the pieces.
        capacity: of a row; a piece that is longer gets a row of its own.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for piece in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[piece]
        row = next((row for row, space in enumerate(free) if space >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(piece)
        free[row] -= length
    return rows


def training_batches(
    tokens: PromptTokenizer, prompts: Sequence[str], answers: Sequence[str], packs: bool = True
) -> tuple[TrainingBatch, ...]:
    """Prompts and their answers, packed; each batch has prompts of similar length.

    Attention costs a row's tokens times its length, so a short prompt would pay dearly in the row
    of a long one: in a batch none is longer than `SIMILAR` times another.

    Args:
        tokens: reads both.
        prompts: texts.
        answers: as many.
        packs: whether a row may hold several prompts, as the model can tell them apart.
    """
    questions, targets = tokens.prompts(prompts), tokens.answers(answers)
    order = sorted(range(len(questions)), key=lambda row: (-len(questions[row].ids), row))
    groups: list[list[int]] = []
    for row in order:
        if not groups or SIMILAR * len(questions[row].ids) < len(questions[groups[-1][0]].ids):
            groups.append([])
        groups[-1].append(row)
    return tuple(
        packed(
            tokens,
            [questions[row] for row in group],
            [targets[row] for row in group],
            None if packs else 0,
        )
        for group in groups
    )


def packed(
    tokens: PromptTokenizer,
    questions: Sequence[Tokenized],
    targets: Sequence[list[int]],
    capacity: int | None = None,
) -> TrainingBatch:
    """Prompts and answers as one batch.

    Args:
        tokens: read them.
        questions: prompts.
        targets: as many answers.
        capacity: tokens that a row may be filled up to; None: as many as the longest prompt has
            (decoder-only: with its answer); fewer than that: one prompt a row.
    """
    if tokens.encoder_decoder:
        lengths = [len(question.ids) for question in questions]
        rows = pack(lengths, max(lengths) if capacity is None else capacity)
        return TrainingBatch(
            _filled(rows, lambda piece: questions[piece].ids, tokens.pad),
            _filled(rows, lambda piece: questions[piece].words, 0),
            _segments(rows, lengths),
            _filled(rows, lambda piece: targets[piece], IGNORED),
            _segments(rows, [len(target) for target in targets]),
        )
    whole = [[*q.ids.tolist(), *target] for q, target in zip(questions, targets, strict=True)]
    # Nothing is foretold before the answer: what stands in a prompt is given.
    wanted = [[IGNORED] * len(q.ids) + target for q, target in zip(questions, targets, strict=True)]
    lengths = [len(ids) for ids in whole]
    rows = pack(lengths, max(lengths) if capacity is None else capacity)
    segments = _segments(rows, lengths)
    return TrainingBatch(
        _filled(rows, lambda piece: whole[piece], tokens.pad),
        torch.zeros_like(segments),
        segments,
        _filled(rows, lambda piece: wanted[piece], IGNORED),
        segments,
    )


def _filled(
    rows: list[list[int]], values: Callable[[int], Sequence[int] | Int32], fill: int
) -> Tensor:
    """Pieces side by side in their rows, padded at the right, (R, longest row)."""
    joined = [np.concatenate([np.asarray(values(piece)) for piece in row]) for row in rows]
    made = np.full((len(rows), max(map(len, joined))), fill, dtype=np.int64)
    for row, found in zip(made, joined, strict=True):
        row[: len(found)] = found
    return torch.from_numpy(made)


def _segments(rows: list[list[int]], lengths: Sequence[int]) -> Tensor:
    """Which piece of its row each token belongs to, from 1 on, (R, longest row)."""
    places = {piece: place for row in rows for place, piece in enumerate(row, start=1)}
    return _filled(rows, lambda piece: [places[piece]] * lengths[piece], 0)


def question_batch(questions: Sequence[Tokenized], pad: int, left: bool) -> tuple[Tensor, ...]:
    """Prompts side by side for answering: ids, whole-word numbers and mask, each (B, T).

    Args:
        questions: B prompts.
        pad: the padding token.
        left: whether padding comes first, so that all answers begin at one place.
    """
    width = max(len(question.ids) for question in questions)
    ids = np.full((len(questions), width), pad, dtype=np.int64)
    words, mask = np.zeros_like(ids), np.zeros_like(ids)
    for row, question in enumerate(questions):
        length = len(question.ids)
        where = slice(width - length, width) if left else slice(0, length)
        ids[row, where], words[row, where], mask[row, where] = question.ids, question.words, 1
    return torch.from_numpy(ids), torch.from_numpy(words), torch.from_numpy(mask)
