"""``llmrec prompts render --template 2-3 --user U``: one prompt and its answer for a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from rich.console import Console
from rich.markup import escape

from llmrec.data.readers import DataConfig, effective
from llmrec.data.splits import SplitConfig
from llmrec.errors import UsageError, exit_code, nearest
from llmrec.options import parse
from llmrec.prompting.families import P5Template
from llmrec.prompting.generate import open_session, template_named
from llmrec.prompting.indexing import IndexingConfig
from llmrec.prompting.p5 import Example, PromptConfig, PromptGenerator


@dataclass(frozen=True)
class RenderConfig:
    """Show one prompt and its answer."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    indexing: IndexingConfig = field(default_factory=IndexingConfig)
    template: str = ""
    """Id of the template, such as 2-3."""
    user: str = ""
    """The user's id in the data."""
    part: Literal["train", "valid", "test"] = "test"
    """valid, test: the user's case. train: about the last interaction of the training part that
    has what the template asks for."""


def example_of(
    generator: PromptGenerator,
    template: P5Template,
    user: int,
    part: Literal["train", "valid", "test"],
) -> Example:
    """One user's prompt.

    Raises:
        UsageError: The user has no such case, or nothing that the template asks for.
    """
    name = generator.dataset.user_ids[user]
    if part == "train":
        start, end = (
            int(generator.dataset.interactions.offsets[user]),
            int(generator.train_end[user]),
        )
        for row in range(end - 1, start - 1, -1):
            if generator.can_ask(template, row):
                return generator.text_of(template, user, row, row)
        raise UsageError(
            f"--user {name} has no training interaction that template {template.id} can be asked "
            "about; name another user."
        )
    cases = generator.cut.valid if part == "valid" else generator.cut.test
    found = np.flatnonzero(cases.user == user)
    if not len(found):
        raise UsageError(f"--user {name} has no {part} case; name another user or --part train.")
    case = int(found[0])
    return generator.text_of(template, user, int(cases.end[case]), int(cases.target[case]))


def _show(argv: Sequence[str]) -> int:
    description = "Show one prompt and its answer."
    config, given = parse(RenderConfig, argv, "llmrec prompts render", description)
    config = replace(config, data=effective(config.data, given))
    if not config.template or not config.user:
        raise UsageError("--template and --user are both needed, such as --template 2-3 --user 17.")
    session = open_session(config.data, config.split, config.prompts, config.indexing)
    generator = session.generator
    template = template_named(session.templates, config.template, "template")
    users = generator.dataset.user_ids
    if config.user not in users:
        raise UsageError(f"--user {config.user} is not in the data; {_near(config.user, users)}")
    prompt = example_of(generator, template, users.index(config.user), config.part)
    out = Console(soft_wrap=True, highlight=False)
    item = generator.dataset.catalog.ids[prompt.item - 1]
    held_out = ", held out" if template.held_out else ""
    about = f"template {template.id} ({template.family}{held_out}), {prompt.split}, user "
    out.print(escape(f"--- {about}{config.user}, item {item}"), style="bold")
    out.print(escape(_readable(prompt.input)))
    out.print("--- answer", style="bold")
    out.print(escape(_readable(prompt.target)))
    return 0


def _near(name: str, users: Sequence[str]) -> str:
    """The user with the closest id among the first ones, or some that there are."""
    first = users[:2000]  # a catalogue of millions is no list to compare with
    said = nearest(name, first)
    return said if said.startswith("did") else f"there is, for one, {first[0]}."


def _readable(text: str) -> str:
    """Text as a terminal may show it: what would steer it is written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def main(argv: Sequence[str]) -> int:
    """Entry point of ``llmrec prompts render``."""
    return exit_code(_show, argv)
