"""Controls, whitening and combinations of the item towers."""

import numpy as np
import pytest
import torch

from llmrec.encoders.tower import TowerConfig, build_tower, prepare_features, whiten
from llmrec.errors import UsageError

FEATURES = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)


def test_shuffled_text_is_the_same_rows_at_other_items():
    shuffled = prepare_features(FEATURES, TowerConfig(control="shuffled", whiten=False), seed=1)
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, FEATURES))
    assert (shuffled != FEATURES).any(axis=1).mean() > 0.9
    np.testing.assert_array_equal(
        shuffled, prepare_features(FEATURES, TowerConfig(control="shuffled", whiten=False), seed=1)
    )


@pytest.mark.parametrize("whitened", [False, True])
def test_random_vectors_have_the_spread_of_the_true_ones_and_nothing_else(whitened):
    true = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    true[3] = 0  # an item without text
    config = TowerConfig(control="random", whiten=whitened)
    noise = prepare_features(true, config, seed=1)
    expected = prepare_features(true, TowerConfig(whiten=whitened), seed=1)
    assert noise.shape == expected.shape
    assert not noise[3].any()
    assert noise.std() == pytest.approx(expected.std(), rel=0.1)
    assert abs(np.corrcoef(noise.ravel(), expected.ravel())[0, 1]) < 0.2


def test_a_control_of_text_is_refused_where_no_text_is_read():
    with pytest.raises(UsageError, match=r"tower\.control=shuffled replaces text, which tower"):
        TowerConfig(name="id", control="shuffled")


def test_whitened_vectors_are_centred_uncorrelated_and_of_unit_variance():
    mixed = FEATURES @ np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32) + 3
    white = whiten(mixed)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(white.T @ white / 50, np.eye(8), atol=1e-4)


def test_whitening_keeps_items_without_text_at_zero_and_drops_empty_directions():
    flat = np.hstack([FEATURES, FEATURES[:, :2]])  # rank 8 in 10 columns
    flat[3] = 0
    white = whiten(flat)
    assert white.shape == (50, 8)
    assert not white[3].any()


def test_gradients_reach_projection_and_table_but_never_the_text_vectors():
    tower = build_tower(TowerConfig(name="id_text"), 50, 16, FEATURES)
    tower.vectors(torch.arange(51)).square().sum().backward()
    assert {name for name, weight in tower.named_parameters() if weight.grad is not None} == {
        "id.table.weight",
        *(f"text.projection.{layer}.{kind}" for layer in (0, 3) for kind in ("weight", "bias")),
    }
    assert not tower.text.features.requires_grad


def test_one_projection_layer_is_linear_and_gelu():
    tower = build_tower(TowerConfig(projection_layers=1), 50, 16, FEATURES)
    assert [type(layer).__name__ for layer in tower.projection] == ["Linear", "GELU"]


def test_no_projection_layer_is_refused():
    with pytest.raises(UsageError, match=r"tower\.projection_layers=0"):
        TowerConfig(projection_layers=0)
