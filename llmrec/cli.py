"""``llmrec <verb>``: finds the verb's module and hands the rest of the line to its main(argv).

A module is imported only when its verb is chosen, so ``llmrec --help`` answers at once.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

import llmrec
from llmrec.errors import nearest

VERBS = {
    "train": ("llmrec.train_tcf", "train one recommender from a YAML file and options"),
    "embed": ("llmrec.encoders.store", "fill the embedding store: encode what is new or changed"),
    "evaluate": ("llmrec.evaluation.suite", "run a suite: several recommenders, one table"),
    "compare": ("llmrec.reporting.tables", "print the paired table of finished runs"),
}
"""verb -> (module with ``main(argv) -> int``, one line of help)."""

HELP = "\n".join(
    [
        "usage: llmrec VERB [options]",
        "",
        *(f"  {verb:10s}{line}" for verb, (_, line) in VERBS.items()),
        "",
        "  llmrec VERB --help    the verb's options, with their units and defaults",
        "  llmrec --version",
        "",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the words after ``llmrec``; those of this process where None.

    Returns:
        The exit code: 0, or 2 for a mistake on the command line.
    """
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if verb in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if verb in ("-V", "--version"):
        sys.stdout.write(f"llmrec {llmrec.__version__}\n")
        return 0
    if not verb:
        sys.stderr.write(HELP)
        return 2
    if verb not in VERBS:
        sys.stderr.write(f"llmrec: no verb {verb!r}: {nearest(verb, VERBS)}\n")
        return 2
    module, _ = VERBS[verb]
    return int(import_module(module).main(rest))


def console() -> None:
    """The console command."""
    sys.exit(main())


if __name__ == "__main__":
    console()
