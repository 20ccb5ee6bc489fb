"""Answers on disk: a line each, forced there in groups before they count, never one twice.

answers.jsonl, JSON lines:
{"format": 1, "fingerprint": {...}}     the first: what decides every question
{"sent": 7}                             written before request 7 is sent, so that a kill tells
                                        which ones may have been paid for without an answer
{"number": 7, "digest": ..., ...}       the answer to request 7
"""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, get_args

from llmrec.chat.endpoint import ClientConfig
from llmrec.chat.requests import Answer, Status
from llmrec.errors import UsageError
from llmrec.runs import _writing, sync, write_atomically

FORMAT = 1
START_OVER = "Start over with --resume never, or name another --run.folder."
BEGIN = b'{"format": '
MILLION = 1_000_000
MOST = 1 << 30
"""No request has this number and no answer as many tokens: a damaged line must not claim memory."""
_FIELDS = {name.name for name in fields(Answer)}
_STATUSES = frozenset(get_args(Status))


@dataclass(frozen=True)
class Spent:
    """What a run has cost so far, over all its resumptions."""

    requests: int
    """Answers in the journal, of every status."""
    attempts: int
    """Times that these were sent."""
    sent_again: int
    """Requests that a stop left without an answer and that were sent anew; perhaps paid twice."""
    prompt_tokens: int
    completion_tokens: int
    money: float
    """In the prices' currency; 0 where unpriced."""
    statuses: Mapping[str, int] = field(default_factory=dict)
    """Answers by status."""
    retries: Mapping[str, int] = field(default_factory=dict)
    """Attempts that were followed by another, by reason."""


