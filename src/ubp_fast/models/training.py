"""Training and inference of every model: the one place with Lightning.

Each epoch starts from (seed, epoch) alone and ends with the optimizer in evaluation mode, so a run that was killed and
continued from its last checkpoint ends with the same bytes as an undisturbed one. The checkpoint before is kept until
the next is complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar

import lightning
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.files import load_json, load_tensors, write_atomically, write_json, write_tensors
from ubp_fast.kernels import check_deferred
from ubp_fast.optim import TableUpdates, adopt_tables, clip_gradient_norm, release_tables
from ubp_fast.progress import Progress
from ubp_fast.sequences.batch import ViewBatch
from ubp_fast.sequences.loader import ViewLoader

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
ModuleT = TypeVar("ModuleT", bound=nn.Module)

MODEL_FILE, LOSSES_FILE = "model.safetensors", "losses.json"
CURVE_POINTS = 60
_CHECKPOINT, _PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
# What a damaged checkpoint, model or record makes its reader raise.
_UNREADABLE = (OSError, EOFError, RuntimeError, KeyError, ValueError, UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class TrainingConfig:
    """How long and in which way a model is trained."""

    epochs: int = 1  # passes over all views; docs/winner.md 6 (stacking)
    batch_size: int = 128  # client views per step; docs/winner.md 4.7
    seed: int = 0  # of initial weights, order and dropout
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 computes products in bfloat16, weights stay float32
    device: Literal["cpu", "cuda", "auto"] = "cpu"  # auto takes a GPU when there is one
    gradient_clip_norm: float | None = None  # largest gradient norm; none in docs/winner.md 4.7 and 6
    checkpoint_every_s: float = 30.0  # seconds between checkpoints, written at the end of an epoch
    table_updates: TableUpdates = "auto"  # of large tables: only rows in use where that is exact, see `adopt_tables`


def initialise(factory: Callable[[], ModuleT], seed: int) -> ModuleT:
    """Builds a module whose initial weights depend on `seed` only; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def fit(
    model: nn.Module,
    loader: ViewLoader,
    optimizer_factory: OptimizerFactory,
    config: TrainingConfig,
    directory: Path,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place; leaves `model.safetensors` and `losses.json` in `directory`.

    `losses.json`: `epochs`, what is returned, and `curve`, means over about `CURVE_POINTS` parts of the training.
    Called again with a directory that holds checkpoints of the same training, it continues; with a finished one, it
    only loads. Unreadable checkpoints, and those of another model, optimizer or training, are passed over.

    Args:
        model: has `loss(batch) -> dict of terms`; their sum is minimised. What its `epoch_metrics()` gives, if it has
            any, is recorded after every epoch.
        loader: training batches; its `set_epoch` is called before each pass.
        optimizer_factory: parameters -> optimizer. Schedule-free ones are switched between training and evaluation.
        config: epochs, seed, precision, device.
        directory: for checkpoints and results, created when missing.
        progress: called as progress(steps done, steps in all) after every step.

    Returns:
        Per epoch: `epoch` (from 0), `loss` (sum of the terms) and each term, means over the views; metrics.

    Raises:
        DataError: a loader without views.
        UserError: `table_updates` that this optimizer cannot have.
        FloatingPointError: a loss that is not finite.
    """
    if not len(loader):
        raise DataError("fit: loader must have at least one view, got none; use an earlier cutoff or more data")
    directory.mkdir(parents=True, exist_ok=True)
    identity = _identity(model, loader, optimizer_factory, config)
    finished = _load_finished(model, directory, identity)
    if finished is not None:
        if progress is not None:
            progress(config.epochs * len(loader), config.epochs * len(loader))
        return finished
    with _quiet_lightning(), torch.random.fork_rng(devices=_cuda_devices(config)):
        job = _Job(model, loader, optimizer_factory, config, directory, identity, progress)
        trainer = lightning.Trainer(
            accelerator=config.device,
            devices=1,
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
            max_epochs=config.epochs - job.epochs_done,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(directory),
        )
        trainer.fit(job, train_dataloaders=loader)
    release_tables(model)
    write_tensors(directory / MODEL_FILE, model.state_dict())
    write_json(directory / LOSSES_FILE, {**identity, "epochs": job.losses, "curve": job.curve})
    for name in (_CHECKPOINT, _PREVIOUS):
        (directory / name).unlink(missing_ok=True)
    return job.losses


def embed(model: nn.Module, loader: ViewLoader, progress: Progress | None = None) -> np.ndarray:
    """Profiles of the loader's views in their order, float32 [N, E]; the model stays where it is, in evaluation mode.

    Raises:
        ValueError: a loader that shuffles.
    """
    if loader.shuffle_seed is not None:
        raise ValueError(f"embed: loader must keep the order of its views, got shuffle_seed {loader.shuffle_seed}")
    device = next(model.parameters()).device
    model.eval()
    parts = []
    with torch.inference_mode():
        for step, batch in enumerate(loader, start=1):
            parts.append(model(batch.to(device)).float().cpu().numpy())
            if progress is not None:
                progress(step, len(loader))
    check_deferred()
    width: Any = model.embedding_width
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)


class _Job(lightning.LightningModule):
    """One model being trained: resumes, seeds epochs, switches the optimizer, records losses, writes checkpoints."""

    def __init__(
        self,
        model: nn.Module,
        loader: ViewLoader,
        optimizer_factory: OptimizerFactory,
        config: TrainingConfig,
        directory: Path,
        identity: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.loader, self.optimizer_factory, self.config = loader, optimizer_factory, config
        self.directory, self.identity, self.progress = directory, identity, progress
        self.losses: list[dict[str, float]] = []
        self.curve: list[dict[str, float]] = []
        self._curve_start = 0
        self._resumed: dict[str, Any] | None = None
        self._terms: list[tuple[int, dict[str, Tensor]]] = []
        self._saved_at = time.monotonic()
        self._resume()
        # Before the first batch is drawn: Lightning starts iterating before it announces the epoch.
        loader.set_epoch(self.epochs_done)

    @property
    def epochs_done(self) -> int:
        return len(self.losses)

    def _resume(self) -> None:
        for name in (_CHECKPOINT, _PREVIOUS):
            try:
                state = torch.load(self.directory / name, map_location="cpu", weights_only=True)
                identity, weights = state["identity"], state["model"]
                losses, curve, optimizer = state["losses"], state["curve"], state["optimizer"]
            except _UNREADABLE:
                continue
            if identity == self.identity and _load(self.model, weights):
                self.losses, self.curve, self._resumed = losses, curve, optimizer
                return

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer_factory(self.model.parameters())
        try:
            self.optimizer = adopt_tables(optimizer, self.model, self.config.table_updates)
        except ValueError as error:  # `table_updates` that the optimizer or the tables cannot have
            raise UserError(str(error)) from error
        if self._resumed is not None:
            self.optimizer.load_state_dict(self._resumed)
            self._resumed = None
        return self.optimizer

    def transfer_batch_to_device(self, batch: ViewBatch, device: torch.device, dataloader_idx: int) -> ViewBatch:
        return batch.to(device)

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, self.epochs_done]).generate_state(1)[0]))
        self.model.train()
        _switch(self.optimizer, is_training=True)

    def configure_gradient_clipping(self, *_: object, **__: object) -> None:
        if self.config.gradient_clip_norm is not None:
            # Probes watch: their gradients must not shorten those of the model.
            own = (part for name, part in self.model.named_parameters() if not name.startswith("probes."))
            clip_gradient_norm(own, self.config.gradient_clip_norm)

    def training_step(self, batch: ViewBatch, batch_index: int) -> Tensor:
        terms = self.model.loss(batch)
        values = torch.stack(list(terms.values()))
        if not values.detach().isfinite().all():
            name, term = next((name, term.item()) for name, term in terms.items() if not term.isfinite())
            raise FloatingPointError(
                f"fit: {name} must stay finite, got {term} in epoch {self.epochs_done}, step {batch_index};"
                " use a smaller learning rate or precision='fp32'"
            )
        self._terms.append((batch.num_views, dict(zip(terms, values.detach().unbind(), strict=True))))
        return values.sum()

    def on_train_batch_end(self, outputs: object, batch: ViewBatch, batch_index: int) -> None:
        steps = len(self.loader)
        done, total = self.epochs_done * steps + batch_index + 1, self.config.epochs * steps
        part = self._terms[self._curve_start :]
        if len(part) >= -(-total // CURVE_POINTS) or batch_index + 1 == steps:
            self.curve.append({"epoch": done / steps, **_mean_terms(part)})
            self._curve_start = len(self._terms)
        if self.progress is not None:
            self.progress(done, total)

    def on_train_epoch_end(self) -> None:
        check_deferred()  # a wrong value on a GPU ends the training before it is written
        _switch(self.optimizer, is_training=False)
        metrics: dict[str, float] = getattr(self.model, "epoch_metrics", dict)()
        self.losses.append({"epoch": float(self.epochs_done), **_mean_terms(self._terms), **metrics})
        self._terms, self._curve_start = [], 0
        self.loader.set_epoch(self.epochs_done)
        is_last = self.epochs_done == self.config.epochs
        if not is_last and time.monotonic() - self._saved_at >= self.config.checkpoint_every_s:
            self._checkpoint()

    def _checkpoint(self) -> None:
        state = {"identity": self.identity, "losses": self.losses, "curve": self.curve}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        current = self.directory / _CHECKPOINT
        if current.exists():
            os.replace(current, self.directory / _PREVIOUS)
        write_atomically(current, lambda path: torch.save(state, path))
        self._saved_at = time.monotonic()


def _switch(optimizer: torch.optim.Optimizer, *, is_training: bool) -> None:
    """Schedule-free optimizers train on other weights than those to be used; others have no such mode."""
    getattr(optimizer, "train" if is_training else "eval", lambda: None)()


def _mean_terms(terms: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    counts = torch.tensor([count for count, _ in terms], dtype=torch.float64)
    means = {}
    for name in terms[0][1]:
        values = torch.stack([part[name] for _, part in terms]).double().cpu()
        means[name] = float((values * counts).sum() / counts.sum())
    return {"loss": sum(means.values()), **means}


def _identity(
    model: nn.Module, loader: ViewLoader, optimizer_factory: OptimizerFactory, config: TrainingConfig
) -> dict[str, Any]:
    """What has to be the same for a training to be continued, as JSON holds it."""
    training = asdict(config)
    training.pop("checkpoint_every_s")
    optimizer = optimizer_factory([nn.Parameter(torch.zeros(1))])
    shapes = str([(name, tuple(part.shape), part.dtype) for name, part in model.state_dict().items()])
    return {
        "model": f"{type(model).__name__}({getattr(model, 'config', '')})",
        "weights": hashlib.blake2b(shapes.encode(), digest_size=8).hexdigest(),
        "optimizer": f"{type(optimizer).__name__}({optimizer.defaults})",
        "training": training,
        "views": loader.num_views,
        "steps_per_epoch": len(loader),
    }


def _load_finished(model: nn.Module, directory: Path, identity: dict[str, Any]) -> list[dict[str, float]] | None:
    try:
        record = load_json(directory / LOSSES_FILE)
        epochs, _ = record.pop("epochs"), record.pop("curve")
        weights = load_tensors(directory / MODEL_FILE)
    except _UNREADABLE:
        return None
    return epochs if record == identity and _load(model, weights) else None


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Takes over all weights, or none: False when a name, shape or dtype differs."""
    own = model.state_dict()
    fits = {name: (part.shape, part.dtype) for name, part in weights.items()} == {
        name: (part.shape, part.dtype) for name, part in own.items()
    }
    if fits:
        model.load_state_dict(weights)
    return fits


def _cuda_devices(config: TrainingConfig) -> list[int]:
    return [torch.cuda.current_device()] if config.device != "cpu" and torch.cuda.is_available() else []


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning announces devices and tips through logging; a stage reports through `progress` only."""
    deprecated_inside_lightning = r".*LeafSpec.*is deprecated"
    levels = {one: one.level for one in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric", "lightning"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=deprecated_inside_lightning, category=FutureWarning)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
