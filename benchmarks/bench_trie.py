"""Answers under a prefix tree of 100,000 items: build time, memory, and what a step costs.

    python benchmarks/bench_trie.py

Steps are those of a random T5 of T5-small's shapes, 10 beams, 16 prompts of 64 tokens. The tree of
that comparison has ten ways at each of five levels, so that from the second step on both searches
carry 160 rows. The peer is Hugging Face's `generate`: without constraint, and with
`prefix_allowed_tokens_fn` over nested dictionaries, the usual way to constrain it.
Memory is the peak beyond the lists of token ids while a tree is built and searched with logits
that cost no model, in fresh processes, for names of three shapes.
"""

from measure import Row, Times, extra_memory, in_fresh_process, report  # isort: skip  # limits threads

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from llmrec.prompting.decoding import Seq2SeqSteps, constrained_beams, free_beams
from llmrec.prompting.trie import Trie

ITEMS, PROMPTS, LENGTH, BEAMS, VOCABULARY, END = 100_000, 16, 64, 10, 32_128, 1
DIGITS = 5
SEEN = 50
"""Seen items of a prompt."""


def digits(item: int) -> list[int]:
    """Five tokens with ten values each: 10 children at every node."""
    return [10 + 10 * place + item // 10**place % 10 for place in range(DIGITS)] + [END]


def pieces(item: int) -> list[int]:
    """`item_12345` as subwords: two that all share, then pieces of up to three digits."""
    number = str(item)
    parts = [number[:3], number[3:]] if len(number) > 3 else [number]
    return [5, 6, *(100 + 1200 * len(part) + int(part) for part in parts), END]


def wide(item: int) -> list[int]:
    """A root with 25,000 children."""
    return [100 + item // 4, 30_000 + item % 4, END]


def title(item: int) -> list[int]:
    """Twelve tokens or so, of which the first few tell most items apart."""
    rng = np.random.default_rng(item)
    return [*(100 + rng.zipf(1.3, rng.integers(6, 18)) % 20_000).tolist(), 40 + item % 60, END]


SHAPES = {"digits": digits, "pieces": pieces, "wide": wide, "title": title}


def answers(shape: str) -> list[list[int]]:
    distinct = {tuple(SHAPES[shape](item)): None for item in range(ITEMS + 2000)}
    return [list(answer) for answer in distinct][:ITEMS]


def seen() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(1, ITEMS + 1, (PROMPTS, SEEN)).astype(np.int32))


class NoModel:
    """Logits that are there already, for as many rows as asked."""

    def __init__(self) -> None:
        self.logits = torch.randn(PROMPTS * BEAMS, VOCABULARY)

    def start(self) -> Tensor:
        return self.logits[:PROMPTS]

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        return self.logits[: len(rows)]


def memory(shape: str) -> float:
    """MiB for a tree and a search, beyond the lists and the logits."""
    constrained_beams(NoModel(), Trie.of([[2, END]]), 2, [np.empty(0, np.int32)] * PROMPTS)

    def prepare() -> Callable[[], object]:
        lists, steps, known = answers(shape), NoModel(), seen()
        return lambda: constrained_beams(steps, Trie.of(lists), BEAMS, known)

    return extra_memory(prepare)


def nested(lists: Sequence[Sequence[int]]) -> dict[int, Any]:
    root: dict[int, Any] = {}
    for answer in lists:
        node = root
        for token in answer:
            node = node.setdefault(token, {})
    return root


def dictionaries(shape: str) -> float:
    """MiB of the same tree as nested dictionaries."""

    def prepare() -> Callable[[], object]:
        lists, kept = answers(shape), []
        return lambda: kept.append(nested(lists))

    return extra_memory(prepare)


def t5_small() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8,
        pad_token_id=0, eos_token_id=END, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def searches(trie: Trie, root: dict[int, Any]) -> dict[str, Callable[[], object]]:
    model, known = t5_small(), seen()
    ids = torch.randint(3, VOCABULARY, (PROMPTS, LENGTH))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        hidden = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    nothing = [np.empty(0, np.int32)] * PROMPTS
    length = DIGITS + 1

    def ways(_: int, answer: Tensor) -> list[int]:
        node = root
        for token in answer.tolist()[1:]:  # after the start token
            node = node.get(token, {})
        return list(node) or [0]

    def generate(**options: object) -> object:
        return model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask,
            num_beams=BEAMS, num_return_sequences=BEAMS, max_new_tokens=length,
            length_penalty=0.0, do_sample=False, **options,
        )  # fmt: skip

    def steps() -> Seq2SeqSteps:
        return Seq2SeqSteps(model, hidden, mask)

    # No end within the free searches, so that all run the same number of steps.
    return {
        "constrained": lambda: constrained_beams(steps(), trie, BEAMS, nothing),
        "constrained, seen items shut": lambda: constrained_beams(steps(), trie, BEAMS, known),
        "unconstrained": lambda: free_beams(steps(), trie, BEAMS, END, length, nothing),
        "generate, unconstrained": lambda: generate(min_new_tokens=length),
        "generate, prefix_allowed_tokens_fn": lambda: generate(prefix_allowed_tokens_fn=ways),
    }


def build_seconds(lists: list[list[int]]) -> float:
    began = time.process_time()
    Trie.of(lists)
    return time.process_time() - began


def main() -> None:
    rows = []
    for shape in ("pieces", "wide", "title"):
        ours, other = (in_fresh_process(__file__, kind, shape) for kind in ("tree", "nested"))
        what = f"tree and search, {ITEMS:,} items, names as {shape}, extra memory"
        rows.append(Row(what, "nested dictionaries, no search", ours, other, "MiB", None, "<= 200"))
    for shape in ("pieces", "title"):
        what = f"tree of {ITEMS:,} items, names as {shape}, built in"
        rows.append(Row(what, "", build_seconds(answers(shape)), None, "CPU-s", None, "<= 5"))
    lists = answers("digits")
    times = Times(searches(Trie.of(lists), nested(lists)), turns=5)
    what = f"answers to {PROMPTS} prompts, {BEAMS} beams, {DIGITS + 1} steps"
    rows += [
        times.row(what, "constrained", "unconstrained", "<= 1.3"),
        times.row(
            f"{what}, seen items shut", "constrained, seen items shut", "unconstrained", "<= 1.3"
        ),
        times.row(f"{what}, unconstrained", "unconstrained", "generate, unconstrained", "<= 1"),
        times.row(what, "constrained", "generate, prefix_allowed_tokens_fn", "<= 1"),
    ]
    report("trie", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print({"tree": memory, "nested": dictionaries}[sys.argv[1]](sys.argv[2]))
    else:
        main()
