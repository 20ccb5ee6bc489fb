"""Shipped files are found beside a clone and inside an installed package."""

from pathlib import Path

import pytest

from llmrec import resources
from llmrec.errors import UsageError


def test_a_shipped_file_is_found_in_a_clone() -> None:
    assert resources.shipped("prompts", "item_text/title.jinja").is_file()
    assert "item_text/title.jinja" in resources.listing("prompts")


def test_an_installed_package_reads_its_own_folder_and_not_site_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "llmrec"
    for folder, name in ((package / "_shipped" / "eval", "ours"), (package.parent / "eval", "not")):
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").touch()
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert resources.listing("eval") == ["ours.yaml"]


def test_a_missing_file_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean item_text/title\.jinja"):
        resources.shipped("prompts", "item_text/titel.jinja")
    with pytest.raises(ValueError, match="kinds are"):
        resources.shipped("tests", "x")
