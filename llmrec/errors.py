"""A mistake of the user's, and how every entry point reports it."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Iterable, Sequence


class UsageError(Exception):
    """A mistake of the user's: one sentence that names the option and the way out; exit code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a misspelt name: the one it is closest to, else all there are."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}."


def exit_code(function: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run an entry point: a `UsageError` is one line and exit code 2, Ctrl-C one line and 130."""
    try:
        return function(argv)
    except UsageError as error:
        sys.stderr.write(f"llmrec: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("llmrec: interrupted; what was finished is kept.\n")
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.stderr.write("llmrec: the output cannot be written: the disk is full.\n")
        return 2
