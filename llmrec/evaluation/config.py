"""How cases are ranked, as options; without torch, so that a chat run need not load it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmrec.errors import UsageError
from llmrec.evaluation.pools import PoolConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """How test and validation cases are ranked."""

    filter_seen: bool | Literal["papers"] = True
    """true: items of the visible history are no candidates, except the target; papers: a repeated
    target is removed as well and becomes a miss, as in several papers' code; false: everything is a
    candidate."""
    top_k: int = 20
    """Best items kept per case."""
    block_megabytes: int = 32
    """Size of the score block, MiB; twice this is the peak memory beyond the vectors themselves."""
    pool: PoolConfig = field(default_factory=PoolConfig)

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.filter_seen not in (True, False, "papers"):
            raise UsageError(
                f"evaluation.filter_seen={self.filter_seen!r} is none of true, false, papers."
            )
        if self.top_k < 1:
            raise UsageError(f"evaluation.top_k={self.top_k} must be at least 1.")
        if self.block_megabytes < 1:
            raise UsageError(
                f"evaluation.block_megabytes={self.block_megabytes} must be at least 1."
            )
        if self.pool.size != "all" and self.filter_seen == "papers":
            raise UsageError(
                "evaluation.filter_seen=papers takes repeated targets out of a full ranking, which "
                f"evaluation.pool.size={self.pool.size} is not. Use filter_seen=true, or all."
            )
