"""A chat server in a process of its own that does next to nothing: the floor of what asking costs.

python stub_server.py MILLISECONDS LIFETIME_SECONDS; prints its port. Every request gets the same
answer, after this time.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ANSWER = {
    "id": "chatcmpl-0",
    "object": "chat.completion",
    "model": "stub",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": '{"ranking": [3, 1, 4, 15, 9, 2, 6]}'},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 1500, "completion_tokens": 20, "total_tokens": 1520},
}


class Stub(asyncio.Protocol):
    """One connection; requests come one after another, each with a Content-Length."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.received = seconds, bytearray()
        body = json.dumps(ANSWER).encode()
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
        self.reply = f"{head}{len(body)}\r\n\r\n".encode() + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.received[:end]).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        if len(self.received) < end + 4 + length:
            return
        self.received.clear()
        if self.seconds:
            asyncio.get_running_loop().call_later(self.seconds, self.transport.write, self.reply)
        else:
            self.transport.write(self.reply)


async def serve(seconds: float, lifetime: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stub(seconds), "127.0.0.1", 0, backlog=512)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.sleep(lifetime)


@contextlib.contextmanager
def stub(milliseconds: int, lifetime: int = 600) -> Iterator[str]:
    """The base URL of one."""
    words = [sys.executable, str(Path(__file__)), str(milliseconds), str(lifetime)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]) / 1000, float(sys.argv[2])))
