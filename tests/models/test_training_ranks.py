"""Training over several processes equals training in one: losses, weights, tables; also where one of them dies."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from schedulefree import RAdamScheduleFree
from support.ranks import run_ranks
from support.small_models import NUM_FEATURES, SMALL_EVENTS, outputs_of, training_loader
from torch import nn

from ubp_fast.files import load_tensors
from ubp_fast.models.contrastive import ContrastiveConfig, ContrastiveModel
from ubp_fast.models.layers.encoder import EncoderConfig
from ubp_fast.models.layers.event_embedding import ConcatenatedEventConfig, EventSizes
from ubp_fast.models.layers.ple import PLEConfig
from ubp_fast.models.multitask import MultitaskConfig, MultitaskModel
from ubp_fast.models.training import MODEL_FILE, TrainingConfig, fit, initialise
from ubp_fast.optim import RowSparseAdamW, RowSparseEmbedding
from ubp_fast.optim.ranks import divided, divided_tables, sum_gradients
from ubp_fast.store.event_store import EventStore

OPTIMIZERS = {
    # Biases of keys change nothing: without an eps their gradients, all rounding, would become steps.
    "schedule_free": partial(RAdamScheduleFree, lr=1e-3, eps=1e-4),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, eps=1e-4),
}
WORLD = 3
# Model, optimizer, views of a batch (19 leaves one view for the last batch), whether tables are divided.
CASES = {
    "contrastive": ("contrastive", "schedule_free", 19, False),
    "multitask": ("multitask", "adamw", 16, False),
    "contrastive, divided": ("contrastive", "schedule_free", 19, True),
    "multitask, divided": ("multitask", "adamw", 16, True),
}


def model_of(kind: str, store: EventStore, labels: Any) -> nn.Module:
    """Without dropout, which every process draws for itself."""
    encoder = EncoderConfig(heads=2, layers=1, feed_forward=64, dropout=0.0)
    if kind == "contrastive":
        config = ContrastiveConfig(
            events=SMALL_EVENTS, history=encoder, future=replace(encoder, pooling="mean"), temperature=0.1
        )
        return initialise(lambda: ContrastiveModel(config, EventSizes.of(store), {"churn": 1, "buy_category": 5}), 0)
    tasks = MultitaskConfig(
        events=ConcatenatedEventConfig(8, 16, 8, 4, 32, 4, 4),
        encoder=replace(encoder, heads=1, activation="relu", norm_first=False, pooling="last"),
        embedding_dropout=0.0,
        fusion_dropout=0.0,
        profile_width=32,
        experts=PLEConfig(expert_hidden=32, expert_width=16, tower_hidden=16, expert_dropout=0.0, tower_dropout=0.0),
    )
    outputs = outputs_of(labels)
    return initialise(lambda: MultitaskModel(tasks, EventSizes.of(store), NUM_FEATURES, outputs), 0)


def train(path: Path, directory: Path, case: str, group: Any = None, progress: Any = None) -> tuple[Any, Any]:
    """Losses per epoch and weights, whole."""
    kind, optimizer, batch_size, is_divided = CASES[case]
    store = EventStore.open(path)
    loader = training_loader(store, batch_size)
    batch = next(iter(training_loader(store, batch_size)))
    with divided_tables(group) if is_divided and group is not None else nullcontext():
        model = model_of(kind, store, batch.labels)
    config = TrainingConfig(epochs=2, checkpoint_every_s=0, gradient_clip_norm=0.5)
    validation = training_loader(store, 50)
    losses = fit(model, loader, OPTIMIZERS[optimizer], config, directory, progress, validation, group=group)
    weights, whole = dict(model.state_dict()), load_tensors(directory / MODEL_FILE)
    fresh = model_of(kind, store, batch.labels).state_dict()
    assert {name: len(part) for name, part in fresh.items() if part.shape != weights[name].shape} == {
        f"events.{name}.weight": of.total for name, of in zip(("sku", "url"), divided(model).values(), strict=False)
    }
    return losses, whole if is_divided else weights


def on_a_rank(rank: int, path: Path, directory: Path) -> dict[str, Any]:
    return {case: train(path, directory / case, case, dist.group.WORLD) for case in CASES}


@pytest.fixture(scope="module")
def ranks(store: EventStore, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ranks")
    return run_ranks(on_a_rank, WORLD, directory, store.path, directory)


def assert_close(found: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    for mine, one in zip(found[0], wanted[0], strict=True):
        assert mine == pytest.approx(one, rel=1e-5, abs=1e-6)
    for name, one in wanted[1].items():
        error = (found[1][name].double() - one.double()).abs().max()
        assert error <= 1e-5 * one.double().abs().max().clamp_min(0.1), f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(case: str, store: EventStore, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    wanted = train(store.path, tmp_path, case)
    assert_close(ranks[0][case], wanted)
    for other in ranks[1:]:
        assert other[case][0] == ranks[0][case][0]
        assert all(torch.equal(part, ranks[0][case][1][name]) for name, part in other[case][1].items())


def stops_at(step: int, done: int, total: int) -> None:
    if done == step:
        raise RuntimeError("this process is gone")


def dies(rank: int, path: Path, directory: Path, case: str, step: int) -> None:
    train(path, directory, case, dist.group.WORLD, partial(stops_at, step) if rank == 0 else None)


# Who divides its tables after the first one, and so on: processes of each attempt. The last one ends the training.
@pytest.mark.parametrize("attempts", [("contrastive", "contrastive"), ("multitask, divided", "multitask")])
def test_a_run_that_lost_a_process_is_continued_by_another_number(
    attempts: tuple[str, str], store: EventStore, tmp_path: Path
) -> None:
    first, then = attempts
    with pytest.raises(Exception, match=r"is gone|Connection (reset|closed)"):
        run_ranks(dies, 2, tmp_path / "ranks", store.path, tmp_path / "training", first, 5)
    assert (tmp_path / "training" / "checkpoint.pt").exists()
    seen: list[int] = []
    continued = train(store.path, tmp_path / "training", then, progress=lambda done, total: seen.append(done))
    assert seen[0] > 1
    assert_close(continued, train(store.path, tmp_path / "undisturbed", then))
    assert not list((tmp_path / "training").glob("*.pt"))


def gradients_on_a_rank(rank: int) -> list[Any]:
    table, head, idle = RowSparseEmbedding(6, 2), nn.Linear(2, 1), nn.Linear(1, 1)
    with torch.no_grad():
        table.weight.fill_(1.0)
        head.weight.fill_(1.0)
    RowSparseAdamW([*table.parameters()], [table])
    if rank:  # the other one has no gradient of its own
        head(table(torch.tensor([1, 4, 4]))).sum().backward()
    sum_gradients([*table.parameters(), *head.parameters(), *idle.parameters()], dist.group.WORLD)
    assert all(part.grad is None for part in idle.parameters())
    gradient = table.trainable().grad
    assert gradient is not None and head.weight.grad is not None and head.bias.grad is not None
    return [gradient.to_dense(), head.weight.grad, head.bias.grad]


def test_sums_of_gradients(tmp_path: Path) -> None:
    wanted = torch.zeros(6, 2)
    wanted[1], wanted[4] = 1.0, 2.0
    for table, weight, bias in run_ranks(gradients_on_a_rank, 2, tmp_path):
        assert torch.equal(table, wanted)
        assert torch.equal(weight, torch.full((1, 2), 3.0))
        assert bias.item() == 3.0
