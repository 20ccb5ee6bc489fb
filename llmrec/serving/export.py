"""``llmrec export``: what a finished run learned about items, as files that others read.

llmrec export RUN --what encoder --out FOLDER     a sentence-transformers folder: text -> vector
llmrec export RUN --what items --out FOLDER       vectors and ids of the catalogue

The folder is written under a temporary name and renamed when it is whole; llmrec.json and README.md
(a model card) say what it is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from llmrec.assembly import Restored, restore
from llmrec.encoders.store import pick_device
from llmrec.errors import UsageError, exit_code
from llmrec.runs import sync, write_json
from llmrec.serving.card import encoder_card, facts_of, items_card
from llmrec.serving.hub import check_destination, push

ABOUT, README = "llmrec.json", "README.md"
FORMATS = ("parquet", "npy", "faiss")


class _Parser(argparse.ArgumentParser):
    """Mistakes are one sentence, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help.")


def _parser() -> _Parser:
    parser = _Parser(
        prog="llmrec export",
        description="A finished run's reader of texts, or its item vectors, for use elsewhere.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--what", choices=("encoder", "items"),
        help="encoder: text -> item vector, as a sentence-transformers folder, adapters merged, in "
        "float32; items: the vectors of all items, with their ids",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--format", choices=FORMATS,
        help="of --what items: parquet (default; item_id, vector), npy (vectors.npy and ids.json), "
        "faiss (a flat inner-product index and ids.json; extra `faiss`)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier export wrote to FOLDER"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--push_to_hub", metavar="USER/NAME",
        help="upload the folder to the Hugging Face hub as well, privately, with the token of "
        "HF_TOKEN or `hf auth login`",
    )  # fmt: skip
    parser.add_argument(
        "--public", action="store_true", help="let everybody see what --push_to_hub uploads"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything costly, what cannot be done."""
    if options.what is None:
        raise UsageError("say what to export: --what encoder or --what items.")
    if options.out is None:
        raise UsageError("name a folder to write with --out.")
    if options.format and options.what == "encoder":
        raise UsageError(
            f"--format={options.format} means nothing to --what encoder. Leave it out."
        )
    if options.format == "faiss" and importlib.util.find_spec("faiss") is None:
        raise UsageError("--format=faiss needs an extra: pip install 'llmrec[faiss]'.")
    if options.public and not options.push_to_hub:
        raise UsageError("--public means nothing without --push_to_hub. Leave it out.")
    _check_out(options.out, options.overwrite)
    if options.push_to_hub:
        check_destination(options.push_to_hub)


def _check_out(out: Path, overwrite: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise UsageError(
            f"--out {out} exists already. Name another folder, or replace it with --overwrite."
        )
    if out.is_symlink() or not (out / ABOUT).is_file():
        raise UsageError(
            f"--out {out} is no folder that llmrec export wrote, so --overwrite leaves it alone. "
            "Name another."
        )


@contextlib.contextmanager
def finished_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well; else nothing is left of it.

    Raises:
        UsageError: `out` is there and may not be replaced, or cannot be written.
    """
    _check_out(out, overwrite)
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        temporary.chmod(0o755)
        older = temporary.with_name(f"{temporary.name}.replaced")
        if out.exists():
            out.rename(older)
        temporary.rename(out)
        sync(out.parent)
        shutil.rmtree(older, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"--out {out} cannot be written ({error.strerror or error}). Free some space or name "
            "another folder."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def item_vectors(restored: Restored) -> NDArray[np.float32]:
    """(N, D), in the catalogue's order; the dot product with a user's vector is the run's score."""
    with torch.inference_mode():
        model = restored.recommender
        vectors = model.candidates(model.item_vectors())[1:]
    return np.ascontiguousarray(vectors.float().cpu().numpy())


def write_items(
    vectors: NDArray[np.float32], ids: list[str], folder: Path, file_format: str
) -> None:
    """Write item vectors and external ids, row by row the same items.

    Args:
        vectors: (N, D).
        ids: (N,).
        folder: an existing one.
        file_format: one of FORMATS.
    """
    if file_format == "parquet":
        kind = pl.Array(pl.Float32, vectors.shape[1])
        table = pl.DataFrame({"item_id": ids, "vector": pl.Series(vectors, dtype=kind)})
        table.write_parquet(folder / "items.parquet")
        return
    write_json(folder / "ids.json", ids)
    if file_format == "npy":
        np.save(folder / "vectors.npy", vectors, allow_pickle=False)
        return
    import faiss  # optional, see `_check`

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(folder / "index.faiss"))


def _write(options: argparse.Namespace, restored: Restored, device: torch.device) -> str:
    """Fill and finish the folder; returns a sentence about it."""
    facts: dict[str, Any] = facts_of(restored, options.what)
    with finished_folder(options.out, options.overwrite) as folder:
        if options.what == "encoder":
            from llmrec.serving.sentence_folder import write_sentence_folder

            found = write_sentence_folder(restored, folder, device)
            facts |= {"compared": asdict(found)}
            card = encoder_card(facts, options.push_to_hub)
            said = (
                f"{found.texts} texts of the catalogue read by sentence-transformers differ from "
                f"the merged model by {found.folder_and_merged:.1e} at most, that from the run by "
                f"{found.merged_and_run:.1e} (largest value {found.largest_value:.2g})"
            )
        else:
            vectors, ids = item_vectors(restored), restored.dataset.catalog.ids
            file_format = options.format or "parquet"
            write_items(vectors, ids, folder, file_format)
            facts |= {"format": file_format, "shape": list(vectors.shape)}
            card = items_card(facts, options.push_to_hub)
            said = f"{len(ids)} items, vectors of width {vectors.shape[1]}, {file_format}"
        write_json(folder / ABOUT, facts)
        (folder / README).write_text(card, encoding="utf-8")
    return said


def export(argv: Sequence[str]) -> int:
    """Restore the run, write the folder, upload it where asked to."""
    options = _parser().parse_args(list(argv))
    _check(options)
    device = pick_device(options.device)
    said = _write(options, restore(options.run, device), device)
    sys.stdout.write(f"{said} -> {options.out}\n")
    if options.push_to_hub:
        address = push(options.out, options.push_to_hub, options.what, options.public)
        sys.stdout.write(f"uploaded to {address}\n")
    return 0


def main(argv: Sequence[str]) -> int:
    """``llmrec export``."""
    return exit_code(export, argv)
