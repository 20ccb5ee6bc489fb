"""One server for the whole run, of one model trained on the spot and a LoRA adapter for it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB, before vLLM is imported
os.environ["VLLM_NO_USAGE_STATS"] = "1"

from served import HELD, Stage

from llmrec.chat.server import ServerConfig, Servers


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that was trained to pick 1 of 4, in minutes."""
    import picking  # here, so that collecting does not wait for transformers

    return picking.train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA weights large enough to change every answer."""
    import chat_models

    return chat_models.save_adapter(model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def stage(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    config = ServerConfig(model=str(model), lora=f"loud={adapter}", **HELD)
    log = tmp_path_factory.mktemp("log") / "server.log"
    with Servers() as servers:
        endpoint = servers.endpoint(config, 0, 0.0, log)
        yield Stage(servers, config, replace(endpoint, model=str(model)), log)
