"""Training: the same bytes after a kill, seeds, precision, optimizers, records."""

from __future__ import annotations

import contextlib
import json
import platform
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from schedulefree import RAdamScheduleFree
from support.shops import DAY_S
from support.small_models import (
    CUTOFF_S,
    LISTS,
    outputs_of,
    small_contrastive,
    small_multitask,
    training_loader,
    whole_batch,
)

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.files import load_tensors, write_tensors
from ubp_fast.models.contrastive import ContrastiveModel
from ubp_fast.models.layers.event_embedding import TableDtype
from ubp_fast.models.training import TrainingConfig, embed, fit, initialise, on_device
from ubp_fast.sequences import ViewLoader, views_at, window_labels
from ubp_fast.store.event_store import EventStore

OPTIMIZERS = {
    "schedule_free": partial(RAdamScheduleFree, lr=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=3e-3),
}


class Killed(Exception):
    """Stands for a process that ends in the middle of a step."""


def kill_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return progress


def weights(model: torch.nn.Module) -> dict[str, bytes]:
    parts = model.state_dict().items()
    # NumPy has no bfloat16; float32 holds the same numbers.
    return {name: (part.float() if part.dtype == torch.bfloat16 else part).numpy().tobytes() for name, part in parts}


def train(
    store: EventStore,
    directory: Path,
    optimizer: str = "schedule_free",
    epochs: int = 3,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
    table_dtype: TableDtype = "float32",
) -> tuple[ContrastiveModel, list[dict[str, float]]]:
    model = small_contrastive(store, seed, table_dtype=table_dtype)
    config = TrainingConfig(epochs=epochs, seed=seed, checkpoint_every_s=0)
    losses = fit(model, training_loader(store), OPTIMIZERS[optimizer], config, directory, progress)
    return model, losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("table_updates", "table_dtype"), [("auto", "float32"), ("auto", "bfloat16"), ("dense", "float32")]
)
def test_killed_in_an_epoch_and_continued_equals_undisturbed(
    store: EventStore, tmp_path: Path, optimizer: str, table_updates: Any, table_dtype: TableDtype
) -> None:
    """Rows of tables that wait for their next use lie in the checkpoint as they are, and so do counts of the epoch."""
    loader = training_loader(store)
    steps = len(loader)

    def run(directory: Path, progress: Any = None, every_s: float = 0.0) -> tuple[ContrastiveModel, Any]:
        model = small_contrastive(store, table_dtype=table_dtype, probes={"churn": 1, "buy_category": 5})
        config = TrainingConfig(epochs=3, checkpoint_every_s=every_s, table_updates=table_updates)
        return model, fit(model, loader, OPTIMIZERS[optimizer], config, directory, progress)

    undisturbed, losses = run(tmp_path / "a", every_s=1e9)
    seen: list[int] = []
    for step in (1, 3, 2 * steps, 2 * steps + 3):
        with pytest.raises(Killed):
            run(tmp_path / "b", kill_at(step))
    continued, other_losses = run(tmp_path / "b", lambda done, _: seen.append(done))
    assert seen == list(range(2 * steps + 3, 3 * steps + 1))
    assert weights(undisturbed) == weights(continued)
    assert losses == other_losses
    assert "auroc_buy_category" in losses[0]
    for name in ("model.safetensors", "losses.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model.safetensors", "losses.json"}


