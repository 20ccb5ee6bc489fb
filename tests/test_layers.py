"""Who may import whom, read from the source: a module imports only from lower layers."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [  # 0 first; a name covers the modules below it
    "errors",
    "resources runs doctor",
    "options progress checkpoints launch",
    "data.interactions data.tfidf data.titles",
    "evaluation.config evaluation.ranking evaluation.pools evaluation.products "
    "evaluation.metrics evaluation.ratings "
    "evaluation.significance evaluation.slices "
    "evaluation.beyond evaluation.texts encoders.text encoders.loading encoders.blockwise "
    "encoders.tuning "
    "encoders.sharing data",
    "models encoders.tower encoders.tuned encoders.store "
    "encoders.halves encoders.prefix prompting.families prompting.p5 "
    "prompting.indexing prompting.trie prompting.decoding prompting.templates prompting.tokens "
    "prompting.pretrained prompting.language_model prompting.asking",
    # models.recommender joins a tower and a user model
    "evaluation.result models.recommender models.sharding evaluation.card "
    "prompting.rating_config prompting.rating_data prompting.rating_language "
    "prompting.rating_models",
    "assembly training",
    "questions",
    "train_tcf score prompting.generate prompting.show prompting.audit prompting.train_p5 "
    "prompting.rating chat serving transfer",
    "prompting.ask",  # asks what train_p5 trained, as score does with what train_tcf trained
    "reporting",
    "evaluation.suite evaluation.programs",  # they print the tables that reporting makes
    "studies",
    "cli",
    "__main__",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}

NO_TORCH = (
    r"data\.(interactions|readers|prepared|splits|audit)(\..*)?|"
    r"evaluation\.(config|metrics|significance|pools|ratings|texts)|chat\.(?!offline).*|"
    r"prompting\.(templates|families|indexing|trie|generate|show)|prompting\.(p5|audit)(\..*)?|"
    r"reporting\..*|studies\.(space|trials)"
)
ONLY_IN = {  # third-party package -> the modules that may import it
    "transformers": r"(encoders|prompting|transfer)\..*|serving\.merging",
    "peft": r"(encoders|prompting|transfer)\..*|serving\.merging",
    "sentence_transformers": r"serving\.sentence_folder",
    "accelerate": r"encoders\..*|launch|assembly|training|train_tcf|"
    r"prompting\.(train_p5|rating)|transfer\.pretrain",
    "vllm": r"chat\..*|encoders\.store.*",
    "openai": r"chat\..*|encoders\.store.*",
    "aiohttp": r"chat\..*",
    "rapidfuzz": r"(chat|prompting)\..*",
    "bm25s": r"models\.baselines\.texts",
    "psutil": r"models\.baselines\.ease",
    "optuna": r"studies\..*",
    "torch": rf"(?!{NO_TORCH}$).*",
}
FILES = {"prompts", "eval", "configs", "tests", "benchmarks"}  # top-level folders, never modules

MODULES = {
    ".".join(path.relative_to(ROOT / "llmrec").with_suffix("").parts): path
    for path in sorted((ROOT / "llmrec").rglob("*.py"))
}


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} line {node.lineno}: write the import out in full"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def known(module: str) -> str | None:
    """The longest name in the table that covers a module."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in LEVEL), None)


def broken_rules(module: str, imported: str) -> Iterator[str]:
    """What is wrong with one import, in words."""
    top, _, inside = imported.partition(".")
    if top in FILES:
        yield f"{module} imports {top}/, which holds files"
    if top in ONLY_IN and not re.fullmatch(ONLY_IN[top], module):
        yield f"{module} may not import {top}"
    if top != "llmrec" or (target := known(inside)) is None:
        return
    home = known(module)
    same_package = "." in module and module.split(".")[0] == target.split(".")[0]
    if home is not None and home != target and not same_package and LEVEL[target] >= LEVEL[home]:
        yield f"{module} (layer {LEVEL[home]}) imports {target} (layer {LEVEL[target]})"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])  # its names are lazy
def test_a_module_imports_only_from_lower_layers(module: str) -> None:
    complaints = {line for name in imports(MODULES[module]) for line in broken_rules(module, name)}
    assert not complaints


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__init__")])
def test_every_module_has_a_layer_and_its_folder_is_a_package(module: str) -> None:
    assert known(module), f"add {module} to LAYERS"
    assert (MODULES[module].parent / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("module", "imported", "complaints"),
    [
        ("data.splits", "llmrec.data.interactions", 0),
        ("data.splits", "llmrec.evaluation.metrics", 1),  # sideways
        ("data.splits", "torch.nn", 1),
        ("data.batches", "torch.nn", 0),
        ("models.sasrec", "llmrec.models.losses", 0),  # its own package
        ("models.sasrec", "llmrec.train_tcf", 1),  # upwards
        ("models.sasrec", "transformers", 1),
        ("models.sasrec", "eval", 1),
        ("train_tcf", "accelerate", 0),
        ("reporting.tables", "torch", 1),
        ("reporting.tables", "llmrec.evaluation.result", 0),
    ],
)
def test_the_rules_catch_what_they_should(module: str, imported: str, complaints: int) -> None:
    assert len(list(broken_rules(module, imported))) == complaints


def test_modules_without_torch_do_not_load_it_through_others() -> None:
    names = [f"llmrec.{m}" for m in MODULES if re.fullmatch(NO_TORCH, m)]
    names = [name.removesuffix(".__init__") for name in names]
    code = f"import sys, {', '.join(['llmrec', *names])}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
