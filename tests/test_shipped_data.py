"""What is installed beside the code, from clone, sdist and wheel: prompts/, eval/, configs/."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("prompts", "eval", "configs")
YAMLS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.yaml"))
SUITES = sorted((ROOT / "eval").glob("*.yaml"))
EXPECTED = sorted((ROOT / "eval" / "expected").glob("*.json"))
PROMPTS = sorted((ROOT / "prompts").rglob("*.jinja"))


def shipped(root: Path) -> set[str]:
    """The files that must be installed, as paths from the root; kept results stay behind."""
    return {
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and "eval/results" not in path.as_posix() and path.name[0] != "."
    }


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_every_shipped_yaml_is_a_mapping(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", SUITES, ids=name)
def test_every_cell_of_every_suite_configures(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmrec.evaluation.programs import configure
    from llmrec.evaluation.suite import cells, read_suite

    monkeypatch.chdir(ROOT)  # suites name configs/ as seen from the clone
    (tmp_path / "amazon-beauty-2014").mkdir()  # their data need not be here
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))
    suite = read_suite(path)
    assert suite.title and suite.question and suite.measures and suite.baseline in suite.rows
    assert all(configure(c.program, c.argv).run.label == c.label for c in cells(suite))
    verb = "search" if suite.search else "evaluate"
    assert f"# llmrec {verb} {name(path)}" in path.read_text() or path.stem in WITHOUT_COMMAND


WITHOUT_COMMAND = {"quickstart", "amazon-beauty-2014"}
"""Suites whose command README.md shows."""


def test_suites_that_share_a_folder_agree_on_its_runs_and_not_on_its_tables() -> None:
    from llmrec.evaluation.suite import cells, read_suite

    asked: dict[Path, tuple[Path, list[str]]] = {}  # run folder -> suite, options
    tables: dict[Path, Path] = {}
    shared = 0
    for path in SUITES:
        suite = read_suite(path)
        table = suite.out / suite.table
        assert tables.setdefault(table, path) == path, f"{path} and {tables[table]} write {table}"
        for cell in cells(suite):
            other, argv = asked.setdefault(cell.folder, (path, sorted(cell.argv)))
            assert sorted(cell.argv) == argv, f"{path} and {other} differ in {cell.label}"
            shared += other != path
    assert shared


@pytest.mark.parametrize("path", EXPECTED, ids=name)
def test_every_file_of_published_results_reads_and_covers_the_usual_measures(path: Path) -> None:
    from llmrec.reporting.published import read_published

    assert all("HR@10" in row["metrics"] for row in read_published(path.stem).rows)


@pytest.mark.parametrize("path", PROMPTS, ids=name)
def test_every_prompt_opens_with_a_versioned_header(path: Path) -> None:
    header = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(rf"{{# id: {path.stem} \| version: \d+ \| inputs: .*#}}", header)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=name)
def test_accelerate_reads_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


BUILD = """
import os, sys, tarfile, pathlib
from setuptools import build_meta
out = pathlib.Path(sys.argv[1])
sdist = out / build_meta.build_sdist(out)
with tarfile.open(sdist) as archive:
    archive.extractall(out, filter="data")
os.chdir(out / sdist.name.removesuffix(".tar.gz"))
build_meta.build_wheel(out)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of a copy of the clone, and a wheel built from that sdist alone."""
    copy, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for folder in ("llmrec", "tests", *FOLDERS):
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    results = copy / "eval" / "results"
    results.mkdir()
    (results / "result.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_wheel_holds_the_shipped_files_and_no_top_level_eval(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"llmrec"}
    in_wheel = {n.removeprefix("llmrec/_shipped/") for n in names if "/_shipped/" in n}
    assert in_wheel == shipped(ROOT)
    code = {n.removeprefix("llmrec/") for n in names if n.endswith(".py")}
    assert code == {p.relative_to(ROOT / "llmrec").as_posix() for p in ROOT.glob("llmrec/**/*.py")}


def test_the_sdist_holds_the_shipped_files_where_the_clone_has_them(
    built: tuple[Path, Path],
) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert shipped(ROOT) <= names
    assert {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE"} <= names


def test_an_unpacked_wheel_finds_its_files(built: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(site)
    code = (
        "import importlib.util, json, llmrec.resources as r\n"
        "assert 'site' in r.__file__ and importlib.util.find_spec('eval') is None\n"
        "print(json.dumps([str(r.shipped(k, n)) for k in r.KINDS for n in r.listing(k)]))"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {
        Path(p).relative_to(site / "llmrec" / "_shipped").as_posix()
        for p in json.loads(done.stdout)
    }
    assert found == shipped(ROOT)
