"""Training over several processes equals training in one: losses, weights, tables; also where one of them dies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from schedulefree import RAdamScheduleFree
from support.ranks import run_ranks
from support.small_models import NUM_FEATURES, SMALL_EVENTS, outputs_of, training_loader
from torch import Tensor, nn

from ubp_fast.events.schema import UserError
from ubp_fast.files import load_tensors
from ubp_fast.models.contrastive import ContrastiveConfig, ContrastiveModel
from ubp_fast.models.layers.encoder import EncoderConfig
from ubp_fast.models.layers.event_embedding import ConcatenatedEventConfig, EventSizes
from ubp_fast.models.layers.ple import PLEConfig
from ubp_fast.models.multitask import MultitaskConfig, MultitaskModel
from ubp_fast.models.training import MODEL_FILE, TrainingConfig, fit, initialise
from ubp_fast.optim import RowSparseAdamW, RowSparseEmbedding
from ubp_fast.optim.ranks import divided, divided_tables, regrouped, sum_gradients
from ubp_fast.sequences import loader
from ubp_fast.store.event_store import EventStore

OPTIMIZERS = {
    # Biases of keys change nothing: without an eps their gradients, all rounding, would become steps.
    "schedule_free": partial(RAdamScheduleFree, lr=1e-3, eps=1e-4),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, eps=1e-4),
}
WORLD = 3
LABEL_ROWS = loader._label_rows
# Model, optimizer, views of a batch (19 leaves one view for the last batch), whether tables are divided.
CASES = {
    "contrastive": ("contrastive", "schedule_free", 19, False),
    "next_event": ("next_event", "adamw", 19, False),
    "multitask": ("multitask", "adamw", 16, False),
    "contrastive, divided": ("contrastive", "schedule_free", 19, True),
    "multitask, divided": ("multitask", "adamw", 16, True),
}


def model_of(kind: str, store: EventStore, labels: Any) -> nn.Module:
    """With dropout of all kinds."""
    encoder = EncoderConfig(heads=2, layers=1, feed_forward=64, attention_dropout=0.1)
    if kind != "multitask":
        config = ContrastiveConfig(
            events=SMALL_EVENTS,
            history=replace(encoder, causal=kind == "next_event"),
            future=replace(encoder, pooling="mean"),
            temperature=0.1,
            next_event_weight=float(kind == "next_event"),
            next_events=101,
        )
        return initialise(lambda: ContrastiveModel(config, EventSizes.of(store), {"churn": 1, "buy_category": 5}), 0)
    tasks = MultitaskConfig(
        events=ConcatenatedEventConfig(8, 16, 8, 4, 32, 4, 4),
        encoder=replace(encoder, heads=1, activation="relu", norm_first=False, pooling="last"),
        profile_width=32,
        fusion_dropout=0.1,
        experts=PLEConfig(expert_hidden=32, expert_width=16, tower_hidden=16, expert_dropout=0.1),
    )
    outputs = outputs_of(labels)
    return initialise(lambda: MultitaskModel(tasks, EventSizes.of(store), NUM_FEATURES, outputs), 0)


def train(
    path: Path,
    directory: Path,
    case: str,
    group: Any = None,
    progress: Any = None,
    epochs: int = 2,
    exact: bool = False,
) -> dict[str, Any]:
    """Losses per epoch, weights, and the optimizer before the last step; in float64 with `exact`."""
    kind, optimizer, batch_size, is_divided = CASES[case]
    store = EventStore.open(path)
    batch = next(iter(training_loader(store, batch_size)))
    before: list[Any] = []

    def told(done: int, total: int) -> None:
        if done == total and (directory / "checkpoint.pt").exists():  # of the step before
            state = torch.load(directory / "checkpoint.pt", weights_only=True)
            if parts := [torch.load(directory / name, weights_only=True) for name in state["tables_apart"]["files"]]:
                state["optimizer"]["tables"] = [regrouped(of, 0, 1) for of in zip(*parts, strict=True)]
            if is_divided:
                state["optimizer"]["tables"] = [rows_of(table) for table in state["optimizer"]["tables"]]
            before.append(state["optimizer"])
        if progress is not None:
            progress(done, total)

    # Statistics and losses are float32 or wider; in float64 what is not rounding shows.
    with ExitStack() as wider:
        if exact:
            wider.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
            wider.enter_context(mock.patch.object(loader, "_label_rows", lambda *of: LABEL_ROWS(*of).double()))
        with divided_tables(group) if is_divided and group is not None else nullcontext():
            model = model_of(kind, store, batch.labels)
        config = TrainingConfig(epochs=epochs, checkpoint_every_s=0, gradient_clip_norm=0.5 if is_divided else None)
        losses = fit(
            model.double() if exact else model,
            training_loader(store, batch_size),
            OPTIMIZERS[optimizer],
            config,
            directory,
            told,
            training_loader(store, 50) if is_divided else None,
            group=group,
        )
    weights = dict(model.state_dict())
    if is_divided:
        fresh = model_of(kind, store, batch.labels).state_dict()
        assert {name: len(part) for name, part in fresh.items() if part.shape != weights[name].shape} == {
            f"events.{name}.weight": of.total for name, of in zip(("sku", "url"), divided(model).values(), strict=False)
        }
        weights = load_tensors(directory / MODEL_FILE)
    return {"losses": losses, "weights": weights, "optimizer": before[-1] if before else None}


def rows_of(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an optimizer keeps of the rows that it has stepped, in their order, wherever it lies."""
    is_stepped = table["last_step"] >= 0
    return {"last_step": table["last_step"], "state": table["state"][table["slot"][is_stepped].long()]}


