"""Uploading: what the hub is asked for, privately unless told otherwise, and no token anywhere."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from exports import export, refusal

RunOf = Callable[[str], Path]
TOKEN = "hf_SecretOfTheTest"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the hub was asked for, in order; every place is new, and private if asked to be."""
    made: list[tuple[str, dict[str, Any]]] = []

    def create_repo(name: str, **options: Any) -> str:
        made.append(("create_repo", {"name": name, **options}))
        return f"https://huggingface.co/{name}"

    def repo_info(name: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(private=made[-1][1]["private"])

    def upload_folder(folder_path: Path, **options: Any) -> None:
        names = sorted(path.name for path in Path(folder_path).iterdir())
        made.append(("upload_folder", {"names": names, **options}))

    for function in (create_repo, repo_info, upload_folder):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return made


@pytest.mark.parametrize(
    ("what", "kind", "file"),
    [("encoder", "model", "modules.json"), ("items", "dataset", "items.parquet")],
)
def test_the_whole_folder_is_uploaded_privately(
    what: str, kind: str, file: str, run_of: RunOf, tmp_path: Path, calls: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = export(run_of("frozen"), tmp_path / "out", "--what", what, "--push_to_hub", "me/mine")
    (create, made), (upload, sent) = calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert made == {"name": "me/mine", "private": True, "repo_type": kind, "exist_ok": True}
    assert sent["repo_id"] == "me/mine" and sent["repo_type"] == kind
    assert {file, "README.md", "llmrec.json"} <= set(sent["names"])
    assert '"me/mine"' in (folder / "README.md").read_text()
    assert "uploaded to https://huggingface.co/me/mine" in capsys.readouterr().out


def test_public_is_said_in_words(run_of: RunOf, tmp_path: Path, calls: list[Any]) -> None:
    words = ("--what", "items", "--push_to_hub", "me/mine", "--public")
    export(run_of("ids"), tmp_path / "out", *words)
    assert calls[0][1]["private"] is False


def test_what_is_public_already_gets_nothing_unless_told_to(
    run_of: RunOf, tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        huggingface_hub, "repo_info", lambda *_, **__: SimpleNamespace(private=False)
    )
    words = ("--what", "items", "--out", tmp_path / "out", "--push_to_hub", "me/mine")
    assert "is there already and public" in refusal(run_of("ids"), *words)
    assert [name for name, _ in calls] == ["create_repo"]


def test_a_token_of_the_environment_is_in_no_file_and_no_output(
    run_of: RunOf, tmp_path: Path, calls: list[Any], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ("--what", "encoder", "--push_to_hub", "me/mine")
    folder = export(run_of("frozen"), tmp_path / "out", *words)

    def leaky(*_: object, **__: object) -> None:
        raise ConnectionError(f"POST failed, headers: Bearer {TOKEN}")

    monkeypatch.setattr(huggingface_hub, "upload_folder", leaky)
    said = refusal(run_of("frozen"), *words, "--out", folder, "--overwrite")
    assert "could not be uploaded to me/mine (ConnectionError). It is whole on disk" in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    shown = capfd.readouterr()
    assert TOKEN not in shown.out + shown.err + said + str(calls)


def test_without_a_token_nothing_is_begun(
    run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    words = ("--what", "items", "--out", tmp_path / "out", "--push_to_hub", "me/mine")
    assert "set HF_TOKEN, or run `hf auth login`" in refusal(run_of("ids"), *words)
    assert not list(tmp_path.iterdir())
