"""A recommender whose weights, gradients and optimizer states are shared out among the processes.

FSDP2 (torch.distributed.fsdp.fully_shard): each process keeps a part of every weight; a block of
the language model is gathered when it runs and let go afterwards. Gathering is joint work, so all
processes must run the same blocks equally often, and in the same order.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from llmrec.encoders.text import length_sorted
from llmrec.encoders.tuned import TunedEncoder
from llmrec.encoders.tuning import TunableEncoder
from llmrec.errors import UsageError
from llmrec.models.optim import OptimConfig
from llmrec.models.recommender import Recommender


def refuse_unshardable(encoder: TunableEncoder, optim: OptimConfig) -> None:
    """Refuse what cannot be shared out.

    Raises:
        UsageError: Names the option and the way out.
    """
    for name, odd, way_out in (
        ("encoder.tune", encoder.tune if encoder.tune == "qlora" else "", "lora or full"),
        ("encoder.placement", encoder.placement if encoder.tuned else "one_device", "one_device"),
        ("optim.state", optim.state, "float32"),
    ):
        if odd not in ("", way_out):
            raise UsageError(
                f"{name}={odd} does not go with weights sharded by FSDP. Use {name}={way_out}, or "
                "configs/accelerate/multi_gpu.yaml."
            )


def shard(model: Recommender, device: torch.device) -> None:
    """Share out all weights in place: block by block of the language model, then all the rest.

    Weights stay float32; autocast makes them bfloat16 where a block computes, as under DDP. The
    rest (embeddings, final norm, projection, user model) stays gathered from the first pass to the
    end of the way back or, in an evaluation, to the next reading of the state: `user_vectors` needs
    no process to wait for another, as long as `item_vectors` came before it.

    Args:
        model: on every process the same; its optimizer is to be made afterwards.
        device: where weights lie.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    language = model.tower.language_model
    if language is not None:
        for block in language.encoder.blocks:
            fully_shard(block, mesh=mesh)
        language.__class__ = _InStep  # as FSDP2 itself makes a module another class's
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "item_vectors")


class _InStep(TunedEncoder):
    """Runs its blocks as often as those of the other processes, forward and on the way back."""

    def halve(self) -> None:
        """Memory that runs out here would have the other processes wait for ever.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "memory ran out while texts were read. Lower encoder.batch_tokens and "
            "encoder.step_tokens, or set encoder.checkpointing true."
        )

    def _vectors(self, rows: NDArray[np.int64]) -> Tensor:
        """As without sharding, but for two things that the processes agree on.

        Where one has more pieces to read, the others read texts for nothing. Where what one holds
        of a step exceeds `step_tokens`, all read all of their pieces again on the way back.
        """
        lengths = self.lengths[rows]  # (n,)
        learning = torch.is_grad_enabled()
        pieces = list(length_sorted(lengths, self.batch_tokens))
        held = sum(len(piece) * int(lengths[piece].max()) for piece in pieces)
        most = torch.tensor([len(pieces), held], device=self.encoder.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        again = learning and int(most[1]) > self.step_tokens
        read = partial(checkpoint, self._read, use_reentrant=False) if again else self._read
        vectors = torch.cat([read(rows[piece]) for piece in pieces])  # (n, H), by length
        for _ in range(int(most[0]) - len(pieces)):
            vectors = vectors + 0 * read(rows[:1])  # (n, H) + (1, H)
        if learning:
            self._count(int(lengths.sum()), again)
        order = np.argsort(np.concatenate(pieces))
        return vectors[torch.from_numpy(order).to(vectors.device)]
