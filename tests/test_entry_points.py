"""The console command, `python -m llmrec` and the script by path are one program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmrec
from llmrec import cli

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """One process, its output as text. COLUMNS fixes where help is wrapped."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        words, cwd=cwd, env={**kept, "COLUMNS": "100", **environment}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_importing_llmrec_imports_no_torch_and_nothing_else_heavy() -> None:
    code = (
        "import sys, llmrec, llmrec.cli\n"
        "llmrec.cli.main(['--help'])\n"
        "print(sorted({'torch', 'numpy', 'polars', 'jsonargparse'} & set(sys.modules)))"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout.endswith("[]\n"), done.stderr


@pytest.mark.parametrize("name", [name for name in llmrec.__all__ if name != "__version__"])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(llmrec, name).__name__ == name
    assert name in dir(llmrec)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Datasett"):
        _ = llmrec.Datasett


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in cli.VERBS)


def test_no_verb_prints_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err == cli.HELP


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmrec {llmrec.__version__}\n"


def test_an_unknown_verb_is_one_sentence_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["evalute"]) == 2
    assert capsys.readouterr().err == "llmrec: no verb 'evalute': did you mean evaluate?\n"


def test_the_first_word_of_a_verb_of_two_lists_the_verbs_that_begin_with_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["data", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "\n  data prepare " in shown and "train" not in shown
    assert cli.main(["data"]) == 2
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("words", [["data", "prepar"], ["data", "nonsense"], ["prepare"]])
def test_a_misspelt_verb_of_two_words_is_answered_with_the_right_one(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--out", "here"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"llmrec: no verb {' '.join(words)!r}: ") and "data prepare" in said


def test_python_dash_m_is_the_console_command() -> None:
    assert run(sys.executable, "-m", "llmrec", "--help").stdout == cli.HELP


def test_the_installed_command_is_the_same_program() -> None:
    command = Path(sys.executable).with_name("llmrec")
    if not command.is_file():
        pytest.skip("llmrec is not installed beside this interpreter")
    assert run(str(command), "--help").stdout == cli.HELP


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_and_refuses_an_unknown_option(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_with([*verb.split(), "--help"]) == 0
    assert "usage:" in capsys.readouterr().out.lower()
    assert left_with([*verb.split(), "--no-such-option", "1"]) == 2
    assert "no-such-option" in capsys.readouterr().err


def left_with(words: list[str]) -> int:
    """The exit code of a command line, as a shell sees it."""
    try:
        return cli.main(words)
    except SystemExit as end:
        return 0 if end.code is None else int(end.code)


def test_a_verb_in_a_process_of_its_own_has_help_and_refuses_an_unknown_option() -> None:
    done = run(sys.executable, "-m", "llmrec", "train", "--help")
    assert done.returncode == 0 and "usage:" in done.stdout.lower(), done.stderr
    wrong = run(sys.executable, "-m", "llmrec", "train", "--no-such-option", "1")
    assert wrong.returncode == 2
    assert "no-such-option" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("file", "verb"),
    [
        ("train_tcf.py", "train"),
        ("prompting/train_p5.py", "p5 train"),
        ("prompting/rating.py", "rating"),
    ],
)
def test_a_script_by_path_is_its_verb_without_an_installation(
    tmp_path: Path, file: str, verb: str
) -> None:
    script = ROOT / "llmrec" / file
    block_installed = tmp_path / "sitecustomize.py"  # forgets an editable install's finder
    block_installed.write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"
        "sys.path[:] = [p for p in sys.path if '__editable__' not in p]\n"
    )
    by_path = run(sys.executable, str(script), "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert by_path.returncode == 0, by_path.stderr
    by_verb = run(sys.executable, "-m", "llmrec", *verb.split(), "--help")
    assert options_of(by_path.stdout) == options_of(by_verb.stdout)


def options_of(text: str) -> list[str]:
    """The option lines of a help text: the usage line names the program, which differs."""
    found = re.findall(r"^ +(?:-h, )?--[\w.]+", text, flags=re.MULTILINE)
    assert found
    return found
