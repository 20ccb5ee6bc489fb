"""A run's reader of texts in sentence-transformers: the same vectors, or a refusal."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import CPU, export, refusal, run_vectors
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from llmrec.assembly import restore
from llmrec.errors import UsageError
from llmrec.serving import sentence_folder
from llmrec.serving.export import main
from llmrec.serving.sentence_folder import take_text_part

RunOf = Callable[[str], Path]
SAME = 1e-5  # of the largest value, or of 1 where that is smaller


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of a component, as a share of the largest value or of 1."""
    return float(np.abs(a - b).max() / max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    "kind",
    [
        "frozen", "frozen, in 4 bits", "frozen beside ids", "lora", "lora, whitened",
        "lora, spread", "rslora", "dora", "lora of the highest block", "qlora",
        "qlora with dora", "top:1", "full",
    ],
)  # fmt: skip
def test_the_folder_gives_the_vectors_that_the_run_gives(
    kind: str, run_of: RunOf, encoder_of: RunOf
) -> None:
    texts, vectors = run_vectors(run_of(kind))
    assert apart(load(encoder_of(kind)).encode(texts), vectors) < SAME
    assert vectors.std(axis=0).max() > 100 * SAME * max(1, np.abs(vectors).max())  # texts differ


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "qlora", "top:1", "full"])
def test_what_training_changed_is_in_the_weights(
    kind: str, run_of: RunOf, encoder_of: RunOf
) -> None:
    model = json.loads((run_of(kind) / "result.json").read_text())["config"]["encoder"]["model"]
    before, after = (load_file(Path(f) / "model.safetensors") for f in (model, encoder_of(kind)))
    assert not [name for name in after if "lora" in name or "base_layer" in name]
    moved = [name for name in after if not before[name].equal(after[name])]
    assert any("1" in name.split(".") for name in moved)  # the highest of the two blocks that run
    assert max(float((after[name] - before[name]).abs().max()) for name in moved) > 1e-3


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("qlora over 8 bits", "The run multiplied weights held in int8"),
        ("lora in bfloat16", "The run computed in bfloat16"),
    ],
)
def test_a_run_in_coarser_numbers_is_compared_in_float32_and_its_own_difference_stated(
    kind: str, why: str, run_of: RunOf, encoder_of: RunOf
) -> None:
    (texts, vectors), folder = run_vectors(run_of(kind)), encoder_of(kind)
    found = json.loads((folder / "llmrec.json").read_text())["compared"]
    assert found["folder_and_merged"] < SAME * max(1, found["largest_value"])
    difference = float(np.abs(load(folder).encode(texts) - vectors).max())
    assert found["merged_and_run"] == pytest.approx(difference, rel=0.1)
    assert 1e-4 < found["merged_and_run"] / found["largest_value"] < 0.1
    assert f"{why}: its own vectors differ" in (folder / "README.md").read_text()


def test_the_folder_is_safetensors_and_json_without_code(encoder_of: RunOf) -> None:
    folder = encoder_of("frozen")
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".md"}
    modules = json.loads((folder / "modules.json").read_text())
    names = [module["type"].rpartition(".")[2] for module in modules]
    assert names == ["Transformer", "Pooling", *["Dense"] * 3]  # whitening, projection twice
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)


def test_layers_token_limit_and_prompt_are_the_runs(encoder_of: RunOf) -> None:
    model = load(encoder_of("frozen beside ids"))
    assert model[0].config.num_hidden_layers == 2
    assert model.max_seq_length == 32
    assert model.tokenizer.padding_side == "right"
    tokens = model.tokenizer.convert_ids_to_tokens(
        model.preprocess(["blue boot"], prompt="red shoe for ")["input_ids"][0]
    )
    assert tokens == ["<s>", "red", "shoe", "for", "blue", "boot", "</s>"]
    np.testing.assert_array_equal(
        model.encode(["blue boot"]), model.encode(["blue boot"], prompt="red shoe for ")
    )


def test_the_card_says_what_the_folder_cannot_give(run_of: RunOf, encoder_of: RunOf) -> None:
    card = (encoder_of("frozen beside ids") / "README.md").read_text()
    assert "the folder has the text's part alone" in card
    assert "(3 of 187 items). An empty text given to this folder is read like any other" in card
    record = json.loads((run_of("frozen beside ids") / "result.json").read_text())
    found = record["metrics"]["test"]["NDCG@10"]
    assert f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]" in card
    assert "| prompt | `red shoe for ` |" in card and "license" not in card.lower()


def test_neither_card_nor_any_other_file_names_a_path_of_this_machine(
    run_of: RunOf, encoder_of: RunOf
) -> None:
    here = str(run_of("lora").parent.parent).encode()
    files = [path for path in encoder_of("lora").rglob("*") if path.is_file()]
    assert here in (run_of("lora") / "result.json").read_bytes()
    assert not [path for path in files if here in path.read_bytes()]


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("ids", "this one has tower.name=id. Use --what items."),
        ("shuffled", "this one has tower.control=shuffled. Use --what items."),
        ("before the norm", "encoder.final_norm=false reads states that sentence-transformers"),
        ("popularity", "model.name=popularity, which has no trained weights"),
    ],
)
def test_what_has_no_reader_of_texts_to_give_is_refused(
    kind: str, sentence: str, run_of: RunOf, tmp_path: Path
) -> None:
    assert sentence in refusal(run_of(kind), "--what", "encoder", "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_spread_over_devices_is_merged_in_main_memory_only(run_of: RunOf) -> None:
    restored = restore(run_of("lora, spread"), CPU)
    with pytest.raises(UsageError, match=r"placement=spread .* Use --device cpu"):
        take_text_part(restored, torch.device("cuda"))


def test_a_folder_with_other_vectors_is_never_given_out(
    run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sentence_folder.POOLINGS, "mean", "cls")
    said = refusal(run_of("frozen"), "--what", "encoder", "--out", tmp_path / "out")
    assert "reads texts otherwise in sentence-transformers: vectors differ by" in said
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_older_export_whole_and_nothing_else(
    run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(run_of("frozen"), tmp_path / "out", "--what", "encoder")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sentence_folder, "_write_modules", full)
    words = ("--what", "encoder", "--out", folder, "--overwrite")
    assert "cannot be written (No space left on device)" in refusal(run_of("frozen"), *words)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_export_replaces_an_older_one_only_if_told_to_and_nothing_else_ever(
    run_of: RunOf, tmp_path: Path
) -> None:
    folder = export(run_of("ids"), tmp_path / "out", "--what", "items")
    (folder / "note").write_text("of the older one")
    words = (str(run_of("ids")), "--what", "items", "--out")
    assert "exists already" in refusal(*words, folder)
    assert main([*words, str(folder), "--overwrite"]) == 0
    assert not (folder / "note").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (folder / "llmrec.json").unlink()
    assert "is no folder that llmrec export wrote" in refusal(*words, folder, "--overwrite")
    assert (folder / "items.parquet").exists()
