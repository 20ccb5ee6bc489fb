"""configs/accelerate/: what `accelerate launch` makes of each file."""

import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from llmrec.errors import UsageError
from llmrec.launch import SHARDING, sharded, start

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "accelerate"
EXPECTED = {  # kind, machines, processes of all machines together, number format
    "cpu": ("NO", 1, 1, "no"),
    "single_gpu": ("NO", 1, 1, "bf16"),
    "multi_gpu": ("MULTI_GPU", 1, 8, "bf16"),
    "two_nodes": ("MULTI_GPU", 2, 16, "bf16"),
    "fsdp2": ("FSDP", 1, 8, "bf16"),
}


def test_every_file_is_in_the_table():
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_says_how_many_processes_of_which_kind(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    kind = config.distributed_type.value
    found = (kind, config.num_machines, config.num_processes, config.mixed_precision)
    assert found == EXPECTED[name]


def environment(name, monkeypatch):
    """What `accelerate launch` would set for the processes of a file, set here."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), "llmrec/train_tcf.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    for key, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(key, value)
    return args


def test_two_nodes_meet_at_the_first_ones_address(monkeypatch):
    args = environment("two_nodes", monkeypatch)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 0)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "127.0.0.1:29500")


def test_fsdp2_shards_layer_by_layer_and_saves_whole_weights(monkeypatch):
    environment("fsdp2", monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading


def test_fsdp2_says_all_that_a_sharded_run_goes_by_and_nothing_else(monkeypatch):
    assert not sharded()
    environment("fsdp2", monkeypatch)
    assert sharded()
    assert {name: os.environ.get(name, "").lower() for name in SHARDING} == {
        name: value.lower() for name, value in SHARDING.items()
    }


@pytest.mark.parametrize("name", SHARDING)
def test_fsdp_set_up_otherwise_is_refused(name, monkeypatch):
    environment("fsdp2", monkeypatch)
    launched(monkeypatch, processes=8)
    monkeypatch.setenv(name, "other")
    with pytest.raises(UsageError, match=f"^{name.lower()}=other in fsdp_config .*fsdp2.yaml"):
        start("bf16")


def test_fsdp_on_one_process_is_refused(monkeypatch):
    environment("fsdp2", monkeypatch)
    launched(monkeypatch, processes=1)
    with pytest.raises(UsageError, match="nothing to share out with one process"):
        start("bf16")


def test_deepspeed_is_refused_and_fsdp2_named(monkeypatch):
    launched(monkeypatch, processes=8)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"DeepSpeed is not supported\. Use .*fsdp2.yaml"):
        start("bf16")


def launched(monkeypatch, processes):
    """As if a launcher had started so many."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
