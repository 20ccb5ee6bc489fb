"""Template families: every recommendation task as sentences, one Jinja file per wording."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.sandbox import SandboxedEnvironment

from llmrec.data.item_text import parse_template, read_source
from llmrec.errors import UsageError, nearest
from llmrec.resources import listing, shipped

OPTION = "prompts.templates"
"""Names a folder of families."""
FAMILIES = ("rating", "sequential", "explanation", "review", "direct", "zero_shot")
_ABOUT_THE_TARGET = ("stars", "feature", "review", "headline", "explanation")
INPUTS = ("user", "history", "item", "title", "candidates", *_ABOUT_THE_TARGET)
"""What a body may read; all are strings, `history` and `candidates` too."""

_HEADER = re.compile(r"\{#-?\s*(?P<entries>.*?)\s*-?#\}")
_ENTRIES = ("id", "version", "inputs", "target", "part")
_EXAMPLE = "{# id: 2-3 | version: 1 | inputs: user, history | target: item | part: seen #}"

_TARGETS: dict[str, tuple[str, ...]] = {  # what each family may ask for
    "rating": ("stars", "yes_no", "like_dislike"),
    "sequential": ("item", "yes_no"),
    "explanation": ("explanation",),
    "review": ("headline", "stars"),
    "direct": ("item", "yes_no"),
    "zero_shot": ("stars", "yes_no", "like_dislike", "explanation"),
}
_REFUSED: dict[str, tuple[str, ...]] = {
    # A drawn negative was never rated or reviewed: such words would tell it from the true item.
    "sequential": _ABOUT_THE_TARGET,
    "direct": _ABOUT_THE_TARGET,
    # Items of another data set have no identifier here.
    "zero_shot": ("item", "candidates", "history"),
}
_HOLD_THE_ANSWER: dict[str, tuple[str, ...]] = {
    "item": ("item", "title"),
    "stars": ("stars",),
    "yes_no": (),
    "like_dislike": ("stars",),
    "explanation": ("explanation", "review"),  # it is a sentence of the review
    "headline": ("headline",),
}
# Templates may come from anyone, hence the sandbox. No autoescape: a language model reads them.
_ENVIRONMENT = SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
del _ENVIRONMENT.filters["random"]  # the same seed gives the same prompts
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    MemoryError,
)
_SAMPLE = {name: f"{name}_1" for name in INPUTS} | {"stars": "4"}


@dataclass(frozen=True)
class P5Template:
    """One wording of one task."""

    id: str
    """Name given in the header and to the file, such as "2-3"."""
    family: str
    """One of `FAMILIES`; the file's folder."""
    version: int
    """Raised by hand whenever the rendered text changes."""
    inputs: tuple[str, ...]
    """What the body reads, of `INPUTS`."""
    target: str
    """What is to be answered: item, stars, yes_no, like_dislike, explanation or headline."""
    held_out: bool
    """Never in training prompts: it tests whether a model understands words it has not seen."""
    sha256: str
    """Of the whole file, header included."""
    source: str = field(repr=False)
    """The whole file."""

    @property
    def group(self) -> str:
        """How its questions are made: next, choose, judge, stars or text.

        "next" names an item of the whole catalogue, "choose" one of `candidates`; "judge" answers
        yes or no, like or dislike; "text" writes an explanation or a headline.
        """
        if self.target == "item":
            return "choose" if "candidates" in self.inputs else "next"
        if self.target in ("yes_no", "like_dislike"):
            return "judge"
        return "stars" if self.target == "stars" else "text"

    def render(self, values: Mapping[str, str | float]) -> str:
        """The prompt on one line: runs of white space become one space.

        Args:
            values: A value per name in `inputs`; others are ignored.

        Raises:
            UsageError: The template fails on these values or writes nothing.
        """
        try:
            text = " ".join(_writer(self.source)(values).split())
        except _FAILURES as error:
            missing = [name for name in self.inputs if name not in values]
            why = f"it is not given {', '.join(missing)}" if missing else str(error) or "no memory"
            raise UsageError(f"{OPTION}: template {self.id} fails: {why}; correct it.") from error
        if not text:
            raise UsageError(f"{OPTION}: template {self.id} writes nothing; correct it.")
        return text


