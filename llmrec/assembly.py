"""What a TCF run is made of: its config, and its recommender, new or as a run folder holds it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from llmrec.checkpoints import load_weights
from llmrec.data.batches import windows
from llmrec.data.interactions import Cases, Catalog, Dataset, Int64, Interactions
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.splits import SplitConfig, fit_ends, training_counts
from llmrec.data.tfidf import tfidf_features
from llmrec.encoders.loading import locate
from llmrec.encoders.store import Encoded, encode_catalog
from llmrec.encoders.tower import TowerConfig, build_tower, prepare_features, text_order
from llmrec.encoders.tuned import TunedEncoder
from llmrec.encoders.tuning import TunableEncoder
from llmrec.errors import UsageError
from llmrec.evaluation.config import EvaluationConfig
from llmrec.evaluation.products import Scores, dot_products
from llmrec.evaluation.result import read_result
from llmrec.models.baselines import BASELINES, READ_VECTORS, Known
from llmrec.models.config import UserModelConfig
from llmrec.models.losses import LossConfig
from llmrec.models.optim import OptimConfig
from llmrec.models.recommender import Recommender
from llmrec.models.user_model import KnownUserModel, SequenceModel, TrainingPairs
from llmrec.models.user_models import USER_MODELS
from llmrec.options import parse
from llmrec.runs import CONFIG, RunOptions

HISTORIES = 512
"""Histories encoded at once in an evaluation."""


@dataclass(frozen=True)
class RunConfig(RunOptions):
    """A TCF run: as any run, and where it keeps the texts' vectors."""

    store: str = "cache/embeddings"
    """Folder of the embedding store."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; the defaults are the quick start's text model."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    encoder: TunableEncoder = field(default_factory=TunableEncoder)
    tower: TowerConfig = field(default_factory=TowerConfig)
    model: UserModelConfig = field(default_factory=UserModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Refuse a tuned encoder, or a baseline's vectors, where no text is read."""
        if self.model.name in READ_VECTORS and self.tower.name == "id":
            raise UsageError(
                f"model.name={self.model.name} reads item texts, which tower.name=id leaves out. "
                "Leave tower.name out, or use another model.name."
            )
        if not self.encoder.tuned:
            return
        if self.model.name not in USER_MODELS:
            raise UsageError(
                f"encoder.tune={self.encoder.tune} means nothing to model.name={self.model.name}, "
                "which learns nothing. Use encoder.tune=frozen."
            )
        if self.tower.name == "id" or self.tower.control in ("random", "tfidf"):
            what = f"tower.control={self.tower.control}"
            raise UsageError(
                f"encoder.tune={self.encoder.tune} tunes a reader of text, which "
                f"{'tower.name=id' if self.tower.name == 'id' else what} does not have. "
                "Use encoder.tune=frozen, or a tower that reads text."
            )


def read_texts(config: TrainConfig, catalog: Catalog, device: torch.device) -> Encoded | None:
    """The items' texts as vectors, where any are read; from the store where they are known.

    For a language model that is to be tuned: its vectors before that.
    """
    name = config.model.name
    if config.tower.name == "id" or (name in BASELINES and name not in READ_VECTORS):
        return None
    if config.tower.control == "tfidf":
        return _tfidf(catalog)
    encoder = config.encoder.frozen_encoder
    return encode_catalog(catalog, encoder, Path(config.run.store), device)


def _tfidf(catalog: Catalog) -> Encoded:
    """TF-IDF in the place of a language model's vectors."""
    began = time.perf_counter()
    vectors = tfidf_features(catalog.texts)
    cost = {"items": len(catalog), "seconds": time.perf_counter() - began, "flops": 0}
    return Encoded(vectors, {"model": "TF-IDF", "weights": "TF-IDF"}, cost)


def build(
    config: TrainConfig,
    dataset: Dataset,
    encoded: Encoded | None,
    train_end: Int64,
    device: torch.device,
) -> Recommender:
    """A recommender with fresh weights, drawn from the run's seed.

    Args:
        config: the run's.
        dataset: its data.
        encoded: what `read_texts` gave.
        train_end: (U,), what may be learned from; decides the items' popularity.
        device: where a tuned language model is put; all else follows by ``.to``.
    """
    set_seed(config.run.seed)
    features, tuned, catalog = None, None, dataset.catalog
    if encoded is not None and config.encoder.tuned:
        order = text_order(len(catalog), config.tower, config.run.seed)
        tuned = TunedEncoder(
            config.encoder,
            [catalog.texts[row] for row in order],
            catalog.template_sha256,
            Path(config.run.store),
            device,
        )
        features = encoded.vectors
    elif encoded is not None:
        features = prepare_features(encoded.vectors, config.tower, config.run.seed)
    tower = build_tower(config.tower, dataset.item_count, config.model.width, features, tuned)
    popularity = training_counts(dataset.interactions, train_end, dataset.item_count)
    kind = USER_MODELS[config.model.name]
    if issubclass(kind, KnownUserModel):
        pairs = TrainingPairs.of(dataset.interactions, train_end, dataset.item_count)
        user_model: SequenceModel | KnownUserModel = kind(config.model, pairs)
    else:
        user_model = kind(config.model)
    return Recommender(tower, user_model, config.loss, torch.from_numpy(popularity))


