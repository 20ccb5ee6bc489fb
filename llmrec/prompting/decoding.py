"""Beam search for answers that name items, under a prefix tree or without one, and answer scores.

Both searches are one: rows of unfinished answers, each at a node of the tree, grow by a token at a
time. They differ in the tokens a row may grow by. An answer's score is the sum of the
log-probabilities of its tokens over the whole vocabulary, end token included; it is neither
normalised by length nor among the tokens the tree allows, so scores compare across items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from llmrec.data.interactions import Float32, Int32, Int64
from llmrec.errors import UsageError
from llmrec.prompting.trie import Trie

DIVERGED = (
    "A logit is NaN or infinite, so no answer can be scored: the model has diverged. "
    "Lower the learning rate or clip gradients, and train again."
)
NOWHERE = -1
"""The node of an answer that has left the tree."""


class Steps(Protocol):
    """A language model that goes on from B prompts, a token at a time. V is its vocabulary."""

    def start(self) -> Tensor:
        """Logits of the first answer token, (B, V)."""

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Logits of the next token, (R, V): new row r is earlier row ``rows[r]`` and a token.

        Args:
            rows: (R,) int64, ascending by prompt; the earlier rows are those of the last call.
            tokens: (R,) int64, what each new row appends.
        """


class Seq2SeqSteps:
    """An encoder-decoder of Hugging Face, such as T5, after its encoder; in evaluation mode."""

    def __init__(self, model: Any, encoder_hidden: Tensor, mask: Tensor) -> None:
        """Go on from encoded prompts.

        Args:
            model: The model, `T5ForConditionalGeneration` or alike.
            encoder_hidden: What its encoder made of the prompts, (B, T, D).
            mask: (B, T), 1 at tokens and 0 at padding.
        """
        self.model, self.hidden, self.mask = model, encoder_hidden, mask
        self.prompts = torch.arange(len(encoder_hidden), device=encoder_hidden.device)  # of rows
        self.cache: Any = None
        self.cross: list[tuple[Tensor, Tensor]] = []  # keys and values of the prompts, by layer

    @torch.inference_mode()
    def start(self) -> Tensor:
        """See `Steps`."""
        begin = self.model.config.decoder_start_token_id
        logits = self._forward(self.prompts.new_full((len(self.prompts),), begin))
        layers = self.cache.cross_attention_cache.layers
        self.cross = [(layer.keys, layer.values) for layer in layers]
        return logits

    @torch.inference_mode()
    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """See `Steps`."""
        prompts = self.prompts[rows]
        if not torch.equal(prompts, self.prompts):
            # Rows of one prompt share what they attend to, so these move only with the prompts.
            layers = self.cache.cross_attention_cache.layers
            for layer, (keys, values) in zip(layers, self.cross, strict=True):
                layer.keys, layer.values = keys[prompts], values[prompts]
        self.cache.self_attention_cache.batch_select_indices(rows)
        self.prompts = prompts
        return self._forward(tokens)

    def _forward(self, tokens: Tensor) -> Tensor:
        """(R,) -> (R, V)."""
        hidden = self.hidden
        if self.cache is not None:  # its keys and values are known: only the shape is looked at
            hidden = hidden[:1].expand(len(tokens), -1, -1)
        found = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=self.mask[self.prompts],
            decoder_input_ids=tokens[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = found.past_key_values
        logits: Tensor = found.logits[:, -1]
        return logits


class CausalSteps:
    """A decoder-only model of Hugging Face, such as Llama; in evaluation mode."""

    def __init__(self, model: Any, input_ids: Tensor, mask: Tensor) -> None:
        """Go on from prompts.

        Args:
            model: The model, `LlamaForCausalLM` or alike.
            input_ids: The prompts, padded on the left, (B, T).
            mask: (B, T), 1 at tokens and 0 at padding.
        """
        if not bool(mask[:, -1].all()):
            raise ValueError("prompts must be padded on the left.")
        self.model, self.ids, self.mask = model, input_ids, mask
        self.cache: Any = None

    @torch.inference_mode()
    def start(self) -> Tensor:
        """See `Steps`."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        return self._forward(self.ids, positions)

    @torch.inference_mode()
    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """See `Steps`."""
        self.cache.batch_select_indices(rows)
        mask = self.mask[rows]
        self.mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return self._forward(tokens[:, None], mask.sum(1, keepdim=True))

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(R, T), (R, T) -> (R, V)."""
        found = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = found.past_key_values
        logits: Tensor = found.logits[:, -1]
        return logits


@dataclass(frozen=True)
class Beams:
    """The likeliest answers to B prompts, at most K each."""

    items: Int32
    """(B, K): items, best first, padded with 0."""
    scores: Float32
    """(B, K): summed log-probabilities; -inf at the padding."""
    invalid: Int64
    """(B,): answers that named no item, or did not end."""
    seen: Int64
    """(B,): answers that named an item seen before."""
    duplicates: Int64
    """(B,): answers that named an item of the list again: none, as each item has one answer in the
    tree and the answers of a search are distinct."""


class _Rows(NamedTuple):
    """R unfinished answers, sorted by prompt."""

    prompts: Tensor
    """(R,)."""
    nodes: Tensor
    """(R,): where each stands in the tree."""
    scores: Tensor
    """(R,): log-probability so far."""


class _Growth(NamedTuple):
    """What rows may become by one more token: E candidates, sorted by prompt."""

    rows: Tensor
    """(E,): the row that grows."""
    tokens: Tensor
    """(E,): by which token."""
    nodes: Tensor
    """(E,): where it then stands."""
    scores: Tensor
    """(E,): log-probability of the whole."""
    ended: Tensor
    """(E,): whether it is a whole answer."""


@torch.inference_mode()
def constrained_beams(steps: Steps, trie: Trie, beams: int, seen: Sequence[Int32]) -> Beams:
    """The likeliest items that a beam search under the tree finds: all real, distinct, unseen.

    Args:
        steps: The model, at B prompts.
        trie: Every item's answer.
        beams: K: unfinished answers kept at each step, and items given back. With as many beams as
            items the search is exhaustive.
        seen: (B, any): items that may not be answered; a branch with nothing but seen items is
            shut, so that no beam is spent on it.

    Returns:
        Up to K items each: fewer where fewer are unseen.

    Raises:
        UsageError: The model gives logits that are NaN or infinite.
    """
    logits = steps.start()
    tree = _Tree(trie, logits.device)
    shut = tree.shut_leaves(seen)
    scores, nodes = _search(steps, logits, beams, partial(tree.children, shut=shut))
    none = np.zeros(len(scores), np.int64)
    return Beams(tree.items_at(nodes), scores.cpu().numpy(), none, none, none)


@torch.inference_mode()
def free_beams(
    steps: Steps,
    trie: Trie,
    beams: int,
    end_token: int,
    max_tokens: int,
    seen: Sequence[Int32],
) -> Beams:
    """The likeliest answers of an ordinary beam search, and how many of them name no unseen item.

    Args:
        steps: The model, at B prompts.
        trie: Every item's answer.
        beams: K: answers sought.
        end_token: What ends an answer.
        max_tokens: An answer that has not ended by then is cut off, and invalid.
        seen: (B, any): items that may not be answered.

    Returns:
        Up to K items each: of K answers those that name an unseen item.

    Raises:
        UsageError: The model gives logits that are NaN or infinite.
    """
    logits = steps.start()
    tree = _Tree(trie, logits.device)
    left = iter(range(max_tokens - 1, -1, -1))

    def grow(rows: _Rows, logits: Tensor) -> _Growth:
        return _likeliest(tree, rows, logits, beams, end_token, last=next(left) == 0)

    scores, nodes = _search(steps, logits, beams, grow)
    items, values = tree.items_at(nodes), scores.cpu().numpy()
    answers = ~np.isneginf(values)
    invalid = (answers & (items == 0)).sum(1)
    known = np.array([np.isin(row, met) for row, met in zip(items, seen, strict=True)])
    known &= items > 0
    kept = (items > 0) & ~known
    order = np.argsort(~kept, axis=1, kind="stable")  # what is left moves to the front
    items = np.take_along_axis(np.where(kept, items, 0), order, axis=1)
    values = np.take_along_axis(np.where(kept, values, -np.inf), order, axis=1)
    none = np.zeros(len(items), np.int64)
    return Beams(items, values.astype(np.float32), invalid, known.sum(1), none)


@torch.inference_mode()
def choice_log_probs(steps: Steps, choices: Sequence[Sequence[int]]) -> Tensor:
    """Log-probability of each whole answer, such as yes and no: n answers -> (B, n).

    Beginnings that answers share are run once. Not normalised among the choices.

    Raises:
        UsageError: The model gives logits that are NaN or infinite.
    """
    if not all(len(choice) for choice in choices):
        raise ValueError("an answer has no tokens.")
    answers = [tuple(choice) for choice in choices]
    logits = steps.start()
    count, device = len(logits), logits.device
    total = torch.zeros(count, len(answers), device=device)
    before: list[tuple[int, ...]] = [()]  # the beginnings that the rows of a prompt stand for
    for length in range(max(map(len, answers))):
        logits = _log_softmax(logits).view(count, len(before), -1)
        for place, answer in enumerate(answers):
            if len(answer) > length:
                total[:, place] += logits[:, before.index(answer[:length]), answer[length]]
        now = sorted({answer[: length + 1] for answer in answers if len(answer) > length + 1})
        if now:
            parents = torch.tensor([before.index(prefix[:-1]) for prefix in now], device=device)
            starts = torch.arange(count, device=device) * len(before)
            rows = (starts[:, None] + parents).flatten()
            tokens = torch.tensor([prefix[-1] for prefix in now], device=device).repeat(count)
            logits, before = steps.step(rows, tokens), now
    return total


def _search(
    steps: Steps, logits: Tensor, beams: int, grow: Callable[[_Rows, Tensor], _Growth]
) -> tuple[Tensor, Tensor]:
    """Grow rows from B prompts until no unfinished answer can be among the K best.

    Returns:
        Scores, best first, padded with -inf, and nodes of the answers, both (B, K).
    """
    count, device = len(logits), logits.device
    rows = _Rows(
        prompts=torch.arange(count, device=device),
        nodes=torch.zeros(count, dtype=torch.int64, device=device),
        scores=torch.zeros(count, device=device),
    )
    best = torch.full((count, beams), -torch.inf, device=device)
    best_nodes = torch.full((count, beams), NOWHERE, dtype=torch.int64, device=device)
    while True:
        found = grow(rows, logits)
        prompts = rows.prompts[found.rows]
        values, places = _top(
            found.scores.masked_fill(~found.ended, -torch.inf), prompts, count, beams
        )
        best, order = torch.cat([best, values], dim=1).topk(beams)
        best_nodes = torch.cat([best_nodes, found.nodes[places]], dim=1).gather(1, order)
        # Scores only fall: what is not above the K-th answer now will never be.
        hopeless = found.ended | (found.scores <= best[:, -1][prompts])
        values, places = _top(found.scores.masked_fill(hopeless, -torch.inf), prompts, count, beams)
        kept = places[values > -torch.inf]  # (R,)
        if not len(kept):
            return best, best_nodes.masked_fill(best.isneginf(), NOWHERE)
        rows = _Rows(prompts[kept], found.nodes[kept], found.scores[kept])
        logits = steps.step(found.rows[kept], found.tokens[kept])


def _top(scores: Tensor, prompts: Tensor, count: int, most: int) -> tuple[Tensor, Tensor]:
    """The best of each prompt's candidates, which stand side by side: (E,) -> (B, <= most) twice.

    Returns:
        Scores, best first, padded with -inf; places among the E, 0 at the padding.
    """
    sizes = torch.bincount(prompts, minlength=count)
    starts = sizes.cumsum(0) - sizes
    width = int(sizes.max())
    padded = scores.new_full((count, width), -torch.inf)
    padded[prompts, torch.arange(len(scores), device=scores.device) - starts[prompts]] = scores
    values, within = padded.topk(min(most, width))
    return values, (starts[:, None] + within).masked_fill(values.isneginf(), 0)


class _Tree:
    """A trie's arrays as tensors beside the logits."""

    def __init__(self, trie: Trie, device: torch.device) -> None:
        self.trie, self.device = trie, device
        self.tokens, self.first, self.low, self.high, self.keys = (
            torch.from_numpy(array).to(device)
            for array in (trie.tokens, trie.first, trie.low, trie.high, trie.keys)
        )

    def shut_leaves(self, seen: Sequence[Int32]) -> Tensor:
        """``prompt * N + leaf`` of all seen items, ascending: (B, any) -> (S,)."""
        leaves, shut = self.trie.leaf_of(), []
        for row, items in enumerate(seen):
            marked = np.zeros(len(self.trie), np.bool_)  # no sort: all but candidates may be shut
            marked[leaves[items[items > 0]]] = True
            shut.append(row * len(self.trie) + np.flatnonzero(marked))
        return torch.from_numpy(np.concatenate(shut)).to(self.device)

    def children(self, rows: _Rows, logits: Tensor, shut: Tensor) -> _Growth:
        """Every way down from the rows' nodes that leads to an unseen item."""
        begin = self.first[rows.nodes]
        sizes = (self.first[rows.nodes + 1] - begin).long()
        old = torch.repeat_interleave(sizes)  # (E,): the row of each child
        within = torch.arange(len(old), device=self.device) - (sizes.cumsum(0) - sizes)[old]
        nodes = begin[old] + within
        if len(shut):
            base = rows.prompts[old] * len(self.trie)
            low, high = self.low[nodes], self.high[nodes]
            gone = torch.searchsorted(shut, base + high) - torch.searchsorted(shut, base + low)
            open_ = torch.nonzero(gone < high - low)[:, 0]
            old, nodes = old[open_], nodes[open_]
        tokens = self.tokens[nodes].long()
        totals = _log_totals(logits)
        scores = rows.scores[old] + (logits[old, tokens].float() - totals[old])
        ended = self.first[nodes + 1] == self.first[nodes]
        return _Growth(old, tokens, nodes, scores, ended)

    def below(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """The child that a token leads to, `NOWHERE` where there is none; any shape, twice."""
        keys = nodes * self.trie.width + tokens
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        there = (nodes >= 0) & (tokens < self.trie.width) & (self.keys[places] == keys)
        return (places + 1).masked_fill(~there, NOWHERE)

    def items_at(self, nodes: Tensor) -> Int32:
        """The items of leaves, 0 for other nodes and `NOWHERE`; any shape."""
        there = nodes.cpu().numpy()
        items = self.trie.items[self.trie.low[there]]
        return np.where((there >= 0) & self.trie.leaves[there], items, 0).astype(np.int32)


def _likeliest(
    tree: _Tree, rows: _Rows, logits: Tensor, beams: int, end_token: int, *, last: bool
) -> _Growth:
    """The end of each row and its K likeliest other tokens, all ended where this is the last.

    As in the usual beam search, an end counts where it is among a prompt's K best candidates.
    """
    totals = _log_totals(logits)
    values, tokens = logits.topk(min(beams + 1, logits.shape[1]))  # one more: the end may be there
    values = values.float().masked_fill(tokens == end_token, -torch.inf)
    values = torch.cat([values, logits[:, end_token : end_token + 1].float()], dim=1)
    tokens = torch.cat([tokens, torch.full_like(tokens[:, :1], end_token)], dim=1)  # (R, K + 2)
    nodes = tree.below(rows.nodes[:, None].expand_as(tokens), tokens).flatten()
    old = torch.arange(len(tokens), device=logits.device).repeat_interleave(tokens.shape[1])
    scores = rows.scores[old] + (values - totals[:, None]).flatten()
    ended = torch.ones_like(old, dtype=torch.bool) if last else (tokens == end_token).flatten()
    prompts = rows.prompts[old]
    worst = _top(scores, prompts, int(prompts[-1]) + 1, beams)[0][:, -1]  # K columns: K + 2 a row
    scores = scores.masked_fill(ended & (scores < worst[prompts]), -torch.inf)
    return _Growth(old, tokens.flatten(), nodes, scores, ended)


def _log_totals(logits: Tensor) -> Tensor:
    """What turns logits into log-probabilities by subtraction: (R, V) -> (R,)."""
    totals = logits.float().logsumexp(dim=1)
    if not bool(totals.isfinite().all()):
        raise UsageError(DIVERGED)
    return totals


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float() - _log_totals(logits)[:, None]
