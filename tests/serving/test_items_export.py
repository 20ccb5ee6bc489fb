"""Item vectors and ids: three formats, the run's scores, and refusals."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from exports import CPU, export, refusal

from llmrec.assembly import restore
from llmrec.serving.export import write_items

RunOf = Callable[[str], Path]
VECTORS = np.array([[1, 0], [0, 2], [3, 3]], np.float32)
IDS = ["a", 'b"\n', "ü"]


@pytest.mark.parametrize("kind", ["ids", "frozen", "frozen beside ids", "lora", "shuffled"])
def test_the_dot_product_with_a_users_vector_is_the_runs_score(
    kind: str, run_of: RunOf, tmp_path: Path
) -> None:
    folder = export(run_of(kind), tmp_path / "out", "--what", "items")
    table = pl.read_parquet(folder / "items.parquet")
    restored = restore(run_of(kind), CPU)
    model = restored.recommender
    history = torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5]])
    with torch.inference_mode():
        items = model.item_vectors()
        users = model.user_vectors(history, items)  # (2, D)
        scores = users @ items[1:].T  # (2, N)
    assert table["item_id"].to_list() == restored.dataset.catalog.ids
    assert table.schema["vector"] == pl.Array(pl.Float32, 16)
    found = users.numpy() @ table["vector"].to_numpy().T
    np.testing.assert_allclose(found, scores.numpy(), atol=1e-5 * float(scores.abs().max()))


def test_parquet_has_a_row_per_item(tmp_path: Path) -> None:
    write_items(VECTORS, IDS, tmp_path, "parquet")
    assert pl.read_parquet(tmp_path / "items.parquet").rows() == [
        ("a", [1, 0]), ('b"\n', [0, 2]), ("ü", [3, 3]),
    ]  # fmt: skip


def test_npy_has_ids_in_the_order_of_the_rows(tmp_path: Path) -> None:
    write_items(VECTORS, IDS, tmp_path, "npy")
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy", allow_pickle=False), VECTORS)
    assert json.loads((tmp_path / "ids.json").read_text()) == IDS


def test_faiss_finds_the_largest_dot_product(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="needs the extra: pip install 'llmrec[faiss]'")
    write_items(VECTORS, IDS, tmp_path, "faiss")
    scores, rows = faiss.read_index(str(tmp_path / "index.faiss")).search(
        np.array([[1, 4]], np.float32), 3
    )
    assert scores.tolist() == [[15, 8, 1]]  # 3 + 12, 2 * 4, 1
    assert [json.loads((tmp_path / "ids.json").read_text())[row] for row in rows[0]] == IDS[::-1]


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_the_lines_on_the_card_read_the_folder(
    file_format: str, run_of: RunOf, tmp_path: Path
) -> None:
    words = ("--what", "items", "--format", file_format)
    folder = export(run_of("ids"), tmp_path / "out", *words)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code.replace("FOLDER", str(folder)), names)
    assert np.shape(names["vectors"]) == (187, 16)  # type: ignore[arg-type]
    assert list(names["ids"]) == restore(run_of("ids"), CPU).dataset.catalog.ids  # type: ignore


def test_faiss_that_is_not_installed_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    words = ("--what", "items", "--format", "faiss", "--out", tmp_path / "out")
    assert "pip install 'llmrec[faiss]'" in refusal(tmp_path / "no run", *words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["RUN"], "say what to export: --what encoder or --what items."),
        (["RUN", "--what", "items"], "name a folder to write with --out."),
        (["RUN", "--what", "users", "--out", "OUT"], "invalid choice: 'users'"),
        (["RUN", "--what", "encoder", "--format", "npy", "--out", "OUT"], "--format=npy means"),
        (["RUN", "--what", "items", "--out", "OUT", "--public"], "--public means nothing without"),
        (["RUN", "--what", "items", "--out", "OUT", "--push_to_hub", "x"], "form USER/NAME"),
        (["RUN", "--what", "items", "--out", "OUT", "--device", "tpu9"], "device=tpu9 is not"),
        (["NONE", "--what", "items", "--out", "OUT"], "holds no finished run"),
        (["BASELINE", "--what", "items", "--out", "OUT"], "which has no trained weights"),
        (["--what", "items", "--out", "OUT"], "required: RUN"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    words: list[str], sentence: str, run_of: RunOf, tmp_path: Path
) -> None:
    places = {
        "RUN": run_of("ids"), "BASELINE": run_of("popularity"), "NONE": tmp_path / "none",
        "OUT": tmp_path / "out",
    }  # fmt: skip
    assert sentence in refusal(*(places.get(word, word) for word in words))
    assert not list(tmp_path.iterdir())
