"""Runs a server for as long as the process that started it lives, however that one ends.

``python guard.py COMMAND...``; the standard input is a pipe from the starting process, which writes
nothing: the kernel closes it even when that process is killed. A file of its own that needs the
standard library alone, so that it starts at once and stays small.
"""

import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 20
"""Between asking a server to end and killing it; vLLM takes a few seconds to let go of a GPU."""


def main(command: list[str]) -> int:
    """Run a command until it ends or the standard input does; its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # ends by its input alone, with all of the server
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_heed_signals,
    )
    threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
    code = server.wait()
    _signal(server, signal.SIGKILL)  # processes of its own that it left
    return code if code >= 0 else 128 - code


def _heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _end_with_input(server: "subprocess.Popen[bytes]") -> None:
    sys.stdin.buffer.read()
    _signal(server, signal.SIGTERM)
    try:
        server.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(server, signal.SIGKILL)


def _signal(server: "subprocess.Popen[bytes]", number: int) -> None:
    try:
        os.killpg(server.pid, number)
    except (ProcessLookupError, PermissionError):  # nobody left; macOS says so in its own way
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