@functools.cache
def _writer(source: str) -> Callable[[Mapping[str, str | float]], str]:
    """What writes a template's text. By source and not in a field, so that templates pickle."""
    compiled = _ENVIRONMENT.from_string(source)
    pattern = _pattern(source)
    if pattern is not None:
        return pattern.format_map
    return lambda values: compiled.render(values)


def _pattern(source: str) -> str | None:
    """A template that only puts inputs between words, as a format string, else None.

    Jinja takes 7 us to set up a render, which a million prompts would pay each; this takes less
    than 1.
    """
    parts: list[str] = []
    for output in _ENVIRONMENT.parse(source).body:
        if not isinstance(output, nodes.Output):
            return None
        for node in output.nodes:
            if isinstance(node, nodes.TemplateData):
                parts.append(node.data.replace("{", "{{").replace("}", "}}"))
            elif isinstance(node, nodes.Name):
                parts.append(f"{{{node.name}}}")
            else:
                return None
    return "".join(parts)


def load_family_templates(folder: str) -> tuple[P5Template, ...]:
    """Read all templates of a folder and check each header against its body.

    Args:
        folder: A folder of `<family>/<id>.jinja`; the empty string means the shipped ones.

    Returns:
        By family, in the order of `FAMILIES`; then by id, numbers by size (1-2 before 1-10).

    Raises:
        UsageError: There is no such folder, or a file in it is wrong.
    """
    by_id: dict[str, P5Template] = {}
    for path in _files(folder):
        template = _parse(path)
        if template.id in by_id:
            raise UsageError(
                f"{OPTION}: {template.id} stands both in {by_id[template.id].family} and in "
                f"{template.family}; an id may stand once, so rename one."
            )
        by_id[template.id] = template
    return tuple(sorted(by_id.values(), key=_place))


def _place(template: P5Template) -> tuple[int, list[str | int], str]:
    parts = re.split(r"(\d+)", template.id)  # text and digits in turn, so that like meets like
    natural = [int(part) if part.isdecimal() else part for part in parts]
    return FAMILIES.index(template.family), natural, template.id


def _files(folder: str) -> list[Path]:
    if not folder:
        names = [name for name in listing("prompts") if name.startswith("p5/")]
        return [shipped("prompts", name) for name in names if name.endswith(".jinja")]
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UsageError(f"{OPTION}={folder} is not a folder; name one that holds families.")
    files = sorted(path for path in root.rglob("*.jinja") if path.is_file())
    if not files:
        raise UsageError(
            f"{OPTION}={folder} holds no template; write <family>/<id>.jinja into it, the family "
            f"one of {', '.join(FAMILIES)}."
        )
    for path in files:
        family, *rest = path.relative_to(root).parts
        if len(rest) != 1 or family not in FAMILIES:
            raise UsageError(
                f"{OPTION}: {path} must lie right in the folder of a family; move it to one of "
                f"{', '.join(f'{folder}/{name}' for name in FAMILIES)}."
            )
    return files


def _parse(path: Path) -> P5Template:
    source = read_source(path, OPTION)
    entries = _header(source, path)
    # The rest is the same for all templates of the house. The first line stays one line, so that
    # the line numbers in messages are the file's.
    plain = " | ".join(f"{name}: {entries[name]}" for name in ("id", "version", "inputs"))
    body = source.partition("\n")[2]
    template = parse_template(f"{{# {plain} #}}\n{body}", str(path), OPTION)
    parsed = P5Template(
        id=template.id,
        family=path.parent.name,
        version=template.version,
        inputs=template.inputs,
        target=entries["target"],
        held_out=entries["part"] == "held_out",
        sha256=hashlib.sha256(source.encode()).hexdigest(),
        source=source,
    )
    _check_words(parsed, path, entries["part"])
    _check_task(parsed, path)
    _check_body(parsed, path)
    return parsed


