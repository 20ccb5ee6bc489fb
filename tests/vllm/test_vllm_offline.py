"""The engine inside llmrec's process answers as the server does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from served import HELD, Stage
from test_vllm_server import LIST, PROMPT, TITLES, ask

from llmrec.chat.journal import AnswerJournal
from llmrec.chat.requests import Answer, Choice, Pattern, Request, Schema

pytestmark = pytest.mark.vllm

REQUESTS = (
    Request(0, PROMPT, 1, Choice(("A", "B", "C", "D")), 20),
    Request(1, PROMPT, 64, Choice(tuple(TITLES))),
    Request(2, PROMPT, 64, Pattern("[1-5] stars")),
    Request(3, PROMPT, 200, Schema(LIST)),
    Request(4, "tent " * 5000, 4),
    Request(5, PROMPT, 8),
)

# In a process of its own: the engine keeps threads and memory until the process ends.
DRIVER = """
import json, sys
from pathlib import Path
from llmrec.chat import offline
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.server import ServerConfig
from test_vllm_offline import REQUESTS

if __name__ == "__main__":
    config = ServerConfig(name="offline", **json.loads(sys.argv[1]))
    with AnswerJournal(Path(sys.argv[2]), {}) as journal:
        offline.ask_all(REQUESTS, config, 0.0, 0, journal, lambda *told: print(told, flush=True))
"""


def offline_answers(folder: Path, options: dict[str, object]) -> list[Answer]:
    here = Path(__file__).parent
    script, path = folder / "drive.py", folder / "answers.jsonl"
    script.write_text(f"import sys; sys.path.insert(0, {str(here)!r})\n{DRIVER}")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(options), str(path)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with AnswerJournal(path, {}) as journal:
        return list(journal.answers())


@pytest.mark.parametrize("adapted", [False, True])
def test_the_engine_in_this_process_answers_as_the_server_does(
    stage: Stage, model: Path, adapter: Path, tmp_path: Path, adapted: bool
) -> None:
    options = {"model": str(model), **HELD} | ({"lora": f"loud={adapter}"} if adapted else {})
    found = offline_answers(tmp_path, options)
    (tmp_path / "served").mkdir()
    endpoint = stage.adapted if adapted else stage.endpoint
    served = ask(endpoint, tmp_path / "served", *REQUESTS)
    told = [(a.number, a.digest, a.status, a.text, a.completion_tokens) for a in found]
    assert told == [(a.number, a.digest, a.status, a.text, a.completion_tokens) for a in served]
    assert [a.status for a in found].count("invalid") == 1  # the long one
    ours, theirs = (dict(answers[0].top) for answers in (found, served))
    for letter in "ABCD":
        assert ours[letter] == pytest.approx(theirs[letter], abs=1e-4)
