"""Finished runs that the tests of this folder share; none may be changed."""

from collections.abc import Callable
from pathlib import Path

import exports
import pytest


@pytest.fixture(scope="session")
def run_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> Callable[[str], Path]:
    """The finished run of a kind in `exports.KINDS`, trained when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("serving"), {}

    def run(kind: str) -> Path:
        if kind not in made:
            changes = dict(exports.KINDS[kind])
            if "encoder__model" in changes:
                changes["encoder__model"] = str(tiny_models[changes["encoder__model"]])
            made[kind] = exports.train(folder / str(len(made)), **changes)
        return made[kind]

    return run


@pytest.fixture(scope="session")
def encoder_of(
    tmp_path_factory: pytest.TempPathFactory, run_of: Callable[[str], Path]
) -> Callable[[str], Path]:
    """What ``--what encoder`` makes of the run of a kind, exported when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("encoders"), {}

    def exported(kind: str) -> Path:
        if kind not in made:
            out = folder / str(len(made))
            made[kind] = exports.export(run_of(kind), out, "--what", "encoder")
        return made[kind]

    return exported
