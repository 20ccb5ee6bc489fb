"""Prompt templates: versioned Jinja files that a case's texts are put into."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from llmrec.data.item_text import Template, parse_template, read_source
from llmrec.errors import UsageError, nearest
from llmrec.resources import listing, shipped


@dataclass(frozen=True)
class Prompt:
    """A template that is ready to be rendered."""

    template: Template
    compiled: jinja2.Template
    option: str
    """The option that named it, for error messages."""

    def render(self, **values: Any) -> str:
        """The prompt, its line breaks kept and its ends stripped; inputs not read are left out.

        Raises:
            UsageError: The template fails on these values.
        """
        read = {name: values[name] for name in self.template.inputs if name in values}
        try:
            return self.compiled.render(read).strip()
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            given = ", ".join(sorted(values))
            raise UsageError(
                f"{self.option}: {self.template.id} fails ({error}). It is given {given}."
            ) from error


# Templates may come with a downloaded config, hence the sandbox. No autoescape: a language model
# reads them. Blocks on lines of their own leave no empty lines behind.
_ENVIRONMENT = SandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    autoescape=False,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=False,
)


@functools.lru_cache(maxsize=256)
def load_prompt(name_or_path: str, option: str) -> Prompt:
    """Read a template, check its header against its body and compile it.

    Args:
        name_or_path: A shipped name such as `chat/pick`, or the path of a file ending in `.jinja`.
        option: What named it, for error messages.

    Raises:
        UsageError: There is no such template, or its header or syntax is wrong.
    """
    if name_or_path.endswith(".jinja"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise UsageError(f"{option}={name_or_path}: no such file; give its full path.")
    else:
        files = (PurePosixPath(entry) for entry in listing("prompts"))
        known = [str(file.with_suffix("")) for file in files if file.suffix == ".jinja"]
        if name_or_path not in known:
            raise UsageError(
                f"{option}={name_or_path} is no shipped template and no path ending in .jinja; "
                f"{nearest(name_or_path, known)}"
            )
        path = shipped("prompts", f"{name_or_path}.jinja")
    template = parse_template(read_source(path, option), str(path), option)
    return Prompt(template, _ENVIRONMENT.from_string(template.source), option)
