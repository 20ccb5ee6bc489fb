"""A chat server on this machine that fails in every way there is, and remembers what it was sent.

What happens to a request follows from its prompt and its X-Attempt header alone, so two runs over
the same questions meet the same faults, whatever their order.
"""

import asyncio
import contextlib
import email.utils
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

RETRY_AFTER = {
    "429 after 120": "120",
    "429 after 1e9": "1e9",
    "429 after -5": "-5",
    "429 after soon": "soon",
    "429 after a date": email.utils.formatdate(time.time() + 3600, usegmt=True),
}
AGAIN = ("500", "503", *RETRY_AFTER, "hang", "drop", "half a body")
"""Faults after which a request is sent again."""
FINAL = ("html", "empty", "{}", "no choices", "null content", "number content", "400", "422")
"""Replies that are no answer, and that another attempt would pay for again."""
TEXTS = ("cut", "schema ignored")
"""Answers, though not the ones wished for."""
MOST_SECONDS = 300
"""After which a server ends whatever its test does."""

Faults = Callable[[str, int], str]
"""What happens to a prompt at an attempt; an empty word: nothing."""


def hashed(share: float, kinds: tuple[str, ...]) -> Faults:
    """These faults in equal parts, at this share of all sendings."""

    def fault(prompt: str, attempt: int) -> str:
        digest = hashlib.sha256(f"{attempt} {prompt}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64 / share if share else 1.0
        return kinds[int(place * len(kinds))] if place < 1 else ""

    return fault


def text_for(prompt: str) -> str:
    """What the server answers to a prompt."""
    return f"answer {hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


@dataclass
class Server:
    """A running one."""

    faults: Faults
    key: str
    base_url: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    """Times that each prompt came."""
    under_way: int = 0
    most_under_way: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    """What an answer takes."""
    logprobs: Any = None
    """Put into every answer."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._answer(request)
        finally:
            self.under_way -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt, attempt = body["messages"][0]["content"], int(request.headers["X-Attempt"])
        self.sent[prompt] += 1
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "bad key"}}, status=401)
        await asyncio.sleep(self.seconds)
        return await self._fail(request, self.faults(prompt, attempt), self._good(prompt))

    def _good(self, prompt: str) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text_for(prompt)},
            "finish_reason": "stop",
            "logprobs": self.logprobs,
        }
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        return {"choices": [choice], "usage": usage}

    async def _fail(
        self, request: web.Request, fault: str, good: dict[str, Any]
    ) -> web.StreamResponse:
        choice = good["choices"][0]
        if fault in ("500", "503", "400", "422", "401", "403", "404", "307"):
            headers = {"Location": "/v1/chat/completions"} if fault == "307" else {}
            told = {
                "error": {"message": f"refused; you sent {request.headers.get('Authorization')}"}
            }
            return web.json_response(told, status=int(fault), headers=headers)
        if fault in RETRY_AFTER:
            return web.json_response({}, status=429, headers={"Retry-After": RETRY_AFTER[fault]})
        if fault in ("html", "empty", "{}"):
            text = {"html": "<html>busy</html>", "empty": "", "{}": "{}"}[fault]
            return web.Response(text=text, content_type="text/html")
        match fault:
            case "hang":
                await asyncio.sleep(MOST_SECONDS)
            case "drop":
                assert request.transport is not None
                request.transport.abort()
            case "half a body":
                return await _half(request, json.dumps(good).encode())
            case "huge":
                return web.Response(body=b" " * (9 << 20))
            case "no choices":
                good["choices"] = []
            case "null content":
                choice["message"]["content"] = None
            case "number content":
                choice["message"]["content"] = 7
            case "cut":
                choice["finish_reason"] = "length"
            case "schema ignored":
                choice["message"]["content"] = "Sure! I would pick \ud83d and \x00."
            case "":
                pass
            case _:
                raise ValueError(fault)
        return web.json_response(good)


async def _half(request: web.Request, body: bytes) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    assert request.transport is not None
    request.transport.close()
    return response


@contextlib.contextmanager
def serving(faults: Faults = lambda prompt, attempt: "", key: str = "") -> Iterator[Server]:
    """A server in a thread of its own, on a port of its own."""
    server, ready, over = Server(faults, key), threading.Event(), threading.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        server.base_url = f"http://127.0.0.1:{port}/v1"
        ready.set()
        until = time.monotonic() + MOST_SECONDS
        while not over.is_set() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(10), "the fault server did not start"
    try:
        yield server
    finally:
        over.set()
        thread.join(10)
