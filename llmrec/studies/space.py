"""What a search draws options from, as a suite's YAML gives it. Neither torch nor optuna."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from llmrec.errors import UsageError, nearest

_KEYS = ("low", "high", "step", "log")


@dataclass(frozen=True)
class Span:
    """Numbers from `low` to `high`, both included; whole ones where all that is given is whole."""

    low: float
    high: float
    step: float | Literal["any"] = "any"
    """Distance of neighbours, counted from `low`."""
    log: bool = False
    """Whether equal ratios, not equal differences, are equally likely at first."""

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        given = (self.low, self.high, 1 if self.step == "any" else self.step)
        return all(isinstance(number, int) for number in given)

    @property
    def ends(self) -> tuple[float, ...]:
        """The values that are tried out before the search begins."""
        return self.low, self.high


@dataclass(frozen=True)
class Choice:
    """One of several values, which have no order."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that are tried out before the search begins."""
        return self.values


Space: TypeAlias = dict[str, Span | Choice]
"""Dotted option -> what it is drawn from."""


def read_space(where: str, content: Any) -> Space:
    """Read the options of a ``space:`` key, nested or dotted.

    Args:
        where: What names the key in messages, such as ``search.yaml: space``.
        content: What YAML holds there.

    Raises:
        UsageError: Something that is neither a span of numbers nor a list of choices.
    """
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{where} must name options, such as optim.lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}"
            "."
        )
    return {name: _read(f"{where}.{name}", value) for name, value in _leaves(content)}


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and what stands there; a mapping with an end of a span is one."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value and not {"low", "high"} & value.keys():
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(where: str, value: Any) -> Span | Choice:
    if isinstance(value, list):
        return _choice(where, value)
    if not isinstance(value, Mapping) or not {"low", "high"} & value.keys():
        raise UsageError(
            f"{where}={json.dumps(value, default=str)} must be a list of values or "
            "{low: 1, high: 8}, with log: true or a step where wanted."
        )
    for key in value:
        if key not in _KEYS:
            raise UsageError(f"{where} has an unknown key {key}: {nearest(str(key), _KEYS)}")
    return _span(where, value)


def _choice(where: str, values: list[Any]) -> Choice:
    if len({_text(value) for value in values}) < max(2, len(values)):
        raise UsageError(
            f"{where} must list two or more different values; one value belongs into the row."
        )
    return Choice(tuple(values))


def _span(where: str, value: Mapping[str, Any]) -> Span:
    for key in ("low", "high"):
        if key not in value:
            raise UsageError(f"{where} has no {key}. Give both low and high.")
    low, high = _number(f"{where}.low", value["low"]), _number(f"{where}.high", value["high"])
    log = value.get("log", False)
    if not isinstance(log, bool):
        raise UsageError(f"{where}.log must be true or false, not {log!r}.")
    if low >= high:
        raise UsageError(f"{where}: low={low} must be below high={high}.")
    if log and low <= 0:
        raise UsageError(f"{where}: low={low} must be above 0 where log is true.")
    if "step" not in value:
        return Span(low, high, log=log)
    step = _number(f"{where}.step", value["step"])
    if log:
        raise UsageError(f"{where} has both log and step. Leave one out, or list the values.")
    if step <= 0 or (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise UsageError(f"{where}: steps of {step} from low={low} do not end at high={high}.")
    return Span(low, high, step)


def _number(where: str, value: Any) -> float:
    """A finite number; YAML 1.1 reads 1e-3, which has no point, as text."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = math.nan
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise UsageError(f"{where} must be a number, not {value!r}.")
    return number


def _text(value: Any) -> str:
    """What tells values apart where 1, 1.0 and true are equal to Python."""
    return json.dumps(value, sort_keys=True, default=str)


def place(choice: Choice, value: Any) -> int:
    """Where a value stands among the choices."""
    return [_text(known) for known in choice.values].index(_text(value))


def described(space: Space) -> dict[str, Any]:
    """A space as plain values, every default filled in: what is kept and hashed."""
    return {
        name: list(drawn.values)
        if isinstance(drawn, Choice)
        else {"low": drawn.low, "high": drawn.high, "step": drawn.step, "log": drawn.log}
        for name, drawn in sorted(space.items())
    }