def recommender_scores(
    model: Recommender,
    interactions: Interactions,
    cases: Cases,
    max_length: int,
    device: torch.device,
) -> Scores:
    """How a recommender, put into evaluation mode here, scores all items for some cases."""
    model.eval()
    with torch.inference_mode():
        items = model.item_vectors()
        candidates = model.candidates(items)

    @torch.inference_mode()
    def users(block: Int64) -> Tensor:
        pieces = []
        for first in range(0, len(block), HISTORIES):
            piece = block[first : first + HISTORIES]
            who = cases.user[piece]
            seen = windows(interactions, who, cases.end[piece], max_length)
            parts = (torch.from_numpy(part).to(device) for part in (seen, who.astype(np.int64)))
            histories, known = parts
            pieces.append(model.user_vectors(histories, items, known))
        return torch.cat(pieces)

    return dot_products(users, candidates)


def baseline_scores(
    config: TrainConfig, dataset: Dataset, cases: Cases, train_end: Int64, encoded: Encoded | None
) -> Scores:
    """How a recommender that learns nothing scores all items for some cases.

    Args:
        config: the run's.
        dataset: its data.
        cases: the questions.
        train_end: (U,), what may be learned from.
        encoded: what `read_texts` gave.
    """
    vectors = np.empty((dataset.item_count, 0), dtype=np.float32)
    if encoded is not None:
        vectors = prepare_features(encoded.vectors, config.tower, config.run.seed)
    known = Known(dataset, cases, train_end, vectors, config.model)
    return BASELINES[config.model.name](known)


@dataclass(frozen=True)
class Restored:
    """A finished run, as its folder and its data give it back."""

    config: TrainConfig
    """The run's, but for `encoder.cache_states`, which is off, and `encoder.revision`, which is the
    commit that was read."""
    record: dict[str, Any]
    """What result.json holds."""
    dataset: Dataset
    encoded: Encoded | None
    """The items' texts as `read_texts` gives them: before any tuning."""
    recommender: Recommender
    """With the selected weights, in evaluation mode."""


def restore(run: Path, device: torch.device) -> Restored:
    """The recommender of a finished run, with the weights that its test figures come from.

    A tuned language model is whole, also where training read its lower blocks' states from a cache:
    vectors are then the run's own up to the rounding of `encoder.cache_dtype`.

    Args:
        run: the run folder.
        device: where the recommender is put.

    Raises:
        UsageError: The folder holds no finished run, or one that trained nothing; the data or the
            encoder's files are no longer those of the run; the weights are damaged.
    """
    record = read_result(run).record
    config, _ = parse(TrainConfig, ["--config", str(run / CONFIG)], "llmrec", "")
    if config.model.name in BASELINES:
        raise UsageError(
            f"{run} is a run of model.name={config.model.name}, which has no trained weights. Name "
            "a run of another model."
        )
    dataset = load_dataset(config.data)
    if dataset.fingerprint() != record["data"]["fingerprint"]:
        raise UsageError(
            f"data.source={config.data.source} no longer holds the data that {run} was trained on. "
            "Put it back, or train again."
        )
    config = replace(config, encoder=_encoder_of(run, config, record["cost"].get("encoder")))
    encoded = read_texts(config, dataset.catalog, device)
    ends = fit_ends(dataset.interactions, config.split, config.run.fit_on)
    recommender = build(config, dataset, encoded, ends, device).to(device)
    stage, epoch = "fit", "selected_epoch"
    if config.run.fit_on == "train+valid":
        stage, epoch = "refit", "refit_selected_epoch"
    load_weights(run, stage, record["cost"][epoch], recommender)
    return Restored(config, record, dataset, encoded, recommender.eval())


def _encoder_of(run: Path, config: TrainConfig, known: dict[str, Any] | None) -> TunableEncoder:
    """The run's encoder at the very commit that was read, all of its blocks in the model."""
    encoder = config.encoder
    if known is None or config.tower.control == "tfidf":
        return encoder
    if known["revision"]:
        encoder = replace(encoder, revision=known["revision"])
    if locate(encoder).identity != known["weights"]:
        raise UsageError(
            f"encoder.model={encoder.model} no longer holds the files that {run} was trained with. "
            "Put them back, or train again."
        )
    partial = encoder.tune.startswith("top:") or encoder.lora.layers != "all"
    return replace(encoder, cache_states=False) if partial else encoder
