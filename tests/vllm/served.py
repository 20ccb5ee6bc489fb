"""What the tests' one server is started with, and how they speak of it."""

from dataclasses import dataclass, replace
from pathlib import Path

from llmrec.chat.endpoint import Endpoint
from llmrec.chat.server import ServerConfig, Servers

HELD = {
    "dtype": "float32",
    "arguments": ["--enforce-eager", "--max-model-len", 4096, "--max-num-seqs", 32],
}
"""What a processor needs: no compilation, and no half precision, which older ones lack."""

USERS, ITEMS = 2000, 300
DATA = [f"--data.simulated.users={USERS}", f"--data.simulated.items={ITEMS}"]
"""The shop that the model was trained on."""
HISTORY = 5
"""Items of a user's history that it was trained with."""


@dataclass(frozen=True)
class Stage:
    """The running server, and what it serves."""

    servers: Servers
    config: ServerConfig
    """With the adapter."""
    endpoint: Endpoint
    """Answers without the adapter."""
    log: Path

    @property
    def adapted(self) -> Endpoint:
        """The same server, answering with the adapter."""
        return replace(self.endpoint, model="loud")
