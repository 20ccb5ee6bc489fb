"""Runs a server that must not outlive its parent, whatever ends the parent.

python keeper.py COMMAND ...

The parent holds the other end of standard input. Once that is closed, by the parent or by the
kernel after a kill -9, the command and every process that it has started are stopped. A signal at
the parent's death (PR_SET_PDEATHSIG) would reach the command alone, not an engine that it started.
Expects to be the leader of a process group of its own. Standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 10
"""Between asking the group to stop and ending it."""


def _stop_with_parent() -> None:
    sys.stdin.buffer.read()  # returns when nobody holds the other end any more
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run the command until it or the parent ends; then end the whole group, itself included."""
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # after the start, or the command inherits it
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    server.wait()
    os.killpg(0, signal.SIGKILL)  # what the command has left behind


if __name__ == "__main__":
    main()
