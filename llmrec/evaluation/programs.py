"""The commands that can fill a suite's row, each with its options and what decides its numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmrec.errors import UsageError, nearest
from llmrec.evaluation.result import identity
from llmrec.options import as_dict, option_names

if TYPE_CHECKING:
    from llmrec.chat.server import Servers

PROGRAMS = {
    "train": "llmrec.train_tcf",
    "chat": "llmrec.chat.command",
    "p5": "llmrec.prompting.train_p5",
    "rating": "llmrec.prompting.rating",
}
"""Name in a suite's row (``program: chat``) -> module with its ``configure`` and ``run``."""
CONFIGS = {
    "train": "llmrec.assembly.TrainConfig",
    "chat": "llmrec.chat.command.ChatConfig",
    "p5": "llmrec.prompting.train_p5.P5Config",
    "rating": "llmrec.prompting.rating_config.RatingConfig",
}
"""The dataclass of each one's options."""


class Shared:
    """What the rows of a suite have in common while it runs: data read once, one chat server."""

    def __init__(self) -> None:
        """Nothing is held yet."""
        from llmrec.data.readers import DataConfig, load_dataset
        from llmrec.encoders.loading import locate

        @functools.cache
        def prints(data: DataConfig) -> tuple[str, str]:
            dataset = load_dataset(data)
            return dataset.fingerprint(), dataset.told_fingerprint()

        self.prints = prints
        """A data set's fingerprints: of sequences and items, of ratings and reviews."""
        self.located = functools.cache(lambda encoder: str(locate(encoder).identity))
        self.servers: Servers | None = None

    def __enter__(self) -> Shared:
        """As it is."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the chat server, if a row started one."""
        if self.servers is not None:
            self.servers.stop()


def check_program(name: str) -> None:
    """Refuse a program that there is not."""
    if name not in PROGRAMS:
        raise UsageError(f"program: {name} is no command: {nearest(name, PROGRAMS)}")


def seeds_matter(name: str, options: Mapping[str, Any]) -> bool:
    """Whether another run.seed could change a row's numbers.

    A chat model that is asked once, without examples, at temperature 0 answers the same; means of
    ratings are what they are.
    """
    if name == "rating":
        from llmrec.prompting.rating_models import COUNTED

        return options.get("model.name") not in COUNTED
    drawn = {"chat.temperature": 0, "chat.shuffles": 1, "chat.examples": 0}
    return name != "chat" or any(options.get(key, off) != off for key, off in drawn.items())


def configure(name: str, argv: Sequence[str]) -> Any:
    """The config of a row's command line; refuses mistakes in it."""
    return import_module(PROGRAMS[name]).configure(argv)


def row_identity(name: str, argv: Sequence[str], shared: Shared) -> dict[str, Any]:
    """What decides the numbers of a row; see `result.identity`."""
    config = configure(name, argv)
    options, data = as_dict(config), shared.prints(config.data)[0]
    return identity(options, data, _READERS[name](config, shared))


def run(name: str, argv: Sequence[str], shared: Shared) -> int:
    """Fill a row; its exit code."""
    if name == "chat":
        from llmrec.chat import command
        from llmrec.chat.server import Servers

        shared.servers = shared.servers or Servers()
        return command.run(argv, shared.servers)
    return int(import_module(PROGRAMS[name]).run(argv))


def shared_options(options: dict[str, Any], name: str, among: Set[str]) -> dict[str, Any]:
    """Those of options given to all rows that a program takes.

    An option that none of the programs knows stays, so that the row refuses it by name. A file of
    options (``config``) is one of the train command's.

    Args:
        options: By dotted name.
        name: The program.
        among: All programs of the suite.
    """
    if among == {name}:
        return options
    known = {other: _options(other) for other in among}
    elsewhere = frozenset[str]().union(*(known[other] for other in among - {name}))
    return {
        option: value
        for option, value in options.items()
        if (option in known[name] or option not in elsewhere)
        and (name == "train" or option != "config")
    }


def _options(name: str) -> frozenset[str]:
    module, _, config_class = CONFIGS[name].rpartition(".")
    return option_names(getattr(import_module(module), config_class))


def _train_reader(config: Any, shared: Shared) -> str | None:
    """What tells the encoder's files, where a training run reads text."""
    from llmrec.models.baselines import BASELINES, READ_VECTORS

    learns_nothing = config.model.name in BASELINES and config.model.name not in READ_VECTORS
    if config.tower.name == "id" or learns_nothing:
        return None
    return "TF-IDF" if config.tower.control == "tfidf" else shared.located(config.encoder)


def _chat_reader(config: Any, shared: Shared) -> str | None:
    """What tells the chat model and its templates."""
    from llmrec.chat.command import reader_of

    return reader_of(config)


def _p5_reader(config: Any, shared: Shared) -> str | None:
    """What tells a pretrained model's files, the prompts and what they are made of."""
    from llmrec.prompting.train_p5 import reader_of

    return reader_of(config, shared.prints(config.data)[1])


def _rating_reader(config: Any, shared: Shared) -> str | None:
    """What tells the ratings, and where text is read the encoder's files and the template."""
    from llmrec.prompting.rating import reader_of

    return reader_of(config, shared.prints(config.data)[1])


_READERS: dict[str, Callable[[Any, Shared], str | None]] = {
    "train": _train_reader,
    "chat": _chat_reader,
    "p5": _p5_reader,
    "rating": _rating_reader,
}
