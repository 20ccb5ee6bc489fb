"""configs/tcf/gpu-*.yaml: large language models, not run here but read option by option."""

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
