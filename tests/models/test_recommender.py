"""Tower, user model and loss together: any combination trains, batching changes no score."""

import numpy as np
import pytest
import torch

from llmrec.encoders.tower import TowerConfig, build_tower
from llmrec.models.losses import LossConfig
from llmrec.models.recommender import Batch, Recommender
from llmrec.models.sasrec import SASRec, UserModelConfig

ITEMS, WIDTH = 30, 16
FEATURES = np.random.default_rng(0).normal(size=(ITEMS, 24)).astype(np.float32)


def recommender(tower="id", loss="full_softmax", combine="add"):
    torch.manual_seed(0)
    built = build_tower(TowerConfig(name=tower, combine=combine), ITEMS, WIDTH, FEATURES)
    user_model = SASRec(UserModelConfig(width=WIDTH, blocks=1, heads=2, dropout=0.0, max_length=8))
    counts = torch.tensor([0] + [3] * ITEMS)
    return Recommender(built, user_model, LossConfig(name=loss), counts)


def batch(length=6, rows=4, negatives=2):
    torch.manual_seed(1)
    items = torch.randint(1, ITEMS + 1, (rows, length + 1))
    items[0, :3] = 0
    inputs = items[:, :-1]
    targets = torch.where(inputs > 0, items[:, 1:], 0)
    sampled = torch.randint(1, ITEMS + 1, (rows, length, negatives))
    return Batch.of(*(part.numpy() for part in (inputs, targets, sampled)))


@pytest.mark.parametrize("loss", ["full_softmax", "in_batch", "bce"])
@pytest.mark.parametrize(
    ("tower", "combine"),
    [("id", "add"), ("text", "add"), *[("id_text", c) for c in ("add", "concat", "gated")]],
)
def test_every_tower_learns_a_small_batch_under_every_loss(tower, combine, loss):
    model, data = recommender(tower, loss, combine), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        value = model(data)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.6 * losses[0]
    assert model.flops > 0


@pytest.mark.parametrize("loss", ["full_softmax", "in_batch", "bce"])
def test_padding_a_batch_further_changes_no_loss(loss):
    model, data = recommender(loss=loss), batch()
    padded = Batch.of(
        *(
            torch.cat([part.new_zeros(4, 2, *part.shape[2:]), part], dim=1).numpy()
            for part in (data.inputs, data.targets, data.negatives)
        )
    )
    torch.testing.assert_close(model(padded), model(data), rtol=1e-5, atol=1e-5)


def test_a_pieced_batch_sums_to_the_whole():
    model, data = recommender(loss="bce"), batch()
    pieces = [
        Batch.of(*(p[rows].numpy() for p in (data.inputs, data.targets, data.negatives)))
        for rows in (slice(0, 1), slice(1, 4))
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
