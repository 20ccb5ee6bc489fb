"""Asking a chat server against a bare HTTP loop, and the client's memory over 100,000 requests.

    python benchmarks/bench_chat.py

The server is a process of its own that answers after 50 ms; 64 requests are under way. Ours renders
a prompt of 100 titles for each request, journals it before and its answer after, forced to the
disk, and reads the answer's JSON. The bare loop posts the same bodies, made beforehand, with the
same HTTP library and throws the replies away. Requests per second of wall time; of a server that
answers at once too, where nothing hides what ours does beside sending.
"""

from measure import Row, extra_memory, in_fresh_process, report  # isort: skip

import asyncio
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "chat"))
from stub_server import stub

from llmrec.chat.client import ask_all
from llmrec.chat.endpoint import ClientConfig, Endpoint
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.requests import Request, Schema

CONCURRENCY, MILLISECONDS = 64, 50
REQUESTS, TURNS = 3000, 9
FEW, MANY = 10_000, 100_000
TITLES = [f"The Long Title of Film Number {number} (19{number % 100:02})" for number in range(4000)]
SCHEMA = Schema({"type": "object", "properties": {"ranking": {"type": "array"}}})


def question(number: int) -> Request:
    start = number * 37 % 3900
    shown = "\n".join(f"{place}. {TITLES[start + place]}" for place in range(100))
    prompt = f"Rank these films for somebody who liked {TITLES[number % 4000]}.\n{shown}\nAnswer:"
    return Request(number, prompt, 128, SCHEMA)


def silent(answers: int, retries: int, tokens: int) -> None:
    """Tells nobody."""


def ours(endpoint: Endpoint, count: int) -> None:
    config = ClientConfig(concurrency=CONCURRENCY)
    with (
        tempfile.TemporaryDirectory() as folder,
        AnswerJournal(Path(folder) / "answers.jsonl", {"count": count}) as journal,
    ):
        asyncio.run(ask_all(map(question, range(count)), endpoint, config, journal, silent))
        if journal.spent(config).statuses != {"answered": count}:
            raise SystemExit(f"not all were answered: {journal.spent(config)}")


async def bare(endpoint: Endpoint, bodies: list[bytes]) -> None:
    url, source = f"{endpoint.base_url}/chat/completions", iter(bodies)

    async def work(session: aiohttp.ClientSession, source: Iterator[bytes]) -> None:
        for body in source:
            async with session.post(url, data=body) as response:
                await response.read()

    connector = aiohttp.TCPConnector(limit=CONCURRENCY)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        await asyncio.gather(*(work(session, source) for _ in range(CONCURRENCY)))


def rate(function: Callable[[], object]) -> float:
    gc.collect()
    began = time.perf_counter()
    function()
    return REQUESTS / (time.perf_counter() - began)


def throughput(milliseconds: int, target: str) -> tuple[Row, dict[str, list[float]]]:
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    with stub(milliseconds) as base_url:
        endpoint = Endpoint(base_url, "stub", dialect="vllm")
        bodies = [endpoint.body(question(number)) for number in range(REQUESTS)]
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: ours(endpoint, REQUESTS),
            "bare": lambda: asyncio.run(bare(endpoint, bodies)),
        }
        for turn in range(-1, TURNS):
            for name in sorted(ways, reverse=turn % 2 == 0):
                found = rate(ways[name])
                if turn >= 0:
                    rates[name].append(found)
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["bare"], strict=True))
    medians = (statistics.median(rates[name]) for name in ("ours", "bare"))
    what = f"asking a chat server that takes {milliseconds} ms, {CONCURRENCY} at once"
    return Row(what, "bare aiohttp loop", *medians, "requests per s", ratio, target), rates


def memory(count: int) -> float:
    """Peak MiB of asking so many, beyond what is resident after asking a few."""

    def prepare() -> Callable[[], object]:
        ours(endpoint, 500)
        return lambda: ours(endpoint, count)

    with stub(0) as base_url:
        endpoint = Endpoint(base_url, "stub", dialect="vllm")
        return extra_memory(prepare)


def main() -> None:
    if sys.argv[1:2] == ["memory"]:
        print(memory(int(sys.argv[2])))
        return
    slow, rates = throughput(MILLISECONDS, ">= 0.7")
    instant, instant_rates = throughput(0, "")
    few, many = (in_fresh_process(__file__, "memory", count) for count in (FEW, MANY))
    rows = [
        slow,
        instant,
        Row("memory of asking 10,000 requests", "", few, None, "MiB", None, ""),
        Row("memory of asking 100,000 requests", "", many, None, "MiB", None, ""),
        Row("its growth from 10,000 to 100,000", "", many - few, None, "MiB", None, "<= 8 MiB"),
    ]
    facts = {"requests": REQUESTS, "turns": TURNS, "aiohttp": version("aiohttp")}
    report("chat", rows, **facts, rates=rates, rates_of_instant_server=instant_rates)


if __name__ == "__main__":
    main()
