"""BERT4Rec: reads both ways, sees nothing behind a mask, and the mask is no item."""

import pytest
import torch

from llmrec.encoders.tower import TowerConfig, build_tower
from llmrec.errors import UsageError
from llmrec.models.bert4rec import BERT4Rec
from llmrec.models.config import UserModelConfig
from llmrec.models.losses import LossConfig
from llmrec.models.recommender import Recommender
from llmrec.models.sasrec import SASRec

CONFIG = UserModelConfig(name="bert4rec", width=16, blocks=2, heads=2, dropout=0.3, max_length=6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BERT4Rec(CONFIG).eval()


def full(rows, length):
    return torch.randn(rows, length, 16), torch.ones(rows, length, dtype=torch.bool)


@torch.no_grad()
def test_changing_a_later_item_changes_an_earlier_state(model):
    x, real = full(2, 5)
    changed = x.clone()
    changed[:, 4] = torch.randn(2, 16)
    assert ((model(changed, real) - model(x, real))[:, 0].abs().amax(1) > 1e-3).all()


@torch.no_grad()
def test_the_item_behind_a_mask_has_no_influence_on_any_output(model):
    x, real = full(2, 5)
    masked = torch.zeros(2, 5, dtype=torch.bool)
    masked[0, 1] = masked[1, 3] = masked[1, 4] = True
    other = x.clone()
    other[masked] = 100.0
    states = model(model.hide(x, masked), real)
    torch.testing.assert_close(model(model.hide(other, masked), real), states, rtol=0, atol=0)
    assert not torch.equal(model(x, real), states)


@torch.no_grad()
def test_a_mask_hides_its_own_places_and_no_others(model):
    x, _ = full(1, 3)
    hidden = model.hide(x, torch.tensor([[False, True, False]]))
    torch.testing.assert_close(hidden[0], torch.stack([x[0, 0], model.mask, x[0, 2]]))


@torch.no_grad()
def test_a_full_history_gives_up_its_oldest_item_for_the_mask(model):
    x, real = full(2, 6)
    other = x.clone()
    other[:, 0] = 100.0
    torch.testing.assert_close(model.last(other, real), model.last(x, real), rtol=0, atol=0)
    torch.testing.assert_close(model.last(x[:, 1:], real[:, 1:]), model.last(x, real))
    other[:, 1] = torch.randn(2, 16)
    assert not torch.allclose(model.last(other, real), model.last(x, real), atol=1e-4)


@torch.no_grad()
def test_a_history_that_leaves_room_for_the_mask_is_read_whole(model):
    x, real = full(2, 5)
    other = x.clone()
    other[:, 0] = torch.randn(2, 16)
    assert not torch.allclose(model.last(other, real), model.last(x, real), atol=1e-4)


@torch.no_grad()
def test_one_position_would_hold_the_mask_alone():
    with pytest.raises(UsageError, match=r"model\.max_length=1 leaves bert4rec nothing to read"):
        UserModelConfig(name="bert4rec", max_length=1)


@torch.no_grad()
def test_the_mask_is_no_item_and_no_column_of_scores(model):
    tower = build_tower(TowerConfig(name="id", whiten=False), 30, 16, None)
    recommender = Recommender(tower, model, LossConfig(), torch.ones(31, dtype=torch.int64)).eval()
    vectors = recommender.item_vectors()
    users = recommender.user_vectors(torch.tensor([[0, 4, 9], [1, 2, 3]]), vectors)
    scores = users @ recommender.candidates(vectors).T
    assert scores.shape == (2, 31)  # 30 items and padding
    assert model.objective == "masked"
    assert model.mask.shape == (16,)


def test_only_models_trained_on_masks_hide():
    with pytest.raises(NotImplementedError, match="SASRec is not trained on masked items"):
        SASRec(UserModelConfig()).hide(*full(1, 2))
