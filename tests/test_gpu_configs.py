"""Configs for GPUs: large language models, not run here but read option by option."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs" / "tcf").glob("gpu-*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_gpu_config_configures_and_names_its_own_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmrec.train_tcf import configure

    (tmp_path / "amazon-games-2018").mkdir()  # the data need not be here
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
    config = configure(["--config", str(path)])
    assert config.encoder.dtype == ("float32" if config.encoder.tune == "top:2" else "bfloat16")
    assert config.encoder.pooling == ("last" if "opt" not in path.stem else "mean")
    (command,) = [line for line in path.read_text().splitlines() if line.startswith("# accelerate")]
    words = command.split()
    assert words[-1] == path.relative_to(ROOT).as_posix()
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()


COMMANDS = {"p5": "llmrec.prompting.train_p5", "rating": "llmrec.prompting.rating"}
OTHERS = [path for name in COMMANDS for path in sorted((ROOT / "configs" / name).glob("*.yaml"))]


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_of_prompts_or_ratings_configures_and_names_its_own_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("amazon-games-2018", "amazon-beauty-2014", "ml-100k"):
        (tmp_path / name).mkdir()  # the data need not be here
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
    configure = importlib.import_module(COMMANDS[path.parent.name]).configure
    config = configure(["--config", str(path)])
    assert (tmp_path / config.data.source).is_dir()
    named = path.relative_to(ROOT).as_posix()
    assert any(f"--config {named}" in line for line in path.read_text().splitlines()[:8])
