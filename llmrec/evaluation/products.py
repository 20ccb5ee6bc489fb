"""Scores by dot product, of which equal items get equal bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from llmrec.data.interactions import Int64

UserVectors: TypeAlias = Callable[[Int64], Tensor]
"""The user vectors of some cases, (B,) case indices -> (B, D)."""
Scores: TypeAlias = Callable[[Int64], Tensor]
"""The scores of all items for some cases, (B,) case indices -> (B, N + 1) or wider, float32; what
stands in column 0 (padding) and beyond N means nothing. Its values may be overwritten."""

CHUNK_ITEMS = 8192
"""Items per matrix product; a multiple of 64, see `ItemChunks`."""


class ItemChunks:
    """Item vectors as equally shaped slices, so that equal items score equal bits.

    BLAS computes the last few columns of a product by other instructions when their number is not a
    multiple of the vector width: on MKL with AVX-512, identical item vectors then differ in the
    last bit wherever N mod 4 is not 0 (108 of 660 shapes tried), and ties silently become an order.
    So every product here has the same multiple of 64 columns; only the last slice is copied, to pad
    it.
    """

    def __init__(self, item_vectors: Tensor) -> None:
        """Of (N + 1, D)."""
        chunk, self.width = self.padded(len(item_vectors))
        vectors = item_vectors.detach().float()
        self.chunks = list(vectors.split(chunk))
        tail = vectors.new_zeros(chunk, vectors.shape[1])
        tail[: len(self.chunks[-1])] = self.chunks[-1]
        self.chunks[-1] = tail

    @staticmethod
    def padded(rows: int) -> tuple[int, int]:
        """Rows per slice, and rows of all slices together."""
        count = -(-rows // CHUNK_ITEMS)
        chunk = -(-rows // (64 * count)) * 64
        return chunk, count * chunk

    def scores(self, users: Tensor, out: Tensor) -> Tensor:
        """(B, D) x (D, width) -> (B, width), into `out`."""
        for start, chunk in zip(
            range(0, self.width, len(self.chunks[0])), self.chunks, strict=False
        ):
            torch.mm(users, chunk.T, out=out[:, start : start + len(chunk)])
        return out


def dot_products(user_vectors: UserVectors, item_vectors: Tensor) -> Scores:
    """Scores by dot product, in float32, equal for equal item vectors.

    Args:
        user_vectors: Of some cases.
        item_vectors: (N + 1, D), row 0 is padding. Scores are computed on its device.
    """
    items, device = ItemChunks(item_vectors), item_vectors.device
    buffer = torch.empty(0, items.width, device=device)

    @torch.inference_mode()
    def scores(block: Int64) -> Tensor:
        nonlocal buffer
        users = user_vectors(block).to(device=device, dtype=torch.float32)  # (B, D)
        if len(users) != len(block):
            raise ValueError(f"{len(users)} user vectors for {len(block)} cases.")
        if len(buffer) < len(users):
            buffer = torch.empty(len(users), items.width, device=device)
        return items.scores(users, buffer[: len(users)])

    return scores
