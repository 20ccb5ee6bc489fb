"""``llmrec <verb>``: finds the verb's module and hands the rest of the line to its main(argv).

A verb is one word or two. A module is imported only when its verb is chosen, so ``llmrec --help``
answers at once.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

import llmrec
from llmrec.errors import nearest

VERBS = {
    "train": ("llmrec.train_tcf", "train one recommender from a YAML file and options"),
    "embed": ("llmrec.encoders.store", "fill the embedding store: encode what is new or changed"),
    "evaluate": ("llmrec.evaluation.suite", "run a suite: several recommenders, one table"),
    "search": (
        "llmrec.studies.search",
        "search options of a suite's rows on validation, then run the suite",
    ),
    "compare": ("llmrec.reporting.tables", "print the paired table of finished runs"),
    "export": (
        "llmrec.serving.export",
        "write a run's text encoder or item vectors for use elsewhere",
    ),
    "score": ("llmrec.score", "rank a finished run's test cases on candidate lists"),
    "chat": ("llmrec.chat.command", "ask a chat model about test cases and score its answers"),
    "chat show": ("llmrec.chat.show", "show one case: prompt, answer, parse and verdict"),
    "chat injection": (
        "llmrec.chat.attack",
        "measure how far payloads inside titles lift their items",
    ),
    "prompts": ("llmrec.prompting.generate", "write a data set as P5-style prompts with answers"),
    "prompts render": ("llmrec.prompting.show", "show one prompt about one user"),
    "prompts audit": (
        "llmrec.prompting.audit",
        "look for test items in training prompts and for numbers that tell the answer",
    ),
    "p5 train": ("llmrec.prompting.train_p5", "train a language model on recommendation prompts"),
    "p5 ask": ("llmrec.prompting.ask", "ask a finished P5 run by another prompt or otherwise"),
    "rating": ("llmrec.prompting.rating", "train one predictor of ratings"),
    "data prepare": ("llmrec.data.prepared", "read a data set once, for any number of runs"),
    "data audit": (
        "llmrec.data.audit.command",
        "look for what would mislead an evaluation on a data set",
    ),
}
"""verb -> (module with ``main(argv) -> int``, one line of help)."""


def _listing(verbs: Mapping[str, tuple[str, str]]) -> str:
    return "\n".join(
        [
            "usage: llmrec VERB [options]",
            "",
            *(f"  {verb:16s}{line}" for verb, (_, line) in verbs.items()),
            "",
            "  llmrec VERB --help    the verb's options, with their units and defaults",
            "",
        ]
    )


HELP = f"{_listing(VERBS)}  llmrec --version\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the words after ``llmrec``; those of this process where None.

    Returns:
        The exit code: 0, or 2 for a mistake on the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-V"], ["--version"]):
        sys.stdout.write(f"llmrec {llmrec.__version__}\n")
        return 0
    for length in (2, 1):  # `chat show` before `chat`
        verb = " ".join(words[:length])
        if verb in VERBS:
            try:
                module = import_module(VERBS[verb][0])
            except KeyboardInterrupt:  # these imports take seconds
                return 130
            return int(module.main(words[length:]))
    # No verb yet: the first word of some verbs of two words stands for all of those.
    group = {verb: VERBS[verb] for verb in VERBS if words and verb.startswith(words[0] + " ")}
    listing, rest = (_listing(group), words[1:]) if group else (HELP, words)
    if rest[:1] in (["-h"], ["--help"], ["help"]):
        sys.stdout.write(listing)
        return 0
    if not rest:
        sys.stderr.write(listing)
        return 2
    verb = f"{words[0]} {rest[0]}" if group else rest[0]
    sys.stderr.write(f"llmrec: no verb {verb!r}: {nearest(verb, group or VERBS)}\n")
    return 2


def console() -> None:
    """The console command."""
    sys.exit(main())


if __name__ == "__main__":
    console()
