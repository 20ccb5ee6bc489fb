"""The processes of a run: as many as were asked for, or none at all."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from llmrec.errors import UsageError

SHARDING = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_IGNORED_MODULES": "",
}
"""What accelerate launch passes on of configs/accelerate/fsdp2.yaml: all that is known to work."""


def sharded() -> bool:
    """Whether this run was launched to share out its weights among the processes (FSDP2)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def start(precision: Literal["auto", "fp32", "bf16"]) -> Accelerator:
    """Join the other processes, take a device and a number format.

    Args:
        precision: auto is bf16 on a GPU that has it, else fp32.

    Raises:
        UsageError: Fewer processes than asked for, or a way to share out weights that is not known
            to work.
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
    _refuse_other_sharding(wanted)
    if precision == "auto":
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if gpu else "fp32"
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=not torch.accelerator.is_available(),  # unsaid, torchrun's processes would not join
        # One process encodes a catalogue while the others wait, which takes hours for large models.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    if accelerator.num_processes != wanted:
        raise UsageError(
            f"{wanted} processes were launched but {accelerator.num_processes} joined. Start them "
            "with accelerate launch or torchrun."
        )
    return accelerator


def _refuse_other_sharding(processes: int) -> None:
    """Refuse DeepSpeed, and FSDP otherwise than configs/accelerate/fsdp2.yaml sets it up."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UsageError(
            "DeepSpeed is not supported. Use --config_file configs/accelerate/fsdp2.yaml, which "
            "shards weights and optimizer states as ZeRO stage 3 does."
        )
    if not sharded():
        return
    if processes == 1:
        raise UsageError(
            "FSDP has nothing to share out with one process. Start more with --num_processes, or "
            "use configs/accelerate/single_gpu.yaml."
        )
    for name, value in SHARDING.items():
        given = os.environ.get(name, value)
        if given.lower() != value.lower():
            raise UsageError(
                f"{name.lower()}={given} in fsdp_config is not supported. Use "
                f"{value or 'no such line'}, as configs/accelerate/fsdp2.yaml does."
            )
