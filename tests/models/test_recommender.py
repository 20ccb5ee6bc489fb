"""Tower, user model and loss together: any combination trains, batching changes no score."""

import numpy as np
import pytest
import torch

from llmrec.data.batches import Examples, TrainingRows
from llmrec.data.interactions import Interactions
from llmrec.encoders.tower import TowerConfig, build_tower
from llmrec.errors import UsageError
from llmrec.models.config import UserModelConfig
from llmrec.models.losses import LossConfig
from llmrec.models.recommender import Batch, Recommender
from llmrec.models.user_model import KnownUserModel, TrainingPairs
from llmrec.models.user_models import USER_MODELS

ITEMS, WIDTH = 30, 16
FEATURES = np.random.default_rng(0).normal(size=(ITEMS, 24)).astype(np.float32)
PAIRS = TrainingPairs(
    4, ITEMS, np.repeat(np.arange(4), 6), np.random.default_rng(2).integers(1, ITEMS + 1, 24)
)
"""Of 4 users with 6 items each."""


def recommender(tower="id", loss="full_softmax", combine="add", model="sasrec"):
    torch.manual_seed(0)
    built = build_tower(TowerConfig(name=tower, combine=combine), ITEMS, WIDTH, FEATURES)
    config = UserModelConfig(model, width=WIDTH, blocks=1, heads=2, dropout=0.0, max_length=8)
    kind = USER_MODELS[model]
    user_model = kind(config, PAIRS) if issubclass(kind, KnownUserModel) else kind(config)
    counts = torch.tensor([0] + [3] * ITEMS)
    return Recommender(built, user_model, LossConfig(name=loss), counts)


def batch(length=6, rows=4, negatives=2):
    torch.manual_seed(1)
    items = torch.randint(1, ITEMS + 1, (rows, length + 1))
    items[0, :3] = 0
    sampled = torch.randint(1, ITEMS + 1, (rows, length, negatives))
    return following(items, sampled)


def following(items, sampled):
    """A batch of sequences, every item of which asks for the next one."""
    return Batch.of(Examples.following(np.arange(len(items)), items.numpy()), sampled.numpy())


@pytest.mark.parametrize("loss", ["full_softmax", "in_batch", "bce"])
@pytest.mark.parametrize(
    ("tower", "combine"),
    [("id", "add"), ("text", "add"), *[("id_text", c) for c in ("add", "concat", "gated")]],
)
def test_every_tower_learns_a_small_batch_under_every_loss(tower, combine, loss):
    model, data = recommender(tower, loss, combine), batch()
    losses = learned(model, data, 60)
    assert losses[-1] < 0.6 * losses[0]
    assert model.flops > 0


def learned(model, data, steps):
    """The losses of some steps on one batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        value = model(data)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def examples_for(name, last_only=False):
    """A batch of 4 users as a model is asked, each position with 2 negatives."""
    rng = np.random.default_rng(1)
    items = rng.integers(1, ITEMS + 1, 28).astype(np.int32)
    interactions = Interactions(items, np.array([0, 4, 11, 19, 28]))
    objective = USER_MODELS[name].objective
    rows = TrainingRows.of(interactions, interactions.offsets[1:], 8, objective, last_only, 0.4)
    found = rows.examples(np.arange(4), rng)
    return Batch.of(found, rng.integers(1, ITEMS + 1, (*found.inputs.shape, 2)))


@pytest.mark.parametrize(
    ("loss", "last_only"),
    [("full_softmax", True), *((n, False) for n in ("full_softmax", "in_batch", "gbce", "bpr"))],
)
@pytest.mark.parametrize("name", USER_MODELS)
def test_every_user_model_goes_with_every_loss(name, loss, last_only):
    model, data = recommender("id_text", loss, model=name), examples_for(name, last_only)
    losses = learned(model, data, 20)
    assert losses[-1] < 0.85 * losses[0]
    assert all(weight.grad is not None for weight in model.parameters())
    assert model.flops > 0


@pytest.mark.parametrize("name", USER_MODELS)
def test_a_score_is_the_product_of_a_user_and_a_candidate_and_padding_moves_none(name):
    model = recommender(model=name).eval()
    histories, users = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]), torch.tensor([1, 3])
    with torch.inference_mode():
        items = model.item_vectors()
        candidates = model.candidates(items)
        assert candidates.shape == (ITEMS + 1, WIDTH)  # no column for a mask
        scores = model.user_vectors(histories, items, users) @ candidates.T
        wider = torch.cat([torch.zeros(2, 3, dtype=torch.long), histories], dim=1)
        again = model.user_vectors(wider, items, users) @ candidates.T
    torch.testing.assert_close(again, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dssm", "mf", "lightgcn"])
def test_a_history_of_nobody_known_is_refused_where_users_are_known_by_id(name):
    model = recommender(model=name).eval()
    with pytest.raises(UsageError, match=rf"model\.name={name} knows the users .*=dssm_history"):
        model.user_vectors(torch.tensor([[1, 2]]), model.item_vectors())


def test_what_stands_behind_a_mask_is_read_by_nobody():
    """The same questions about two sequences that differ in a masked item alone."""
    model = recommender(model="bert4rec", loss="bce").eval()
    sequences = np.array([[1, 2, 3, 4, 5]])
    masked = np.array([[False, True, False, False, True]])
    losses = []
    for other in (2, 9):
        items = np.where(sequences == 2, other, sequences)
        inputs, targets = np.where(masked, 0, items), np.where(masked & (items == 5), items, 0)
        examples = Examples(np.array([0]), inputs, targets, masked, items)
        losses.append(model(Batch.of(examples, np.full((1, 5, 2), 7))).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("loss", ["full_softmax", "in_batch", "bce"])
def test_padding_a_batch_further_changes_no_loss(loss):
    model, data = recommender(loss=loss), batch()
    parts = (data.sequences, data.negatives)
    padded = following(
        *(torch.cat([part.new_zeros(4, 2, *part.shape[2:]), part], dim=1) for part in parts)
    )
    torch.testing.assert_close(model(padded), model(data), rtol=1e-5, atol=1e-5)


def test_a_pieced_batch_sums_to_the_whole():
    model, data = recommender(loss="bce"), batch()
    pieces = [
        following(data.sequences[rows], data.negatives[rows]) for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(
        sum(model(piece) for piece in pieces), model(data), rtol=1e-5, atol=1e-5
    )


def test_the_padding_item_is_the_zero_vector_in_every_tower():
    for tower, combine in [
        ("id", "add"),
        ("text", "add"),
        ("id_text", "concat"),
        ("id_text", "gated"),
    ]:
        assert recommender(tower, combine=combine).eval().item_vectors()[0].abs().max() == 0
