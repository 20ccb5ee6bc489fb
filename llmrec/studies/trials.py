"""The trials of one row: which options come next, and the file that keeps what came of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmrec.errors import UsageError
from llmrec.studies.space import Choice, Space, Span, place


@dataclass(frozen=True)
class Trial:
    """One training run that was validated, or failed; never scored on test."""

    number: int
    """Place in the row's sequence, from 0."""
    options: dict[str, Any]
    """What was drawn, by dotted name."""
    state: Literal["done", "failed"]
    value: float | None
    """The selected epoch's validation measure; none where it failed."""
    epochs: int
    """That it trained."""
    seconds: float
    """Wall time of the start that finished it."""
    problem: str = ""
    """The sentence that it failed with."""


def propose(space: Space, seed: int, past: Sequence[Trial]) -> dict[str, Any]:
    """The next trial's options, by TPE (Bergstra et al. 2011).

    A function of its arguments alone: the sampler starts anew for each trial, from a seed of the
    trial's own. So a search that was killed goes on with what it would have drawn anyway.

    Args:
        space: What is drawn from.
        seed: Of the search.
        past: All trials so far, in order.
    """
    import optuna  # an extra

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it greets every study
    own_seed = int(np.random.SeedSequence([seed, len(past)]).generate_state(1)[0])
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=own_seed)
    )
    distributions = {name: _distribution(drawn) for name, drawn in space.items()}
    states = optuna.trial.TrialState
    for trial in past:
        params = {n: _inner(space[n], value) for n, value in trial.options.items()}
        # Pruned without a value: worse than every other, where a failed one would be forgotten.
        told = optuna.trial.create_trial(
            state=states.COMPLETE if trial.state == "done" else states.PRUNED,
            value=trial.value,
            params=params,
            distributions=distributions,
        )
        study.add_trial(told)
    params = study.ask(distributions).params
    return {name: _outer(drawn, params[name]) for name, drawn in space.items()}


def _distribution(drawn: Span | Choice) -> Any:
    import optuna

    if isinstance(drawn, Choice):  # by place: optuna keeps no lists, and takes 1 for true
        return optuna.distributions.CategoricalDistribution(range(len(drawn.values)))
    if drawn.whole:
        step = 1 if drawn.step == "any" else int(drawn.step)
        whole = optuna.distributions.IntDistribution
        return whole(int(drawn.low), int(drawn.high), log=drawn.log, step=step)
    step_or_none = None if drawn.step == "any" else drawn.step
    real = optuna.distributions.FloatDistribution
    return real(drawn.low, drawn.high, log=drawn.log, step=step_or_none)


def _inner(drawn: Span | Choice, value: Any) -> Any:
    return place(drawn, value) if isinstance(drawn, Choice) else value


def _outer(drawn: Span | Choice, value: Any) -> Any:
    if isinstance(drawn, Choice):
        return drawn.values[value]
    if drawn.step == "any" or drawn.whole:
        return value
    low, step = Decimal(str(drawn.low)), Decimal(str(drawn.step))
    return float(low + round((value - drawn.low) / drawn.step) * step)  # .3, not .1 + .1 + .1


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the highest validation value, the earliest of equals; none if all failed."""
    done = [(trial.value, -trial.number) for trial in trials if trial.value is not None]
    return trials[-max(done)[1]] if done else None


def read_trials(path: Path) -> list[Trial]:
    """The trials that a file keeps; a last line that a kill cut short does not count.

    Raises:
        UsageError: Another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last line break nothing is whole
    found = []
    for number, line in enumerate(lines):
        try:
            trial = Trial(**json.loads(line))
        except (ValueError, TypeError):
            trial = None
        if trial is None or trial.number != number:
            raise UsageError(
                f"{path} line {number + 1} is damaged. Delete {path.parent} to run these trials "
                "again."
            )
        found.append(trial)
    return found