def on_a_rank(rank: int, path: Path, directory: Path, epochs: int = 2, cases: Iterable[str] = CASES) -> dict[str, Any]:
    return {
        f"{case} {exact}": train(path, directory / f"{case}-{exact}", case, dist.group.WORLD, None, epochs, exact)
        for case, exact in product(cases, (False, True))
    }


@pytest.fixture(scope="module")
def ranks(store: EventStore, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ranks")
    return run_ranks(on_a_rank, WORLD, directory, store.path, directory)


def tensors_in(found: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and number of nested lists and dicts, with where it is."""
    if isinstance(found, Tensor):
        yield name, found
    elif isinstance(found, float | int):
        yield name, torch.tensor(found, dtype=torch.float64 if isinstance(found, float) else None)
    elif isinstance(found, Mapping | list | tuple):
        for key, part in found.items() if isinstance(found, Mapping) else enumerate(found):
            yield from tensors_in(part, f"{name} {key}")


def deviation(found: Any, wanted: Any, least: float = 1e-2) -> tuple[float, str]:
    """The largest difference by the largest number of its tensor, or by `least`; and where.

    What only rounding moves, the bias of keys, has gradients and moments of nearly 0.
    """
    theirs = dict(tensors_in(found))
    worst = (0.0, "")
    for name, one in tensors_in(wanted):
        other = theirs.pop(name)
        assert other.shape == one.shape and other.dtype == one.dtype, name
        if not one.is_floating_point():
            assert torch.equal(other, one), name
        elif one.numel():
            smallest = 1e-6 if name.endswith("exp_avg_sq") else least
            error = (other - one).double().abs().max() / one.double().abs().max().clamp_min(smallest)
            worst = max(worst, (float(error), name))
    assert not theirs
    return worst


def assert_close(found: dict[str, Any], wanted: dict[str, Any], exact: bool = False) -> None:
    assert deviation(found["losses"], wanted["losses"], 1.0) <= (1e-12 if exact else 1e-6, "~")
    assert deviation(found["weights"], wanted["weights"], 0.1) <= (1e-12 if exact else 1e-5, "~")


@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(
    case: str, exact: bool, store: EventStore, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    first, *others = (rank[f"{case} {exact}"] for rank in ranks)
    wanted = train(store.path, tmp_path, case, exact=exact)
    assert_close(first, wanted, exact)
    assert wanted["optimizer"] is not None
    assert deviation(first["optimizer"], wanted["optimizer"]) <= (1e-12 if exact else 1e-5, "~")
    for other in others:
        for name in ("losses", "weights"):
            assert deviation(other[name], first[name])[0] == 0


TRAINED = ("contrastive", "multitask", "contrastive, divided", "multitask, divided")


@pytest.fixture(scope="module")
def two_hundred_steps(store: EventStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return {
        f"{case} {exact}": train(store.path, folder / f"{case}-{exact}", case, epochs=50, exact=exact)
        for case, exact in product(TRAINED, (False, True))
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_two_hundred_steps_equal_one_process(
    world: int, store: EventStore, two_hundred_steps: dict[str, Any], tmp_path: Path
) -> None:
    found = run_ranks(on_a_rank, world, tmp_path, store.path, tmp_path / "ranks", 50, TRAINED)[0]
    missed = []
    for case, exact in product(TRAINED, (False, True)):
        for part, least in (("losses", 1.0), ("weights", 0.1), ("optimizer", 1e-2)):
            error, where = deviation(found[f"{case} {exact}"][part], two_hundred_steps[f"{case} {exact}"][part], least)
            line = f"{world} processes, {case}, {'float64' if exact else 'float32'}, {part}: {error:.1e} in{where}"
            print(line)
            if error > (1e-12 if exact else 1e-6 if part == "losses" else 1e-5):
                missed.append(line)
    assert not missed


def stops_at(step: int, done: int, total: int) -> None:
    if done == step:
        raise RuntimeError("this process is gone")


def dies(rank: int, path: Path, directory: Path, case: str, step: int) -> None:
    train(path, directory, case, dist.group.WORLD, partial(stops_at, step) if rank == 0 else None)


# The case that loses a process, then the one that ends the training.
@pytest.mark.parametrize("attempts", [("contrastive", "contrastive"), ("multitask, divided", "multitask, divided")])
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


def on_own_disks(rank: int, path: Path, directory: Path) -> dict[str, Any]:
    with pytest.raises(UserError, match="same model, settings and data, got others in process 2 of 2"):
        train(path, directory / "other", ("contrastive", "next_event")[rank], dist.group.WORLD)
    folder = directory / str(rank)
    with pytest.raises(UserError, match="a directory that all processes see"):
        train(path, folder, "contrastive, divided", dist.group.WORLD)
    found = train(path, folder, "contrastive", dist.group.WORLD)
    assert folder.exists() == (rank == 0)
    return found


def test_a_checkpoint_travels_to_another_disk(store: EventStore, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="is gone"):
        train(store.path, tmp_path / "0", "contrastive", progress=partial(stops_at, 5))
    assert (tmp_path / "0" / "checkpoint.pt").exists()
    wanted = train(store.path, tmp_path / "undisturbed", "contrastive")
    for found in run_ranks(on_own_disks, 2, tmp_path / "ranks", store.path, tmp_path):
        assert_close(found, wanted)


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
