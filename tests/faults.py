"""Training runs in processes of their own that are killed, starved of disk, or run side by side.

The processes come from a server that has imported the training script once, so each costs a
fraction of a second.
"""

import contextlib
import errno
import importlib
import io
import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Fault:
    """What happens to a process, and when."""

    kind: str = "none"
    """none; forward: killed before the n-th forward pass; file: killed before the n-th operation on
    files; no space: the n-th operation on files fails; small files: no file may pass n bytes."""
    n: int = 0
    rank: int = 0
    """The process that it happens to."""


NOTHING = Fault()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run(
    argv: Sequence[str],
    fault: Fault = NOTHING,
    processes: int = 1,
    limit: float = 120,
    program: str = "llmrec.train_tcf",
) -> tuple[list[int], str]:
    """Exit codes of all processes of one run, and what the first said; negative: by a signal.

    `program` is the module whose main is called.

    Once one has died the others, who wait for it, are killed, as torchrun does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmrec.train_tcf"])
    ours, theirs = context.Pipe(duplex=False)
    port = free_port()
    started: list[BaseProcess] = []
    for rank in range(processes):
        own = fault if rank == fault.rank else NOTHING
        said = theirs if rank == 0 else None
        process = context.Process(
            target=_train, args=(list(argv), rank, processes, port, own, said, program)
        )
        process.start()
        started.append(process)
    theirs.close()
    until = time.monotonic() + limit
    while any(process.exitcode is None for process in started):
        died = any(process.exitcode not in (None, 0) for process in started)
        if died:
            until = min(until, time.monotonic() + 2)
        if time.monotonic() > until:
            for process in started:
                process.kill()
        for process in started:
            process.join(0.01)
    words = ""
    with contextlib.suppress(EOFError):
        words = ours.recv() if ours.poll() else ""
    return [int(process.exitcode or 0) for process in started], words


def _train(
    argv: list[str],
    rank: int,
    processes: int,
    port: int,
    fault: Fault,
    said: Any,
    program: str,
) -> None:
    """Body of a process."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if processes == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    main = importlib.import_module(program).main
    _install(fault)
    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        code = main(argv)
    if said is not None:
        said.send(words.getvalue())
    os._exit(code)


def _install(fault: Fault) -> None:
    """Prepare a fault in this process."""
    if fault.kind == "forward":
        from llmrec.models.recommender import Recommender
        from llmrec.prompting.language_model import LanguageModel

        for model in (Recommender, LanguageModel):
            _before(model, "forward", fault.n, _die)
    elif fault.kind == "small files":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.n, fault.n))
    elif fault.kind in ("file", "no space"):
        import shutil

        from llmrec import checkpoints

        count = iter(range(1, 10**9))

        def reached() -> None:
            if next(count) == fault.n:
                if fault.kind == "file":
                    _die()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        for owner, name in (
            (os, "fsync"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree"),
            (os, "unlink"), (checkpoints, "save_file"),
        ):  # fmt: skip
            _before(owner, name, None, reached)


def _before(owner: Any, name: str, n: int | None, action: Callable[[], None]) -> None:
    """Call `action` before the n-th call of a function, or before every one."""
    real, count = getattr(owner, name), iter(range(1, 10**9))

    def replaced(*args: Any, **named: Any) -> Any:
        if n is None or next(count) == n:
            action()
        return real(*args, **named)

    setattr(owner, name, replaced)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
