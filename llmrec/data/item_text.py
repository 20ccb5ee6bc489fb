"""Item text: a versioned Jinja template over an item's fields, rendered once per item."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment

from llmrec.errors import UsageError, nearest
from llmrec.resources import listing, shipped

_HEADER = re.compile(r"\{#-?\s*(?P<entries>.*?)\s*-?#\}")
OPTION = "data.item_text"
"""Names an item-text template."""
_HEADER_EXAMPLE = "{# id: title | version: 1 | inputs: title #}"


@dataclass(frozen=True)
class Template:
    """One item-text template."""

    id: str
    """Name given in the header."""
    version: int
    """Raised by hand whenever the rendered text changes."""
    inputs: tuple[str, ...]
    """The item fields it reads."""
    source: str
    """The whole file, header included."""
    sha256: str
    """Of ``source``; stands in every result made with this template."""


def _environment() -> SandboxedEnvironment:
    # Templates may come with a downloaded config, hence the sandbox. No autoescape: the reader is
    # a language model, and "Tom &amp; Jerry" is not what the title says.
    return SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


def load_template(name_or_path: str) -> Template:
    """Read a template and check its header against its body.

    Args:
        name_or_path: A shipped name (`title`) or the path of a file ending in `.jinja`.

    Raises:
        UsageError: If there is no such template, or its header or syntax is wrong.
    """
    if name_or_path.endswith(".jinja"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise UsageError(f"data.item_text={name_or_path}: no such file; give its full path.")
    else:
        prompts = (PurePosixPath(entry) for entry in listing("prompts"))
        known = [p.stem for p in prompts if p.parts[0] == "item_text" and p.suffix == ".jinja"]
        if name_or_path not in known:
            hint = nearest(name_or_path, known)
            raise UsageError(
                f"data.item_text={name_or_path} is no shipped template and no path ending in "
                f".jinja; {hint}"
            )
        path = shipped("prompts", f"item_text/{name_or_path}.jinja")
    return parse_template(read_source(path), str(path))


def read_source(path: Path, option: str = OPTION) -> str:
    """A template file's text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{option}: {path} is not UTF-8; save it as UTF-8.") from error


def parse_template(source: str, path: str, option: str = OPTION) -> Template:
    """Make a template of a file's text; `path` and `option` are for error messages."""
    entries = _header_entries(source, path, option)
    if not entries["version"].isdecimal():
        raise UsageError(f"{option}: {path} has version {entries['version']!r}; use 1, 2, ..")
    inputs = tuple(name.strip() for name in entries["inputs"].split(",") if name.strip())
    try:
        used = jinja2.meta.find_undeclared_variables(_environment().parse(source))
    except jinja2.TemplateSyntaxError as error:
        message = f"{option}: {path} line {error.lineno} is not valid Jinja ({error.message})"
        raise UsageError(f"{message}; correct that line.") from error
    if used != set(inputs):
        raise UsageError(
            f"{option}: the header of {path} says inputs: {', '.join(inputs) or 'none'}, but "
            f"its body reads {', '.join(sorted(used)) or 'none'}; make them equal."
        )
    sha256 = hashlib.sha256(source.encode()).hexdigest()
    return Template(entries["id"], int(entries["version"]), inputs, source, sha256)


def _header_entries(source: str, path: str, option: str) -> dict[str, str]:
    first_line = source.partition("\n")[0].strip()
    match = _HEADER.fullmatch(first_line)
    parts = [] if match is None else match["entries"].split("|")
    pairs = (part.partition(":") for part in parts)
    entries = {key.strip(): value.strip() for key, _, value in pairs}
    if set(entries) != {"id", "version", "inputs"}:
        raise UsageError(
            f"{option}: the first line of {path} must be a header with id, version and "
            f"inputs, like {_HEADER_EXAMPLE}"
        )
    return entries


def render(template: Template, fields: dict[str, list[str]], count: int) -> list[str]:
    """Render every item; runs of white space become one space.

    Args:
        template: What to write.
        fields: Raw fields by name, each of `count` strings; the empty string is an absent value.
        count: N.

    Returns:
        (N,) texts. An item all of whose inputs are empty has the empty text, whatever the template
        writes around them: "Title: ." tells a language model nothing but is not nothing to it.

    Raises:
        UsageError: If the template reads a field that the items do not have, or fails on an item.
    """
    for name in template.inputs:
        if name not in fields:
            raise UsageError(
                f"data.item_text={template.id} reads the item field {name!r}, which this data does "
                f"not have (its fields: {', '.join(sorted(fields)) or 'none'}); choose "
                "or write another template, or data.item_text=none to go without text."
            )
    compiled = _environment().from_string(template.source)
    texts = [""] * count
    rows = zip(*(fields[name] for name in template.inputs), strict=True)
    for index, values in enumerate(rows):
        if not any(values):
            continue
        try:
            # The render function itself: Template.render doubles the time of 300,000 items.
            context = compiled.new_context(dict(zip(template.inputs, values, strict=True)))
            texts[index] = " ".join("".join(compiled.root_render_func(context)).split())
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UsageError(
                f"data.item_text={template.id} fails on item number {index + 1} ({error}); "
                "correct the template."
            ) from error
    return texts
