"""A run's reader of texts as a folder that sentence-transformers loads without remote code.

FOLDER/                             the language model in float32, adapters merged, its tokeniser
FOLDER/1_Pooling/                   as the run pooled
FOLDER/2_Dense/                     whitening, where the run did it
FOLDER/3_Dense/, ...                the projection's layers, GELU after each
FOLDER/modules.json and others      what sentence-transformers goes by
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrec.assembly import Restored
from llmrec.encoders.text import TextEncoder
from llmrec.encoders.tower import IdTextTower, TextTower, TunedTextTower, Whitening
from llmrec.errors import UsageError
from llmrec.runs import write_json
from llmrec.serving.merging import make_plain, save_plain

POOLINGS = {
    "mean": "mean",
    "cls": "cls",
    "last": "lasttoken",
    "weighted_mean": "weightedmean",
}
"""A pooling here -> what sentence-transformers calls it."""
CHECKED = 256
"""Texts of the catalogue whose vectors are compared before a folder is given out."""
TOLERANCE = 1e-3
"""Largest difference of a folder's vectors from the run's, as a share of the largest value, that
rounding may explain: on other hardware, and behind a whitening. A wrong prompt, pooling or layer
moves vectors by a hundred times that."""


@dataclass(frozen=True)
class TextPart:
    """The part of a tower that makes a vector of a text, taken out of its recommender."""

    encoder: TextEncoder
    mean: Tensor | None
    """(H,) and, in `directions`, (H, H'): the whitening; None where the run had none."""
    directions: Tensor | None
    projection: nn.Sequential
    """(n, H') -> (n, D)."""

    def vectors(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors of n texts, none of them empty, (n, D)."""
        read = torch.from_numpy(self.encoder.encode(texts)[0])  # (n, H)
        if self.mean is not None and self.directions is not None:
            read = (read - self.mean) @ self.directions  # (n, H) x (H, H') -> (n, H')
        with torch.inference_mode():
            return cast(NDArray[np.float32], self.projection(read).numpy())


@dataclass(frozen=True)
class Differences:
    """How far the folder's vectors of some of the catalogue's texts are from the run's."""

    texts: int
    """How many were compared."""
    largest_value: float
    """Of all their components, without sign."""
    folder_and_merged: float
    """Largest difference of a component: the folder as sentence-transformers reads it, and the
    merged float32 model as the run reads texts."""
    merged_and_run: float
    """The same between that merged model and the run's own item vectors."""


def text_tower(restored: Restored) -> TextTower | TunedTextTower:
    """The tower that reads texts with a language model, alone or beside IDs.

    Raises:
        UsageError: The run has none, or gave items other texts than their own.
    """
    config, tower = restored.config, restored.recommender.tower
    if config.tower.name == "id" or config.tower.control != "none":
        what = "name=id" if config.tower.name == "id" else f"control={config.tower.control}"
        raise UsageError(
            "--what encoder needs a run that reads its items' own texts with a language model; "
            f"this one has tower.{what}. Use --what items."
        )
    part = tower.text if isinstance(tower, IdTextTower) else tower
    assert isinstance(part, (TextTower, TunedTextTower))
    return part


def take_text_part(restored: Restored, device: torch.device) -> TextPart:
    """The reader of texts of a run; a tuned language model is the run's own object.

    Raises:
        UsageError: See `text_tower`; or sentence-transformers has no word for what is done to a
            text.
    """
    tower = text_tower(restored)
    if isinstance(tower, TunedTextTower):
        encoder = tower.encoder.encoder
        mean, directions = tower.mean.cpu(), tower.directions.cpu()
    else:
        # One block at a time is no way to write a model.
        encoder = TextEncoder(
            replace(restored.config.encoder.frozen_encoder, placement="one_device"), device
        )
        assert restored.encoded is not None
        whitening = Whitening.of(restored.encoded.vectors)
        mean, directions = (
            torch.from_numpy(part).float() for part in (whitening.mean, whitening.directions)
        )
    if encoder.config.placement == "spread" and device.type != "cpu":
        raise UsageError(
            "encoder.placement=spread leaves no one place to merge a model in. Use --device cpu."
        )
    if encoder.has_final_norm and not encoder.config.final_norm:
        raise UsageError(
            "encoder.final_norm=false reads states that sentence-transformers cannot, before the "
            "model's closing norm. Use --what items."
        )
    projection = copy.deepcopy(tower.projection).cpu().eval()
    if not restored.config.tower.whiten:
        return TextPart(encoder, None, None, projection)
    return TextPart(encoder, mean, directions, projection)


def write_sentence_folder(restored: Restored, folder: Path, device: torch.device) -> Differences:
    """Write the folder, read it again with sentence-transformers, and compare.

    The restored language model is merged on the way and must not be used afterwards.

    Args:
        restored: a run with a text or id_text tower.
        folder: an empty one.
        device: where both sides of the comparison run.

    Raises:
        UsageError: The run cannot be exported so, or the folder's vectors are not the run's.
    """
    part = take_text_part(restored, device)
    rows = _some_rows(restored.dataset.catalog.texts, restored.config.run.seed)
    texts = [restored.dataset.catalog.texts[row] for row in rows]
    with torch.inference_mode():
        ids = torch.from_numpy(rows + 1).to(device)
        own = text_tower(restored).vectors(ids).cpu().numpy()  # (n, D)
    exact = part.encoder.config.quantisation == "none" and part.encoder.config.dtype == "float32"
    make_plain(part.encoder)
    merged = part.vectors(texts)
    save_plain(part.encoder, folder)
    _write_modules(part, folder)
    written = _encode(folder, texts, device)
    largest = float(np.abs(merged).max())
    found = Differences(
        len(texts),
        largest,
        float(np.abs(written - merged).max()),
        float(np.abs(merged - own).max()),
    )
    apart = max(found.folder_and_merged, found.merged_and_run if exact else 0.0)
    if not apart <= TOLERANCE * largest:
        raise UsageError(
            f"encoder.model={part.encoder.config.model} reads texts otherwise in "
            f"sentence-transformers: vectors differ by {apart:.2g}, their largest value is "
            f"{largest:.2g}. Use --what items."
        )
    return found


def _some_rows(texts: list[str], seed: int) -> NDArray[np.int64]:
    """Distinct rows of the catalogue that have a text, in order."""
    filled = np.flatnonzero([bool(text) for text in texts])
    count = min(CHECKED, len(filled))
    return np.sort(np.random.default_rng(seed).choice(filled, count, replace=False))


def _encode(folder: Path, texts: list[str], device: torch.device) -> NDArray[np.float32]:
    """Vectors (n, D) of the folder as anybody loads it."""
    from sentence_transformers import SentenceTransformer  # seconds, which only an export waits for

    model = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
    return np.asarray(model.encode(texts, show_progress_bar=False), np.float32)


def _write_modules(part: TextPart, folder: Path) -> None:
    """All but the language model: pooling, whitening, projection, and the list of modules."""
    from sentence_transformers import __version__
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    config = part.encoder.config
    first = cast(nn.Linear, part.projection[0])
    width = first.in_features if part.mean is None else len(part.mean)  # H
    modules: list[Any] = [Pooling(width, POOLINGS[config.pooling])]
    if part.mean is not None and part.directions is not None:
        # (x - mean) @ directions as one linear layer; the bias from a product in double precision.
        whiten = Dense(width, part.directions.shape[1], activation_function=nn.Identity())
        shift = part.mean.double() @ part.directions.double()  # (H,) x (H, H') -> (H',)
        _fill(whiten.linear, part.directions.T, -shift)
        modules.append(whiten)
    for layer in part.projection:
        if isinstance(layer, nn.Linear):
            dense = Dense(layer.in_features, layer.out_features, activation_function=nn.GELU())
            _fill(dense.linear, layer.weight, layer.bias)
            modules.append(dense)
    listed = [{"idx": 0, "name": "0", "path": "", "type": _path_of(Transformer)}]
    for number, module in enumerate(modules, start=1):
        name = f"{number}_{type(module).__name__}"
        (folder / name).mkdir()
        module.save(str(folder / name))
        kind = _path_of(type(module))
        listed.append({"idx": number, "name": str(number), "path": name, "type": kind})
    write_json(folder / "modules.json", listed)
    # A token limit and no more: read as plain text, also where the tokeniser has a chat template.
    limit = {"max_seq_length": config.max_item_tokens, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", limit)
    about = {
        "model_type": "SentenceTransformer",
        "__version__": {"sentence_transformers": __version__, "pytorch": torch.__version__},
        "prompts": {"document": config.prompt} if config.prompt else {},
        "default_prompt_name": "document" if config.prompt else None,
        "similarity_fn_name": "dot",
    }
    write_json(folder / "config_sentence_transformers.json", about)


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)


def _path_of(kind: type) -> str:
    """The name under which sentence-transformers finds a module's class."""
    return f"{kind.__module__}.{kind.__qualname__}"