def test_losses_are_logged_while_it_trains(store: EventStore, tmp_path: Path) -> None:
    config = TrainingConfig(epochs=3, checkpoint_every_s=0, logger="csv")

    def run(directory: Path, progress: Callable[[int, int], None] | None = None) -> list[dict[str, float]]:
        loader = training_loader(store)
        return fit(small_contrastive(store, 0), loader, OPTIMIZERS["adamw"], config, directory, progress)

    losses = run(tmp_path / "a")
    steps = len(training_loader(store))
    with pytest.raises(Killed):
        run(tmp_path / "b", kill_at(2 * steps + 1))
    assert (tmp_path / "b" / "logs" / "metrics.csv").exists(), "written while it trains"
    run(tmp_path / "b")
    text = (tmp_path / "a" / "logs" / "metrics.csv").read_text()
    logged = pl.read_csv(tmp_path / "a" / "logs" / "metrics.csv")
    assert logged["loss"].drop_nulls().to_list() == pytest.approx(
        [part["loss"] for part in json.loads((tmp_path / "a" / "losses.json").read_text())["curve"]]
    )
    assert logged["epoch_loss"].drop_nulls().to_list() == pytest.approx([epoch["loss"] for epoch in losses])
    assert logged["step"].max() == 3 * steps
    again = pl.read_csv(tmp_path / "b" / "logs" / "metrics.csv")
    rows = [frame.select(sorted(frame.columns)).sort("step", "loss").rows() for frame in (logged, again)]
    assert rows[0] == rows[1], "one file for the whole training"
    assert text.startswith("epoch")


