"""Joined blocks, the stacked profile, and its tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.small_models import untouched_parameters
from torch.nn import functional

from ubp_fast.models.stacking import JoinedBlocks, StackingConfig, StackingModel
from ubp_fast.models.training import initialise
from ubp_fast.sequences import ViewBatch

OUTPUTS = {"churn": 1, "buy_sku": 6}


@pytest.fixture(scope="module")
def model() -> StackingModel:
    return initialise(lambda: StackingModel(StackingConfig(profile_width=8, standardise=True), 5, OUTPUTS), 0)


def batch() -> ViewBatch:
    random = torch.Generator().manual_seed(0)
    labels = {"churn": torch.rand(10, generator=random).round(), "buy_sku": torch.rand(10, 6, generator=random).round()}
    return ViewBatch(features=torch.randn(10, 5, generator=random) * 3 + 1, labels=labels)


def test_blocks_side_by_side_and_counts_normalised() -> None:
    left, right = np.expm1(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)), np.array([[7], [9]], np.float16)
    joined = JoinedBlocks([[left, right]], [True, False])
    assert (len(joined), joined.shape) == (2, (2, 3))
    assert joined[:].dtype == np.float32
    np.testing.assert_allclose(joined[:], [[0.6, 0.8, 7.0], [0.0, 0.0, 9.0]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"equal rows, got \[2, 1\]"):
        JoinedBlocks([[left, right[:1]]], [True, False])
    with pytest.raises(ValueError, match=r"one flag each, got \[2\] and 1"):
        JoinedBlocks([[left, right]], [True])


def test_blocks_of_several_cutoffs_follow_each_other() -> None:
    random = np.random.default_rng(0)
    cutoffs = [[random.random((5, 2)), random.random((5, 3))] for _ in range(3)]
    whole = np.concatenate([np.concatenate(blocks, axis=1) for blocks in cutoffs]).astype(np.float32)
    joined = JoinedBlocks(cutoffs, [False, False])
    for chosen in (slice(None), slice(3, 12), np.array([14, 0, 7, 7]), np.zeros(0, np.int64)):
        np.testing.assert_array_equal(joined[chosen], whole[chosen])


def test_profile_is_the_activation_of_one_linear_layer(model: StackingModel) -> None:
    inputs = batch().features
    model.fit_scaling(inputs.numpy())
    scaled = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    expected = functional.gelu(functional.linear(scaled, model.profile.weight, model.profile.bias))
    torch.testing.assert_close(model(ViewBatch(features=inputs)), expected, rtol=1e-5, atol=1e-5)
    assert model.embedding_width == 8


def test_constant_columns_do_not_divide_by_zero(model: StackingModel) -> None:
    model.fit_scaling(np.ones((4, 5), np.float32))
    assert model.input_scale.tolist() == [1.0] * 5


def test_inputs_stay_as_they_are_by_default() -> None:
    config = StackingConfig()
    assert not config.standardise
    assert config.profile_width == 512
    assert config.labels == ("churn", "buy_sku", "buy_category")


def test_loss_is_one_mean_per_task_and_reaches_all_parameters(model: StackingModel) -> None:
    terms = model.loss(batch())
    hidden = model.body(model(batch()))
    expected = functional.binary_cross_entropy_with_logits(model.heads["buy_sku"](hidden), batch().labels["buy_sku"])
    torch.testing.assert_close(terms["buy_sku"], expected)
    assert set(terms) == set(OUTPUTS)
    sum(terms.values()).backward()
    assert not untouched_parameters(model)


def test_missing_features_are_named(model: StackingModel) -> None:
    with pytest.raises(ValueError, match="features must be in the batch"):
        model(ViewBatch())
