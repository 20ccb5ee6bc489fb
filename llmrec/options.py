"""From dataclasses to command line and YAML, with a clear sentence for each mistake."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from llmrec import resources
from llmrec.errors import UsageError, nearest

Config = TypeVar("Config")


@functools.cache  # two thirds of what reading a command line takes, and a suite reads dozens
def parser_for(
    config_class: type[Config], prog: str, description: str
) -> jsonargparse.ArgumentParser:
    """A parser of ``--config FILE`` and one ``--dotted.option`` for each field of a dataclass."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--group.option VALUE ...]",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; later options override it.")
    parser.add_class_arguments(config_class, as_group=False)
    for action in parser._actions:  # whole groups are set in a file, not on the command line
        if action.dest == "print_config" or _is_group(config_class, action.dest):
            action.help = argparse.SUPPRESS
    return parser


def parse(
    config_class: type[Config], argv: Sequence[str], prog: str, description: str
) -> tuple[Config, frozenset[str]]:
    """The config that a command line and its YAML files ask for, and the options that they name.

    Raises:
        UsageError: An unknown option (the nearest is named), a wrong value, an unreadable file.
    """
    kind: Any = config_class  # mypy takes a class's own __hash__ for its metaclass's
    parser = parser_for(kind, prog, description)
    known, groups = _known(kind, prog, description)
    files, rest = _config_files(list(argv))
    for file in files:
        for name in _names(_read_yaml(file)):
            if name not in known:
                raise UsageError(f"{file} has an unknown option {name}: {nearest(name, known)}")
    for word in rest:
        name = word[2:].split("=")[0]
        if word.startswith("--") and name not in known:
            raise UsageError(f"unknown option --{name}: {nearest(name, known - groups)}")
        if word.startswith("--") and name in groups:
            raise UsageError(f"--{name} is a group; name one of its options, as --help lists them.")
    try:
        words = [*(f"--config={file}" for file in files), *rest]
        values = parser.instantiate(parser.parse_args(words))
        given = frozenset(_names(parser.parse_args(words, defaults=False).as_dict()))
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise UsageError(_one_sentence(str(error))) from error
    wanted = _top(config_class)
    config = config_class(
        **{key: value for key, value in values.items(branches=True) if key in wanted}
    )
    return config, given


def as_dict(config: object) -> dict[str, Any]:
    """A config as plain values, ready for YAML and JSON; they know lists and no tuples."""
    return dataclasses.asdict(config, dict_factory=_listed)  # type: ignore[call-overload,no-any-return]


def _listed(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}


def as_yaml(config: object) -> str:
    """A config as the YAML file that gives it back."""
    return yaml.dump(as_dict(config), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes text such as 1e3, which YAML 1.1 calls text and the parser reads as a number."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@functools.cache
def _known(config_class: Any, prog: str, description: str) -> tuple[frozenset[str], frozenset[str]]:
    """Dotted names that a command line may have, and those of groups among them."""
    defaults = parser_for(config_class, prog, description).get_defaults().as_dict()
    known = frozenset({"config", "help", *_names(defaults)})
    return known, frozenset(name for name in known if _is_group(config_class, name))


def _top(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _is_group(config_class: type, name: str) -> bool:
    """Whether a dotted name stands for a nested dataclass."""
    types: Any = config_class
    for part in name.split("."):
        types = typing.get_type_hints(types).get(part) if dataclasses.is_dataclass(types) else None
    return dataclasses.is_dataclass(types)


def _names(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of a nested mapping: of its groups and of its leaves."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")


def _config_files(words: list[str]) -> tuple[list[str], list[str]]:
    """Take ``--config FILE`` out of a command line: files are read first, wherever they stand."""
    files, rest = [], []
    while words:
        word = words.pop(0)
        if word == "--config":
            if not words:
                raise UsageError(
                    "--config needs a file, such as --config configs/tcf/ml-100k-temporal.yaml."
                )
            files.append(_found(words.pop(0)))
        elif word.startswith("--config="):
            files.append(_found(word.removeprefix("--config=")))
        else:
            rest.append(word)
    return files, rest


def _found(file: str) -> str:
    """The file itself, or the shipped one that ``configs/...`` names from any folder."""
    if not Path(file).exists() and file.startswith("configs/"):
        return str(resources.shipped("configs", file.removeprefix("configs/")))
    return file


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        list(_names(values if isinstance(values, dict) else {}))  # endless where it holds itself
    except OSError as error:
        raise UsageError(
            f"--config {file} cannot be read ({error.strerror}). Shipped ones lie in configs/."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        where = ""
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            where = f" at line {error.problem_mark.line + 1}"
        raise UsageError(
            f"--config {file} is not YAML{where}. Compare it with the shipped ones in configs/."
        ) from error
    if not isinstance(values, dict):
        raise UsageError(
            f"--config {file} holds no options. Compare it with the shipped ones in configs/."
        )
    return values


def _one_sentence(message: str) -> str:
    """The parser's several lines as one that names the option, what it got and what it takes."""
    group = re.search(r'Parser key "([^"]+)": Unable to load config', message)
    if group:
        return f"--{group[1]} is a group. Set its options one by one; --help lists them."
    option = re.search(r'Parser key "([^"]+)"', message)
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    wanted = re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", message, flags=re.MULTILINE)
    if not (option and given and wanted):
        return " ".join(message.split())
    readable = [re.sub(r"<class '(\w+)'>", r"\1", want) for want in wanted]
    readable = [re.sub(r"<class '[\w.]*Sequence'>", "a list such as [1, 4]", w) for w in readable]
    readable = [re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", want) for want in readable]
    return f"--{option[1]} got {given[1]} but takes {' or '.join(readable)}."


def option_names(config_class: type) -> frozenset[str]:
    """The dotted names of a config's options."""
    found: set[str] = set()
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            names = option_names(typing.cast(type, inner))
            found |= {f"{field.name}.{name}" for name in names}
        else:
            found.add(field.name)
    return frozenset(found)