def test_a_logger_that_is_not_installed_is_told(
    store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(**_: object) -> None:
        raise ModuleNotFoundError("no tensorboard")

    monkeypatch.setattr("ubp_fast.models.training.lightning_loggers.TensorBoardLogger", none)
    config = TrainingConfig(logger="tensorboard")
    with pytest.raises(UserError, match="pip install tensorboard"):
        fit(small_contrastive(store, 0), training_loader(store), OPTIMIZERS["adamw"], config, tmp_path)


def test_a_full_disk_costs_a_checkpoint_and_no_training(
    store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = train(store, tmp_path / "a")
    kept: list[bytes] = []
    opened: Any = Path.open

    def full(path: Path, *mode: Any, **options: Any) -> Any:
        if not path.name.startswith(".checkpoint"):
            return opened(path, *mode, **options)
        path.touch()
        return opened(Path("/dev/full"), *mode, **options)

    def fill_up(done: int, total: int) -> None:
        checkpoint = tmp_path / "b" / "checkpoint.pt"
        if done == 3:
            kept.append(checkpoint.read_bytes())
            monkeypatch.setattr(Path, "open", full)
        elif done == 6:
            assert checkpoint.read_bytes() == kept[0], "the last complete one stays"
            assert {path.name for path in checkpoint.parent.iterdir()} == {"checkpoint.pt"}
            raise Killed

    no_room = "no room for a checkpoint .No space left on device.; the training goes on"
    with pytest.warns(UserWarning, match=no_room), pytest.raises(Killed):
        train(store, tmp_path / "b", progress=fill_up)
    monkeypatch.undo()
    seen: list[int] = []
    continued, _ = train(store, tmp_path / "b", progress=lambda done, _: seen.append(done))
    assert seen[0] == 3
    assert weights(undisturbed) == weights(continued)


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C counts, also in a background job that was told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stays_what_it_is(store: EventStore, tmp_path: Path, heeded: None) -> None:
    def interrupt(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(store, tmp_path / "a", progress=interrupt)
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"nothing"])
def test_a_damaged_checkpoint_is_passed_over(
    store: EventStore, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    undisturbed, _ = train(store, tmp_path / "a", epochs=1)
    with pytest.raises(Killed):
        train(store, tmp_path / "b", progress=kill_at(3), epochs=1)
    latest = tmp_path / "b" / "checkpoint.pt"
    latest.write_bytes(damage(latest.read_bytes()))
    seen: list[int] = []
    from_start, _ = train(store, tmp_path / "b", progress=lambda done, _: seen.append(done), epochs=1)
    assert seen[0] == 1
    assert weights(undisturbed) == weights(from_start)


@pytest.mark.parametrize("change", ["seed", "initial weights", "labels", "events", "order"])
def test_a_checkpoint_of_another_training_is_not_used(store: EventStore, tmp_path: Path, change: str) -> None:
    def start(progress: Callable[[int, int], None], change: str = "") -> dict[str, bytes]:
        loader = training_loader(store, shuffle_seed=int(change == "order"))
        if change == "labels":
            loader.labels["churn"] = 1 - loader.labels["churn"]  # type: ignore[operator]
        if change == "events":
            loader = training_loader(store, history_length=63)
        model = small_contrastive(store, seed=int(change == "initial weights"))
        config = TrainingConfig(seed=int(change == "seed"), checkpoint_every_s=0)
        fit(model, loader, OPTIMIZERS["adamw"], config, tmp_path, progress)
        return weights(model)

    with pytest.raises(Killed):
        start(kill_at(3))
    with pytest.raises(Killed):
        start(lambda done, _: (_ for _ in ()).throw(Killed) if done == 3 else None)
    seen: list[int] = []
    start(lambda done, _: seen.append(done), change)
    assert seen[0] == 1


def test_finished_training_is_only_loaded(store: EventStore, tmp_path: Path) -> None:
    trained, losses = train(store, tmp_path)
    seen: list[tuple[int, int]] = []
    again, other_losses = train(store, tmp_path, progress=lambda *at: seen.append(at))
    assert len(seen) == 1
    assert seen[0][0] == seen[0][1]
    assert weights(trained) == weights(again)
    assert losses == other_losses


def test_seed_decides(store: EventStore, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, _ = train(store, tmp_path / "a", epochs=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(7)
    same, _ = train(store, tmp_path / "b", epochs=1)
    other, _ = train(store, tmp_path / "c", epochs=1, seed=1)
    assert weights(first) == weights(same) != weights(other)
    assert weights(small_contrastive(store, 3)) == weights(small_contrastive(store, 3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_fall_and_are_recorded(store: EventStore, tmp_path: Path, optimizer: str) -> None:
    _, losses = train(store, tmp_path, optimizer, epochs=12)
    assert [entry["epoch"] for entry in losses] == list(range(12))
    assert losses[-1]["nt_xent"] < 0.8 * losses[0]["nt_xent"]
    for entry in losses:
        assert entry["loss"] == pytest.approx(entry["nt_xent"] + entry["future_activity"])
    record = json.loads((tmp_path / "losses.json").read_text())
    assert record["epochs"] == losses
    assert record["curve"][-1]["epoch"] == len(losses)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_multitask_learns_in_both_precisions(store: EventStore, tmp_path: Path, precision: str) -> None:
    model = small_multitask(store, outputs_of(whole_batch(store).labels))
    config = TrainingConfig(epochs=8, precision=precision)  # type: ignore[arg-type]
    losses = fit(model, training_loader(store), OPTIMIZERS["adamw"], config, tmp_path)
    assert losses[-1]["buy_category"] < 0.8 * losses[0]["buy_category"]
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_contrastive_runs_in_bf16(store: EventStore, tmp_path: Path) -> None:
    model = small_contrastive(store)
    losses = fit(
        model, training_loader(store), OPTIMIZERS["schedule_free"], TrainingConfig(epochs=6, precision="bf16"), tmp_path
    )
    assert losses[-1]["nt_xent"] < losses[0]["nt_xent"]


def test_schedule_free_trains_and_rests_in_the_right_mode(store: EventStore, tmp_path: Path) -> None:
    modes: list[str] = []

    class Watched(RAdamScheduleFree):
        def train(self) -> None:
            modes.append("train")
            super().train()

        def eval(self) -> None:
            modes.append("eval")
            super().eval()

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            modes.append("step")
            return super().step(closure)

        def state_dict(self) -> dict[str, object]:
            modes.append("save")
            return super().state_dict()

    model, loader = small_contrastive(store), training_loader(store, batch_size=30)
    config = TrainingConfig(epochs=2, checkpoint_every_s=0)
    fit(model, loader, partial(Watched, lr=1e-2), config, tmp_path)
    steps = ["step"] * len(loader)
    inside = ["step", "save"] * (len(steps) - 1) + ["step"]
    assert modes == ["train", *inside, "eval", "save", "train", *inside, "eval"]


@pytest.mark.parametrize("clip", [None, 0.1])
def test_probes_tell_how_well_they_rank_and_change_no_vector(
    store: EventStore, tmp_path: Path, clip: float | None
) -> None:
    config = TrainingConfig(epochs=3, gradient_clip_norm=clip)
    results = []
    for probes in (None, {"churn": 1, "buy_category": 5}):
        model = small_contrastive(store, probes=probes)
        losses = fit(model, training_loader(store), OPTIMIZERS["adamw"], config, tmp_path / str(bool(probes)))
        results.append((losses, embed(model, training_loader(store, shuffle_seed=None)), weights(model)))
    (plain, vectors, alone), (watched, same, more) = results
    np.testing.assert_array_equal(vectors, same)
    assert alone.items() <= more.items()
    assert {name for name in more if name not in alone} == {
        f"probes.{name}.linear.{part}" for name in ("churn", "buy_category") for part in ("weight", "bias")
    }
    assert all("auroc_churn" not in entry for entry in plain)
    assert watched[-1]["auroc_buy_category"] > 0.6
    assert [entry["nt_xent"] for entry in watched] == [entry["nt_xent"] for entry in plain]


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "checkpoint"])
def test_another_model_or_optimizer_is_no_continuation(store: EventStore, tmp_path: Path, finished: bool) -> None:
    """Another learning rate in the same directory once returned the model of the first."""
    loader, config = training_loader(store), TrainingConfig(epochs=2, checkpoint_every_s=0)

    def start(lr: float, **changes: Any) -> list[int]:
        seen: list[int] = []
        stop = None if finished else kill_at(len(loader) + 1)

        def progress(done: int, total: int) -> None:
            seen.append(done)
            if stop is not None:
                stop(done, total)

        model = small_contrastive(store, **changes)
        with contextlib.nullcontext() if finished else pytest.raises(Killed):
            fit(model, loader, partial(torch.optim.AdamW, lr=lr), config, tmp_path, progress)
        return seen

    assert start(1e-3)[0] == 1
    assert start(1e-3)[0] > 1
    assert start(2e-3)[0] == 1
    assert start(2e-3, next_event_weight=0.5)[0] == 1


def test_weights_that_do_not_fit_leave_the_model_alone(store: EventStore, tmp_path: Path) -> None:
    """Tensors in front of the first misfit were once taken over before the rest was refused."""
    train(store, tmp_path, epochs=1)
    stored = load_tensors(tmp_path / "model.safetensors")
    stored["history.empty"] = torch.zeros(3)
    write_tensors(tmp_path / "model.safetensors", {name: part + 1 for name, part in stored.items()})
    trained, _ = train(store, tmp_path, epochs=1)
    undisturbed, _ = train(store, tmp_path / "again", epochs=1)
    assert weights(trained) == weights(undisturbed)


def test_embed_keeps_order_and_does_not_depend_on_batches(store: EventStore, tmp_path: Path) -> None:
    model, _ = train(store, tmp_path, epochs=1)
    views = views_at(store, [CUTOFF_S])
    seen: list[tuple[int, int]] = []
    small = ViewLoader(store, views, batch_size=7, history_length=64)
    profiles = embed(model, small, lambda *at: seen.append(at))
    assert profiles.dtype == np.float32
    assert profiles.shape == (30, 32)
    assert seen == [(step, 5) for step in range(1, 6)]
    large = embed(model, ViewLoader(store, views, batch_size=100, history_length=64))
    np.testing.assert_allclose(profiles, large, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="keep the order of its views, got shuffle_seed 4"):
        embed(model, ViewLoader(store, views, batch_size=7, history_length=64, shuffle_seed=4))


def test_weights_come_back(store: EventStore, tmp_path: Path) -> None:
    model, _ = train(store, tmp_path, epochs=1)
    other = small_contrastive(store, seed=5)
    other.load_state_dict(load_tensors(tmp_path / "model.safetensors"))
    assert weights(model) == weights(other)


def by_chance(store: EventStore) -> ViewLoader:
    """A validation whose labels belong to other clients, so that an epoch before the last is the best."""
    views = views_at(store, [CUTOFF_S + 14 * DAY_S], with_history=True)
    labels = window_labels(store, views, LISTS)
    turned = np.random.default_rng(1).permutation(len(views.row))
    mixed: dict[str, Any] = {"churn": labels["churn"][turned]}  # type: ignore[index]
    mixed["buy_category"] = labels["buy_category"].take(turned)
    return ViewLoader(store, views, batch_size=1000, history_length=64, labels=mixed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_best_epoch_is_kept_whatever_happens(store: EventStore, tmp_path: Path, optimizer: str) -> None:
    validation, loader, epochs = by_chance(store), training_loader(store), 6

    def train_until(
        directory: Path, progress: Callable[[int, int], None] | None = None, epochs: int = epochs
    ) -> tuple[Any, Any]:
        model = small_contrastive(store, probes={"churn": 1, "buy_category": 5})
        config = TrainingConfig(epochs=epochs, checkpoint_every_s=0)
        return model, fit(model, loader, OPTIMIZERS[optimizer], config, directory, progress, validation)

    model, losses = train_until(tmp_path / "a")
    scores = [entry["valid_score"] for entry in losses]
    best = scores.index(max(scores))
    assert len(set(scores)) > 2
    assert 0 < best < epochs - 1
    until_best, _ = train_until(tmp_path / "until", epochs=best + 1)
    assert weights(until_best) == weights(model)
    for entry in losses:
        assert entry["valid_score"] == pytest.approx(entry["valid_auroc_churn"] + entry["valid_auroc_buy_category"])
    for step in (1 + len(loader) * (best + 1), len(loader) * (epochs - 1) + 1):
        with pytest.raises(Killed):
            train_until(tmp_path / "b", kill_at(step))
    continued, same = train_until(tmp_path / "b")
    assert same == losses
    assert weights(continued) == weights(model)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model.safetensors", "losses.json"}


@pytest.mark.parametrize("patience", [1, 2])
def test_training_ends_when_nothing_gets_better(patience: int, store: EventStore, tmp_path: Path) -> None:
    """With the weights of the best epoch, killed or not."""
    validation, loader, epochs = by_chance(store), training_loader(store), 8

    def train(directory: Path, progress: Callable[[int, int], None] | None = None, **changes: Any) -> tuple[Any, Any]:
        model = small_contrastive(store, probes={"churn": 1, "buy_category": 5})
        config = TrainingConfig(**({"epochs": epochs, "checkpoint_every_s": 0.0} | changes))
        return model, fit(model, loader, OPTIMIZERS["schedule_free"], config, directory, progress, validation)

    patient = {"patience": patience, "validation_views": validation.num_views}
    told: list[tuple[int, int]] = []
    model, losses = train(tmp_path / "a", lambda *at: told.append(at), **patient)
    scores = [entry["valid_score"] for entry in losses]
    best = scores.index(max(scores))
    assert len(scores) == best + patience + 1 < epochs
    assert told[-1] == (epochs * len(loader),) * 2
    until_best, _ = train(tmp_path / "until", epochs=best + 1)
    assert weights(model) == weights(until_best)
    with pytest.raises(Killed):
        train(tmp_path / "b", kill_at(len(loader) * (best + 1) + 1), **patient)
    continued, same = train(tmp_path / "b", **patient)
    assert same == losses
    assert weights(continued) == weights(model)


@pytest.mark.parametrize(("patience", "views"), [(0, 10), (2, 0)])
def test_patience_needs_what_it_waits_for(patience: int, views: int) -> None:
    with pytest.raises(UserError, match="patience must be >= 1 with validation_views"):
        TrainingConfig(patience=patience, validation_views=views)


def test_steps_of_an_epoch_are_limited(store: EventStore, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = TrainingConfig(epochs=2, max_steps=2)
    fit(
        small_contrastive(store),
        training_loader(store),
        OPTIMIZERS["adamw"],
        config,
        tmp_path,
        lambda *at: seen.append(at),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_vectors_in_a_file_and_in_half_precision(store: EventStore, tmp_path: Path) -> None:
    model = small_contrastive(store)
    loader = ViewLoader(store, views_at(store, [CUTOFF_S]), batch_size=7, history_length=64)
    whole = embed(model, loader)
    mapped = embed(model, loader, dtype=np.float16, file=tmp_path / "vectors.npy")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, whole.astype(np.float16))
    with torch.no_grad():
        model.history.empty.fill_(1e6)
    with pytest.raises(DataError, match=r"finite in float16, got 1000000.0 in row \d+, column 0"):
        embed(model, loader, dtype=np.float16)


def test_a_gpu_that_is_not_there_is_refused(store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device must be one that this machine has, got 'cuda'"):
        fit(
            small_contrastive(store),
            training_loader(store),
            OPTIMIZERS["adamw"],
            TrainingConfig(device="cuda"),
            tmp_path,
        )
    assert on_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert on_device("auto") == torch.device("cuda")


def test_a_loss_that_is_not_finite_stops_the_training(store: EventStore, tmp_path: Path) -> None:
    model = initialise(lambda: small_contrastive(store), 0)
    with torch.no_grad():
        model.future_activity.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="must stay finite, got nan in epoch 0"):
        fit(model, training_loader(store), OPTIMIZERS["adamw"], TrainingConfig(), tmp_path)


def test_no_views_are_refused(store: EventStore, tmp_path: Path) -> None:
    loader = ViewLoader(
        None, type(views_at(store, [CUTOFF_S]))(np.empty(0, np.int64), np.empty(0, np.int64)), batch_size=2
    )
    with pytest.raises(DataError, match="at least one view"):
        fit(small_contrastive(store), loader, OPTIMIZERS["adamw"], TrainingConfig(), tmp_path)


@pytest.mark.parametrize(
    ("make_model", "optimizer", "clip"),
    [
        (small_contrastive, "schedule_free", None),
        (small_contrastive, "adamw", None),
        ("multitask", "schedule_free", 0.5),
        ("multitask", "adamw", 0.5),
    ],
    ids=str,
)
def test_row_sparse_training_is_dense_training(
    store: EventStore, tmp_path: Path, make_model: object, optimizer: str, clip: float | None
) -> None:
    """Tables are trained by the rows in use, and the losses are those of the dense optimizer."""
    results = {}
    for updates in ("row_sparse", "dense"):
        if make_model == "multitask":
            model: torch.nn.Module = small_multitask(store, outputs_of(whole_batch(store).labels))
        else:
            model = small_contrastive(store)
        config = TrainingConfig(epochs=5, table_updates=updates, gradient_clip_norm=clip)  # type: ignore[arg-type]
        sku, adopted = model.events.sku, set()
        losses = fit(
            model,
            training_loader(store),
            OPTIMIZERS[optimizer],
            config,
            tmp_path / updates,
            lambda *_, sku=sku, adopted=adopted: adopted.add(sku.touched is not None),
        )
        assert adopted == {updates == "row_sparse"}
        assert sku.touched is None  # its optimizer's memory is free again
        results[updates] = (losses, model.state_dict())
    assert results["dense"][0][-1]["loss"] < results["dense"][0][0]["loss"]
    for found, wanted in zip(results["row_sparse"][0], results["dense"][0], strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    found, wanted = (results[updates][1]["events.sku.weight"] for updates in ("row_sparse", "dense"))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def in_memory() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
@pytest.mark.parametrize("does", ["fit", "embed"])
def test_holes_between_tensors_that_live_go_back_to_the_system(does: str, store: EventStore, tmp_path: Path) -> None:
    model, views = small_contrastive(store), views_at(store, [CUTOFF_S])
    few = ViewLoader(store, views, batch_size=3, history_length=64)  # ten batches
    embed(model, few)
    train(store, tmp_path / "before", epochs=1)
    tensors = [torch.ones(16_384) for _ in range(4_000)]
    living = tensors[::16]
    full = in_memory()
    del tensors
    holes = full - in_memory()
    assert holes < 50e6, "otherwise this test says nothing"
    if does == "embed":
        embed(model, few)
    else:
        train(store, tmp_path / "after", epochs=1)
    assert in_memory() < full - 150e6
    assert len(living) == 250
