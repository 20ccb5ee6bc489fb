"""Asking a server: bounded concurrency, bounded retries and waits, every answer journalled.

A thin HTTP client instead of a package of the server's maker: what is sent again, when and how
often is decided here alone, since every sending may cost money.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp

from llmrec.chat.endpoint import ClientConfig, Endpoint
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.replies import UNREADABLE, Reply, read_reply, refusal
from llmrec.chat.requests import Answer, Request
from llmrec.errors import UsageError
from llmrec.progress import Tell

BACKOFF_SECONDS = 0.5
"""The longest first wait; each further one may be twice as long, up to the cap."""
COMMIT_SECONDS, COMMIT_ANSWERS = 0.2, 64
"""Answers are forced to the disk as soon as so much time has passed, or so many have come."""
BODY_BYTES = 8 << 20
"""A longer reply is no answer."""
IN_A_ROW = 20
"""So many requests in a row that the server did not take end the run: it is gone."""
_OK, _TOO_MANY, _SERVER_ERRORS = 200, 429, 500


async def ask_all(
    requests: Iterable[Request],
    endpoint: Endpoint,
    config: ClientConfig,
    journal: AnswerJournal,
    tell: Tell,
) -> None:
    """Ask a server every request and journal what becomes of it.

    Requests are taken from the iterable as they are sent, so it may be long. A request that the
    server answers with something that is no answer is not sent again: it was paid for. Where the
    run stops with an error, requests that got no answer are left out of the journal, so that they
    are asked again by the next run.

    Args:
        requests: Questions that the journal does not answer yet.
        endpoint: The server.
        config: Bounds.
        journal: Takes every answer.
        tell: Told of answers once they are on the disk.

    Raises:
        UsageError: The server cannot be reached, refuses the key or the model, or is gone; or the
            journal cannot be written.
    """
    connector = aiohttp.TCPConnector(limit=config.concurrency)
    async with aiohttp.ClientSession(
        connector=connector,
        headers=endpoint.headers(),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),  # each attempt has its own
        trust_env=False,  # no proxy between us and a server on this machine
    ) as session:
        asking = _Asking(session, endpoint, config, journal, tell)
        source = iter(requests)
        workers = [asyncio.create_task(asking.work(source)) for _ in range(config.concurrency)]
        committing = asyncio.create_task(asking.commit_regularly())
        try:
            await _all_or_first_error(workers, committing)
            asking.keep_unanswered()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            asking.end()
            await committing


async def _all_or_first_error(
    workers: list[asyncio.Task[None]], committing: asyncio.Task[None]
) -> None:
    """Wait for the workers; an error of any task ends the waiting."""
    left: set[asyncio.Task[None]] = set(workers)
    while left:
        done, pending = await asyncio.wait({*left, committing}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        left = pending - {committing}


@dataclass(frozen=True)
class _Http:
    """What one attempt brought."""

    status: int = 0
    body: bytes = b""
    retry_after: str = ""
    fault: str = ""
    """Why there is no whole reply."""

    @property
    def retriable(self) -> bool:
        """Whether another attempt may end better."""
        return bool(self.fault) or self.status == _TOO_MANY or self.status >= _SERVER_ERRORS

    @property
    def reason(self) -> str:
        """A word for it, to be counted."""
        return self.fault or f"status {self.status}"


class _Asking:
    """What the tasks of one run share."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: Endpoint,
        config: ClientConfig,
        journal: AnswerJournal,
        tell: Tell,
    ) -> None:
        self.session, self.endpoint, self.config = session, endpoint, config
        self.journal, self.tell = journal, tell
        self.url = f"{endpoint.base_url.rstrip('/')}/chat/completions"
        self.random = random.Random(endpoint.seed)
        self.welcome = False  # whether the server has ever given an answer
        self.unanswered: list[tuple[Answer, list[str]]] = []  # in a row
        self.untold = [0, 0, 0]  # answers, retries, tokens since the last commit
        self.full = asyncio.Event()  # enough of them for a commit
        self.over = False

    async def work(self, source: Iterator[Request]) -> None:
        for request in source:
            self.journal.note_sent(request.number)
            answer, retried, taken = await self.ask(request)
            if not taken:
                self.unanswered.append((answer, retried))
                if len(self.unanswered) == IN_A_ROW:
                    raise UsageError(
                        f"{IN_A_ROW} requests in a row got no answer from "
                        f"{self.endpoint.base_url}, the last: {answer.problem}. What was answered "
                        "is kept: once the server is well, the same command goes on."
                    )
                continue
            self.keep_unanswered()
            self.keep(answer, retried)

    def keep_unanswered(self) -> None:
        """Journal requests without an answer: others were answered, so the server is not gone."""
        for answer, retried in self.unanswered:
            self.keep(answer, retried)
        self.unanswered.clear()

    def keep(self, answer: Answer, retried: list[str]) -> None:
        self.journal.add(answer, retried)
        tokens = answer.prompt_tokens + answer.completion_tokens
        for place, more in enumerate((1, len(retried), tokens)):
            self.untold[place] += more
        if self.untold[0] >= COMMIT_ANSWERS:
            self.full.set()

    def end(self) -> None:
        """Let `commit_regularly` force the last answers and return."""
        self.over = True
        self.full.set()

    async def commit_regularly(self) -> None:
        """Force answers to the disk in groups, then tell of them."""
        last = False
        while not last:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMMIT_SECONDS):
                    await self.full.wait()
            self.full.clear()
            last, told, self.untold = self.over, self.untold, [0, 0, 0]
            if told[0]:
                await asyncio.to_thread(self.journal.commit)
            self.tell(*told)

    async def ask(self, request: Request) -> tuple[Answer, list[str], bool]:
        """What becomes of a request, why it was repeated, and whether the server took it."""
        began = time.monotonic()
        deadline = began + self.config.deadline_seconds
        body, retried = self.endpoint.body(request), list[str]()
        while True:
            left = deadline - time.monotonic()
            http = await self.attempt(body, len(retried), min(self.config.attempt_seconds, left))
            if not http.retriable or len(retried) == self.config.max_retries:
                break
            wait = self.wait(len(retried), http.retry_after)
            if time.monotonic() + wait >= deadline:
                break
            retried.append(http.reason)
            await asyncio.sleep(wait)
        self.check_welcome(http)
        if http.retriable:
            told = f"no answer in {len(retried) + 1} attempts: {', '.join([*retried, http.reason])}"
            reply = Reply("failed", problem=told)
        elif http.status == _OK and len(http.body) > BODY_BYTES:
            reply = Reply("invalid", problem=f"the reply is longer than {BODY_BYTES >> 20} MiB")
        elif http.status == _OK:
            reply = read_reply(http.body)
        else:
            problem = refusal(http.status, http.body, self.endpoint.api_key)
            reply = Reply("invalid", problem=problem)
        self.welcome = self.welcome or reply.status in ("answered", "cut")
        answer = Answer(
            request.number,
            request.digest(),
            **vars(reply),
            attempts=len(retried) + 1,
            seconds=round(time.monotonic() - began, 3),
        )
        return answer, retried, self.took(http, answer)

    def took(self, http: _Http, answer: Answer) -> bool:
        """Whether a server that gives answers did with a request what it does with each.

        A reply of status 200 that cannot be read says little: a gateway's page has it, too.
        """
        refused = 400 <= http.status < _SERVER_ERRORS and http.status not in (401, 403, _TOO_MANY)
        read = http.status == _OK and not http.fault and not answer.problem.startswith(UNREADABLE)
        return self.welcome and (read or refused)

    async def attempt(self, body: bytes, number: int, seconds: float) -> _Http:
        """Send once; never raises for what a network or a server may do."""
        try:
            async with (
                asyncio.timeout(seconds),
                self.session.post(
                    self.url,
                    data=body,
                    headers={"X-Attempt": str(number)},
                    allow_redirects=False,
                ) as response,
            ):
                content = await _content(response)
                return _Http(response.status, content, response.headers.get("Retry-After", ""))
        except TimeoutError:
            return _Http(fault="timeout")
        except aiohttp.ClientPayloadError:
            return _Http(fault="half a reply")
        except aiohttp.ClientConnectorError:
            return _Http(fault="no connection")
        except (aiohttp.ClientError, OSError):
            return _Http(fault="lost connection")

    def wait(self, attempt: int, retry_after: str) -> float:
        """Seconds until the next attempt: full jitter, at least as long as the server asks."""
        cap = self.config.wait_seconds_cap
        longest = min(cap, BACKOFF_SECONDS * 2**attempt)
        return min(cap, max(self.random.uniform(0, longest), asked_wait(retry_after)))

    def check_welcome(self, http: _Http) -> None:
        """Stop before thousands of requests fail for one reason that an option can cure."""
        if self.welcome:
            return
        url, model = self.endpoint.base_url, self.endpoint.model
        if http.fault == "no connection":
            raise UsageError(
                f"nothing answers at --server.base_url {url}. Start the server there, or name "
                "another."
            )
        if http.status == 404:
            raise UsageError(
                f"{url} knows no model {model!r}, or does not answer chat requests (status 404). "
                "Check --server.model, and that --server.base_url ends as the server has it, "
                "mostly in /v1."
            )
        if http.status in (401, 403):
            raise UsageError(
                f"--server.base_url {url} refuses the key (status {http.status}). Put the right "
                "one into the environment variable that --server.api_key_variable names."
            )


async def _content(response: aiohttp.ClientResponse) -> bytes:
    """The body, up to one byte more than a reply may have."""
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > BODY_BYTES:
            break
    return b"".join(chunks)


def asked_wait(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for, 0 where it asks for nothing sensible."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            until = parsedate_to_datetime(retry_after)
        except (ValueError, TypeError, IndexError, OverflowError):
            return 0.0
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        seconds = (until - datetime.now(UTC)).total_seconds()
    return seconds if seconds > 0 else 0.0  # NaN too
