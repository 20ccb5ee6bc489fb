"""Shared fixtures. Tests never reach outside this machine unless marked `network`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: more threads only wait for each other

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """`figure("kills survived", "50 of 50")`: what a test measured, printed after the session."""
    return lambda name, value: record_property(f"figure: {name}", str(value))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print every figure that the tests measured."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    lines = [
        f"{report.nodeid.partition('::')[0]}: {name.removeprefix('figure: ')}: {value}"
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name.startswith("figure: ")
    ]
    if lines:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(sorted(lines)))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return ROOT


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real data sets by folder name: LLMREC_DATA, else a shared/data folder beside the clone."""
    named = os.environ.get("LLMREC_DATA")
    root = Path(named) if named else ROOT.parent / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is not a folder; set LLMREC_DATA to one that holds it")
    return root


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture name -> folder of a random language model with 3 layers."""
    import tiny_models  # here, so that tests without one do not wait for transformers

    folder = tmp_path_factory.mktemp("models")
    return {
        name: tiny_models.save_tiny_model(name, folder / name) for name in tiny_models.ARCHITECTURES
    }
