from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ubp_fast.evaluation import EvaluationConfig
from ubp_fast.evaluation.readers import network
from ubp_fast.evaluation.readers.network import NetworkData, dense_labels, train_network, training_cost
from ubp_fast.evaluation.readers.network_linear import NetworkLinear
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.models.downstream import DOWNSTREAM_SEED, DownstreamNetwork

CONFIG = EvaluationConfig(batch_size=16)
SMALL = {"hidden_dim": 24, "thin_dim": 40, "num_blocks": 2}


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loop around a network of a few thousand parameters."""

    def make(input_dim: int, num_outputs: int, linear: type[nn.Linear]) -> DownstreamNetwork:
        return DownstreamNetwork(input_dim, num_outputs, **SMALL, linear=linear)

    monkeypatch.setattr(network, "DownstreamNetwork", make)


def sparse(labels: np.ndarray) -> LabelMatrix:
    indptr = np.concatenate([[0], np.cumsum(labels.sum(1))]).astype(np.int64)
    return LabelMatrix(indptr, np.nonzero(labels)[1].astype(np.int32), labels.shape[1])


def make_data(num_rows: int = 70, num_labels: int = 4) -> NetworkData:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(90, 6)).astype(np.float16)
    rows = rng.permutation(90)[:num_rows]
    labels = [vectors[rows, :num_labels] + rng.normal(size=(num_rows, num_labels)) > 0.5 for _ in range(2)]
    popularity = np.linspace(0.1, 0.01, num_labels)
    return NetworkData(torch.from_numpy(vectors), rows, sparse(labels[0]), sparse(labels[1]), popularity)


def plain_logits(data: NetworkData, config: EvaluationConfig) -> list[torch.Tensor]:
    """The loop as one writes it down: nn.Linear, unfused AdamW, validation in the training batches."""
    torch.manual_seed(DOWNSTREAM_SEED)
    network = DownstreamNetwork(data.vectors.shape[1], data.train.num_labels, **SMALL)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate)
    inputs, labels = data.vectors[torch.from_numpy(data.rows)].float(), torch.from_numpy(data.train.dense())
    epochs = []
    for _ in range(config.epochs):
        for batch, target in zip(inputs.split(config.batch_size), labels.split(config.batch_size), strict=True):
            optimizer.zero_grad()
            functional.binary_cross_entropy_with_logits(network(batch), target).backward()
            optimizer.step()
        with torch.no_grad():
            epochs.append(torch.cat([network(batch) for batch in inputs.split(config.batch_size)]))
    return epochs


def captured_logits(monkeypatch: pytest.MonkeyPatch, data: NetworkData, config: EvaluationConfig) -> list[torch.Tensor]:
    epochs: list[torch.Tensor] = []
    compute = network.epoch_metrics
    monkeypatch.setattr(
        network, "epoch_metrics", lambda logits, *others: epochs.append(logits.clone()) or compute(logits, *others)
    )
    train_network(data, config, lambda steps: None)
    return epochs


def test_the_loop_equals_the_plain_loop(monkeypatch):
    data = make_data()
    epochs = captured_logits(monkeypatch, data, CONFIG)
    for found, expected in zip(epochs, plain_logits(data, CONFIG), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (epochs[0] - epochs[2]).abs().max() > 0.05


def test_bf16_stays_near_fp32(monkeypatch):
    data = make_data()
    exact = plain_logits(data, CONFIG)[-1]
    rounded = captured_logits(monkeypatch, data, replace(CONFIG, precision="bf16"))[-1]
    error = float((rounded - exact).abs().max())
    assert 0 < error < 0.03 * float(exact.abs().max())


@pytest.mark.parametrize("low_precision", [False, True])
def test_kept_gradients_equal_autograd(low_precision):
    torch.manual_seed(0)
    layer, plain = NetworkLinear(7, 5), nn.Linear(7, 5)
    plain.load_state_dict(layer.state_dict())
    layer.prepare(low_precision)
    buffer = layer.weight.grad
    for seed in range(2):  # the second pass must replace the gradient of the first
        inputs = torch.randn(9, 7, generator=torch.Generator().manual_seed(seed))
        own, other = (inputs.clone().requires_grad_() for _ in range(2))
        layer(own).square().sum().backward()
        plain.zero_grad()
        plain(other).square().sum().backward()
        limit = {"rtol": 0.05, "atol": 0.15} if low_precision else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad, **limit)
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **limit)
        torch.testing.assert_close(own.grad, other.grad, **limit)
    assert layer.weight.grad is buffer


def test_refresh_follows_the_optimizer():
    layer = NetworkLinear(7, 5)
    layer.prepare(low_precision=True)
    with torch.no_grad():
        layer.weight.add_(1.0)
    layer.refresh()
    assert torch.equal(layer.low_weight, layer.weight.detach().bfloat16())


def test_two_runs_are_equal_and_leave_the_random_state_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second = (train_network(make_data(), CONFIG, lambda steps: None) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


def test_reported_steps_add_up():
    steps: list[int] = []
    train_network(make_data(), CONFIG, steps.append)
    assert sum(steps) == training_cost(70, CONFIG)


def test_dense_labels_equal_the_matrix():
    labels = make_data().train
    dense = dense_labels(labels, torch.device("cpu"))
    assert dense.dtype == torch.uint8
    np.testing.assert_array_equal(dense.numpy(), labels.dense())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("precision", "fp16", "precision must be 'fp32' or 'bf16', got 'fp16'"),
        ("readers", (), "readers must be different ones of .*, got \\[\\]"),
        ("readers", ("linear", "forest"), "readers must be different ones of .*forest"),
        ("labels_per_task", 0, "labels_per_task must be >= 1, got 0"),
        ("orders", 0, "orders must be >= 1, got 0"),
        ("epochs", 0, "epochs must be >= 1, got 0"),
        ("learning_rate", 0.0, "learning_rate must be > 0, got 0.0"),
        ("tasks", ("churn", "churned"), "tasks must be among .*, got 'churned'"),
        ("tasks", ("churn", "churn"), "got 'churn' twice"),
    ],
)
def test_wrong_configurations_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**{field: value})


def test_bf16_keeps_small_differences_beside_a_large_shared_part():
    """Rounded without centring, rows that differ by less than 1/256 of their size would all look the same."""
    torch.manual_seed(0)
    layer, plain = NetworkLinear(64, 8), nn.Linear(64, 8)
    plain.load_state_dict(layer.state_dict())
    layer.prepare(low_precision=True)
    generator = torch.Generator().manual_seed(1)
    inputs = 1000 * torch.randn(64, generator=generator) + torch.randn(32, 64, generator=generator)
    weight = torch.randn(32, 8, generator=generator)
    outputs, exact = layer(inputs), plain(inputs)
    for result in (outputs, exact):
        (result * weight).sum().backward()
    outputs, exact = outputs.detach(), exact.detach()
    spread = exact - exact.mean(0)
    assert float((outputs - exact).abs().max()) < 0.03 * float(spread.abs().max())
    error = float((layer.weight.grad - plain.weight.grad).abs().max())
    assert error < 0.01 * float(plain.weight.grad.abs().max())
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), outputs)