class AnswerJournal:
    """The answers of one run; a context manager that only one process can hold.

    An answer is written when it is added and counts (`is_done`) after the next `commit`. One thread
    adds; `commit` may run in another. Memory: 9 bytes a request.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        """Start a journal, or go on with the one that is there; its torn last line is dropped.

        Args:
            path: The file, in a folder that exists.
            fingerprint: What decides every question and answer, ready for JSON.

        Raises:
            UsageError: The journal is of another fingerprint, damaged before its last line, held by
                another process, or cannot be written.
        """
        self.path = path
        self._waiting: list[int] = []
        self._offsets = array("q")  # of the answer's line; 0, where the first line is: none yet
        self._sent = bytearray()
        self._done = bytearray()
        self._done_count = self._in_flight = self._sent_again = self._attempts = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._statuses: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        with _writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            self._size = self._read(json.loads(json.dumps(fingerprint)))
            with _writing(path):
                os.truncate(self._file, self._size)
                if not self._size:
                    self._write({"format": FORMAT, "fingerprint": dict(fingerprint)})
                os.fsync(self._file)
                sync(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    @staticmethod
    def fingerprint_of(path: Path) -> dict[str, Any]:
        """The fingerprint of the journal at `path`; empty where a kill came before its first line.

        Raises:
            UsageError: The file is no journal.
        """
        with path.open("rb") as file:
            line = file.readline()
        return _header(path, line) if line.endswith(b"\n") else {}

    @staticmethod
    def without_failed(path: Path) -> int:
        """Take failed requests out of the journal at `path`, to be asked again; how many they were.

        Raises:
            UsageError: The file cannot be written.
        """
        kept, failed = [], 0
        for line in path.read_bytes().splitlines(keepends=True):
            if b'"status": "failed"' in line and json.loads(line).get("status") == "failed":
                failed += 1
            else:
                kept.append(line)
        if failed:
            write_atomically(path, b"".join(kept))
        return failed

    @staticmethod
    def peek(path: Path, numbers: range) -> dict[int, Answer]:
        """Some answers, as far as they are written; another process may go on writing."""
        found = {}
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and b'"digest"' in line and _is_json(line):
                    values = json.loads(line)
                    if values.get("number") in numbers:
                        answer, _ = _answer(values)
                        found[answer.number] = answer
        return found

    def __enter__(self) -> AnswerJournal:
        """The journal itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit and let go of the file."""
        try:
            self.commit()
        finally:
            os.close(self._file)

    @property
    def done_count(self) -> int:
        """Requests whose answer is on the disk."""
        return self._done_count

    @property
    def in_flight_count(self) -> int:
        """Requests that were sent and have no answer; after opening: those that a stop cut off."""
        return self._in_flight

    def is_done(self, number: int) -> bool:
        """Whether a request's answer is on the disk."""
        return number < len(self._done) and bool(self._done[number])

    def note_sent(self, number: int) -> None:
        """Note, before it is sent, that a request may be paid for from now on. Not forced."""
        self._write({"sent": number})
        self._take_sent(number)

    def add(self, answer: Answer, retried: Sequence[str] = ()) -> None:
        """Write an answer; it counts after the next `commit`.

        Args:
            answer: Of a request that has none yet.
            retried: Why each attempt but the last was not enough.
        """
        if answer.number < len(self._offsets) and self._offsets[answer.number]:
            raise ValueError(f"request {answer.number} has an answer already")
        place = self._size
        self._write(vars(answer) | ({"retried": list(retried)} if retried else {}))
        self._take_answer(answer, retried, place)
        self._waiting.append(answer.number)

    def commit(self) -> list[int]:
        """Force what was added to the disk; the numbers that count from now on."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            with _writing(self.path):
                os.fsync(self._file)
            self._mark_done(waiting)
        return waiting

    def answers(self) -> Iterator[Answer]:
        """Every answer in the order of its number, read one at a time."""
        with self.path.open("rb") as file:
            for offset in self._offsets:
                if offset:
                    yield self._at(file, offset)

    def answer(self, number: int) -> Answer | None:
        """The answer to one request, None where there is none."""
        if number >= len(self._offsets) or not self._offsets[number]:
            return None
        with self.path.open("rb") as file:
            return self._at(file, self._offsets[number])

    def spent(self, prices: ClientConfig) -> Spent:
        """What the run has cost so far."""
        paid_in = self._prompt_tokens * prices.input_price
        paid_out = self._completion_tokens * prices.output_price
        return Spent(
            requests=self._statuses.total(),
            attempts=self._attempts,
            sent_again=self._sent_again,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            money=(paid_in + paid_out) / MILLION,
            statuses=dict(sorted(self._statuses.items())),
            retries=dict(sorted(self._retries.items())),
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except BlockingIOError:
            raise UsageError(
                f"another process is writing {self.path}. Wait for it, or name another "
                "--run.folder."
            ) from None

    def _write(self, values: Mapping[str, Any]) -> None:
        line = (json.dumps(values, allow_nan=False) + "\n").encode("ascii")
        with _writing(self.path):
            try:
                written = os.write(self._file, line)
                if written < len(line):  # a full disk takes a part; the next write says why
                    os.write(self._file, line[written:])
            except OSError:
                os.truncate(self._file, self._size)
                raise
        self._size += len(line)

    def _read(self, fingerprint: Mapping[str, Any]) -> int:
        """Take what the file holds; the bytes of its whole lines."""
        size = 0
        with self.path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            for number, line in enumerate(file, start=1):
                last = size + len(line) == end
                torn = not line.endswith(b"\n") or (last and not _is_json(line))
                if torn and (number > 1 or line.startswith(BEGIN) or BEGIN.startswith(line)):
                    break  # by a kill or a crash of the machine
                if number == 1:
                    _check_same(self.path, _header(self.path, line), fingerprint)
                else:
                    self._take(number, line, size)
                size += len(line)
        return size

    def _take(self, line_number: int, line: bytes, offset: int) -> None:
        try:
            values = json.loads(line)
            if values.keys() == {"sent"}:
                return self._take_sent(_whole(values["sent"]))
            answer, retried = _answer(values)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UsageError(f"{self.path} line {line_number} is damaged. {START_OVER}") from None
        if answer.number < len(self._offsets) and self._offsets[answer.number]:
            raise UsageError(
                f"{self.path} line {line_number} answers request {answer.number} a second time. "
                f"{START_OVER}"
            )
        self._take_answer(answer, retried, offset)
        self._mark_done([answer.number])
        return None

    def _take_sent(self, number: int) -> None:
        if number >= len(self._sent):
            more = number + 1 - len(self._sent)
            self._sent.extend(bytes(more))
            self._offsets.frombytes(bytes(more * self._offsets.itemsize))
            self._done.extend(bytes(more))
        if self._sent[number]:
            self._sent_again += 1
        else:
            self._in_flight += 1
        self._sent[number] = True

    def _take_answer(self, answer: Answer, retried: Sequence[str], offset: int) -> None:
        if answer.number >= len(self._sent) or not self._sent[answer.number]:
            self._take_sent(answer.number)  # its way of asking notes no sendings
        self._offsets[answer.number] = offset
        self._in_flight -= 1
        self._attempts += answer.attempts
        self._prompt_tokens += answer.prompt_tokens
        self._completion_tokens += answer.completion_tokens
        self._statuses[answer.status] += 1
        self._retries.update(retried)

    def _mark_done(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._done[number] = True
        self._done_count += len(numbers)

    def _at(self, file: BinaryIO, offset: int) -> Answer:
        file.seek(offset)
        return _answer(json.loads(file.readline()))[0]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < MOST:
        raise ValueError(value)
    return value


def _answer(values: dict[str, Any]) -> tuple[Answer, tuple[str, ...]]:
    """An answer and its retries; ValueError or TypeError where the values are none."""
    retried = tuple(values.pop("retried", ()))
    if values.keys() != _FIELDS or values["status"] not in _STATUSES:
        raise ValueError("no answer")
    for name in ("number", "attempts", "prompt_tokens", "completion_tokens"):
        _whole(values[name])
    texts = (values["digest"], values["text"], values["problem"], *retried)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("no text")
    values["top"] = tuple((str(token), float(logprob)) for token, logprob in values["top"])
    values["seconds"] = float(values["seconds"])
    return Answer(**values), retried


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
        known = values.keys() == {"format", "fingerprint"} and values["format"] == FORMAT
        if known and isinstance(values["fingerprint"], dict):
            return dict(values["fingerprint"])
    except (ValueError, AttributeError, RecursionError):
        pass
    raise UsageError(f"{path} line 1 is damaged, or this is no journal of answers. {START_OVER}")


def _check_same(path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in [*kept, *wanted]:
        before, now = (_shown(values, name) for values in (kept, wanted))
        if kept.get(name) != wanted.get(name) or (name in kept) != (name in wanted):
            raise UsageError(
                f"{path} holds answers for {name}={before}, but now it is {now}. {START_OVER}"
            )


def _shown(values: Mapping[str, Any], name: str, longest: int = 60) -> str:
    if name not in values:
        return "absent"
    text = json.dumps(values[name])
    return text if len(text) <= longest else f"{text[:longest]}..."
