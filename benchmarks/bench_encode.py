"""Encoding real titles with MiniLM against sentence-transformers' `encode`.

    LLMREC_DATA=data python benchmarks/bench_encode.py

The first 3,000 titles of MovieLens-1M (else Amazon Beauty 2014, else simulated ones), both at most
32 tokens, one thread, fp32. sentence-transformers runs with its default batch size of 32 and, where
another is faster, with the best of 32, 64 and 128.
"""

from measure import Times, report  # isort: skip  # first: it limits threads

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmrec.data.readers import DataConfig, data_root, load_dataset
from llmrec.encoders.text import MINILM, EncoderConfig, TextEncoder, locate

TITLES = 3000
TRIED = 1000
"""Titles on which batch sizes are chosen."""
TURNS = 7
BATCH_TOKENS = (256, 512, 1024, 2048)


def titles() -> tuple[str, list[str]]:
    for source in ("ml-1m", "amazon-beauty-2014"):
        if (data_root() / source).is_dir():
            texts = [text for text in load_dataset(DataConfig(source=source)).catalog.texts if text]
            return source, texts[:TITLES]
    return "simulated", [text for text in load_dataset(DataConfig()).catalog.texts if text]


def main() -> None:
    source, texts = titles()
    default = EncoderConfig().batch_tokens
    encoders = {
        size: TextEncoder(EncoderConfig(batch_tokens=size), torch.device("cpu"))
        for size in sorted({*BATCH_TOKENS, default})
    }
    folder = Path(locate(EncoderConfig(model=MINILM)).source)
    peer = SentenceTransformer(str(folder), device="cpu")
    peer.max_seq_length = EncoderConfig().max_item_tokens

    def ours(size: int, texts: list[str] = texts) -> Callable[[], NDArray[np.float32]]:
        return lambda: encoders[size].encode(texts)[0]

    def theirs(size: int, texts: list[str] = texts) -> Callable[[], NDArray[np.float32]]:
        return lambda: peer.encode(texts, batch_size=size, show_progress_bar=False)

    few = texts[:TRIED]
    sizes = Times({str(size): theirs(size, few) for size in (32, 64, 128)}, turns=2, warm=0)
    tried = Times({str(size): ours(size, few) for size in encoders}, turns=2, warm=0)
    best = min(sizes.seconds, key=sizes.median)
    functions = {"ours": ours(default), "sentence-transformers, batch size 32": theirs(32)}
    if best != "32":
        functions[f"sentence-transformers, its best batch size {best}"] = theirs(int(best))
    times = Times(functions, TURNS, warm=0)
    rows = [
        times.speed_row("encoding titles", "ours", name, len(texts), ">= 1.0")
        for name in list(functions)[1:]
    ]
    mine, other = ours(default)(), theirs(32)()
    mine /= np.linalg.norm(mine, axis=1, keepdims=True)  # theirs come with unit length
    cosine = float((mine * other).sum(1).min())
    print(f"least cosine of a title's two vectors: {cosine:.6f}")
    report(
        "encode",
        rows,
        data=source,
        titles=len(texts),
        tokens=int(encoders[default].encode(texts)[1].sum()),
        least_cosine=cosine,
        turns=TURNS,
        items_per_second_by_batch_tokens={n: len(few) / tried.median(n) for n in tried.seconds},
        items_per_second_by_their_batch_size={n: len(few) / sizes.median(n) for n in sizes.seconds},
    )


if __name__ == "__main__":
    main()
