"""Asks a server numbered questions in a process that a test may kill.

python drive_client.py JOURNAL BASE_URL COUNT CONCURRENCY; the key comes from OPENAI_API_KEY.
"""

import asyncio
import os
import sys
from pathlib import Path

from llmrec.chat.client import ask_all
from llmrec.chat.endpoint import ClientConfig, Endpoint
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.requests import Request


def question(number: int) -> Request:
    """What is asked at a place of the run."""
    return Request(number, f"question {number}", max_tokens=16)


def fast(concurrency: int) -> ClientConfig:
    """Bounds under which a test's faults cost little time."""
    return ClientConfig(
        concurrency=concurrency,
        attempt_seconds=2,  # a busy machine must not look like a hanging server
        deadline_seconds=60,
        wait_seconds_cap=0.02,
        input_price=1.0,
        output_price=10.0,
    )


def silent(answers: int, retries: int, tokens: int) -> None:
    """Tells nobody."""


def ask(path: Path, base_url: str, count: int, concurrency: int, key: str = "") -> None:
    """Ask what the journal does not hold yet."""
    with AnswerJournal(path, {"count": count}) as journal:
        sys.stdout.write(f"in flight {journal.in_flight_count}\n")
        sys.stdout.flush()
        left = (question(number) for number in range(count) if not journal.is_done(number))
        endpoint = Endpoint(base_url, "model", api_key=key)
        asyncio.run(ask_all(left, endpoint, fast(concurrency), journal, silent))


if __name__ == "__main__":
    path, url, count, concurrency = sys.argv[1:]
    ask(Path(path), url, int(count), int(concurrency), os.environ.get("OPENAI_API_KEY", ""))
