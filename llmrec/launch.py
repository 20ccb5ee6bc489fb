"""The processes of a run: as many as were asked for, or none at all."""

from __future__ import annotations

import os
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from llmrec.errors import UsageError


def start(precision: Literal["auto", "fp32", "bf16"]) -> Accelerator:
    """Join the other processes, take a device and a number format.

    Args:
        precision: auto is bf16 on a GPU that has it, else fp32.

    Raises:
        UsageError: Fewer processes than asked for.
    """
    if "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= {
        *os.environ
    }:
        # Asked for several processes on a CPU, accelerate launch names their meeting point and then
        # starts only one.
        raise UsageError(
            "accelerate launch was asked for several processes but started one, as it does on a "
            "CPU. Use torchrun --nproc_per_node 2 llmrec/train_tcf.py ..., or --num_processes 1 "
            "(and unset MASTER_ADDR if the shell sets it)."
        )
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if wanted > 1 and "RANK" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE={wanted} is set but this process has no RANK. Start all of them with "
            "accelerate launch or torchrun, or unset WORLD_SIZE."
        )
    if precision == "auto":
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if gpu else "fp32"
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=not torch.accelerator.is_available(),  # unsaid, torchrun's processes would not join
    )
    if accelerator.num_processes != wanted:
        raise UsageError(
            f"{wanted} processes were launched but {accelerator.num_processes} joined. Start them "
            "with accelerate launch or torchrun."
        )
    return accelerator