def _header(source: str, path: Path) -> dict[str, str]:
    match = _HEADER.fullmatch(source.partition("\n")[0].strip())
    pairs = [part.partition(":") for part in match["entries"].split("|")] if match else []
    entries = {key.strip(): value.strip() for key, _, value in pairs}
    if set(entries) != set(_ENTRIES) or len(pairs) != len(_ENTRIES):
        raise UsageError(
            f"{OPTION}: the first line of {path} must be a header with {', '.join(_ENTRIES)}, "
            f"like {_EXAMPLE}"
        )
    return entries


def _check_words(template: P5Template, path: Path, part: str) -> None:
    """The header says nothing that is not known."""
    if template.id != path.stem:
        raise UsageError(
            f"{OPTION}: {path} has id {template.id!r}; an id and the file's name must be equal."
        )
    if part not in ("seen", "held_out"):
        raise UsageError(f"{OPTION}: {path} has part {part!r}; use seen or held_out.")
    if template.target not in _HOLD_THE_ANSWER:
        raise UsageError(
            f"{OPTION}: {path} has target {template.target!r}; "
            f"{nearest(template.target, _HOLD_THE_ANSWER)}"
        )
    for name in template.inputs:
        if name not in INPUTS:
            raise UsageError(f"{OPTION}: {path} reads {name!r}; {nearest(name, INPUTS)}")


def _check_task(template: P5Template, path: Path) -> None:
    """The family can ask this, and the question does not hold its own answer."""
    family, target, inputs = template.family, template.target, template.inputs
    if target not in _TARGETS[family]:
        raise UsageError(
            f"{OPTION}: {path} has target {target}, but {family} asks for "
            f"{', '.join(_TARGETS[family])}; move it to another family."
        )
    for name in inputs:
        if name in _HOLD_THE_ANSWER[target]:
            raise UsageError(
                f"{OPTION}: {path} reads {name}, which holds its answer; leave it out."
            )
        if name in _REFUSED.get(family, ()) or (name == "candidates" and target != "item"):
            raise UsageError(
                f"{OPTION}: {path} reads {name}, which a {family} question for {target} does not "
                "have; leave it out."
            )
    for one_of in _needed(family, target):
        if not set(one_of) & set(inputs):
            raise UsageError(
                f"{OPTION}: {path} reads no {' or '.join(one_of)}, but a {family} question for "
                f"{target} is about that; add it to inputs and body."
            )


def _needed(family: str, target: str) -> list[tuple[str, ...]]:
    """Without one input of each of these nothing is asked."""
    about: dict[str, tuple[str, ...]] = {
        "sequential": ("history",),
        "review": ("review",),
        "zero_shot": ("title",),
    }
    needed = [about.get(family, ("item", "title"))]
    if family == "direct" and target == "item":
        needed = [("candidates",)]
    if family == "sequential" and target == "yes_no":
        needed.append(("item", "title"))
    if family in ("rating", "zero_shot") and target == "yes_no":
        needed.append(("stars",))  # "did the user give this many?"
    return needed


def _check_body(template: P5Template, path: Path) -> None:
    """The body compiles, loops over no string and can be rendered."""
    try:
        _writer(template.source)  # finds what parsing does not, such as an unknown filter
    except jinja2.TemplateSyntaxError as error:
        message = f"{OPTION}: {path} line {error.lineno} is not valid Jinja ({error.message})"
        raise UsageError(f"{message}; correct that line.") from error
    for loop in _ENVIRONMENT.parse(template.source).find_all(nodes.For):
        if isinstance(loop.iter, nodes.Name) and loop.iter.name in template.inputs:
            raise UsageError(
                f"{OPTION}: {path} line {loop.lineno} loops over {loop.iter.name}, which is one "
                f"string; write {{{{ {loop.iter.name} }}}} instead."
            )
    template.render(_SAMPLE)
