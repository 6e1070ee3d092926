"""A captured step, replayed on a CPU by `Recorder`: terms, gradients and seeds are those of the loss itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support.waits import recorded
from torch import Tensor, nn

from ubp_fast.kernels import BackendUnavailable, CapturedStep, check_deferred, graphs
from ubp_fast.models.layers.dropout import dropout
from ubp_fast.models.layers.encoder import EncoderConfig
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.multitask import MultitaskConfig, MultitaskModel
from ubp_fast.sequences import FixedSizes


@dataclass(frozen=True)
class Batch:
    rows: Tensor
    target: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, rows=function(self.rows), target=function(self.target))


class Model(nn.Module):
    """Two draws of dropout, a count of steps, and a weight that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(6, 4), nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        self.steps.add_(1)
        hidden = dropout(self.layer(dropout(batch.rows, 0.5, True)), 0.3, True)
        return {"square": (hidden - batch.target).square().mean(), "size": 0.1 * hidden.abs().mean()}


def batch(seed: int, rows: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(rows, 6, generator=generator), torch.randn(rows, 4, generator=generator))


def plain(model: Model, given: Batch, is_low: bool = False) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
        terms = model.loss(given)
    parameters = list(model.parameters())
    return terms, list(torch.autograd.grad(sum(terms.values()), parameters, allow_unused=True))


@pytest.mark.parametrize("is_low", [False, True], ids=["float32", "autocast"])
def test_replays_are_the_steps_of_the_loss(is_low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights change between them, also their copies in bfloat16, batches and seeds do; another size is captured."""
    captures = []
    monkeypatch.setattr(graphs, "_recorded", lambda *given: (captures.append(1), recorded(*given))[1])
    torch.manual_seed(0)
    model = Model()
    captured = CapturedStep(model.loss, model)
    for seed, rows in ((1, 8), (2, 8), (3, 8), (4, 5), (5, 5)):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):  # as Lightning has it around a step
            found = captured(batch(seed, rows))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        terms, gradients = plain(model, batch(seed, rows), is_low)
        assert torch.equal(state, torch.get_rng_state())
        assert {name: value.item() for name, value in found.items()} == {name: terms[name].item() for name in terms}
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(parameter.grad, gradient)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1)
    assert len(captures) == 2
    assert int(model.steps) == 10, "what leads up to a capture is no step"


def test_terms_are_kept_while_gradients_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_recorded", recorded)
    model = Model()
    captured = CapturedStep(model.loss, model)
    first = captured(batch(0))
    value, gradient = first["square"].item(), model.layer.weight.grad
    captured(batch(1))
    assert first["square"].item() == value and model.layer.weight.grad is gradient


def test_what_leads_up_to_a_capture_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss may draw from the device's generator, which a graph of a GPU advances by itself."""
    monkeypatch.setattr(graphs, "_recorded", recorded)
    model = Model()

    def loss(given: Batch) -> dict[str, Tensor]:
        return model.loss(given) | {"noise": 0.0 * torch.rand(())}

    captured = CapturedStep(loss, model)
    captured(batch(0))
    found = []
    for rows in (8, 7):
        torch.manual_seed(5)
        captured(batch(1, rows))
        found.append(torch.get_rng_state())
    assert torch.equal(*found)


def test_needs_a_device() -> None:
    model = Model()
    with pytest.raises(BackendUnavailable, match="parameters must be on a CUDA device, got cpu"):
        CapturedStep(model.loss, model)(batch(0))


@pytest.mark.gpu
def test_a_step_that_waits_is_refused() -> None:
    model = Model().cuda()

    def loss(given: Batch) -> dict[str, Tensor]:
        found = model.loss(given)
        return found if float(found["size"].detach()) > -1 else {}

    with pytest.raises(BackendUnavailable, match="a step must not wait for the device"):
        CapturedStep(loss, model)(batch(0).map(Tensor.cuda))


@pytest.mark.gpu
@pytest.mark.parametrize("buckets", [0, 20])
def test_a_multitask_step_on_a_device(buckets: int) -> None:
    """In bfloat16, with dropout of activations and weights, packs and pairs that follow from offsets and times."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from reference_pytorch.multitask_step import random_batch
    from reference_pytorch.padded import random_lengths

    sizes = EventSizes(500, 40, 20, 300, ("product_buy", "page_visit", "search_query"))
    encoder = EncoderConfig(heads=2, pooling="last", norm_first=False, attention_dropout=0.1, time_bias_buckets=buckets)
    model = MultitaskModel(MultitaskConfig(encoder=encoder), sizes, 5, {"churn": 1, "buy_sku": 30}).cuda()
    captured, fills = CapturedStep(model.loss, model), FixedSizes(64, 32)
    batches = [random_batch(random_lengths(32, seed), sizes, 5, {"churn": 1, "buy_sku": 30}) for seed in range(4)]
    for part in batches:  # to the size of all
        fills(part)
    for seed, part in enumerate(batches):
        given = fills(part).to("cuda")
        torch.manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16):
            found = captured(given)
        torch.manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16):
            terms = model.loss(given)
        gradients = torch.autograd.grad(sum(terms.values()), list(model.parameters()), allow_unused=True)
        torch.testing.assert_close(found, {name: term.detach() for name, term in terms.items()})
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.95)
    check_deferred()


@pytest.mark.gpu
def test_replays_on_a_device() -> None:
    torch.manual_seed(0)
    model = Model().cuda()
    captured = CapturedStep(model.loss, model)
    for seed in range(4):
        given = batch(seed).map(Tensor.cuda)
        torch.manual_seed(seed)
        found = captured(given)
        torch.manual_seed(seed)
        terms, gradients = plain(model, given)
        torch.testing.assert_close(found, terms)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
