"""Training and inference of every model: the one place with Lightning.

What a step draws follows from (seed, epoch, step) and the numbers of its rows alone, whoever has them. A checkpoint,
written every few minutes, holds all that decides the steps behind it: weights and optimizer as they lie in memory, the
place in the epoch. So a run that was killed and
continued ends with the same bytes as an undisturbed one. The checkpoint before is kept until the next is complete. With
a validation loader the weights of the best epoch are the result, not those of the last step.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import lightning
import lightning.pytorch.loggers as lightning_loggers
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.files import (
    clear_directory,
    create_array,
    load_json,
    load_tensors,
    save_array,
    write_atomically,
    write_json,
)
from ubp_fast.kernels import BackendUnavailable, CapturedStep, check_deferred
from ubp_fast.models.layers.auroc import BinnedAuroc
from ubp_fast.optim import RowSparseEmbedding, TableUpdates, adopt_tables, clip_gradient_norm, release_tables
from ubp_fast.optim.ranks import divided, regrouped, return_gradients, sum_gradients, whole_state, write_whole
from ubp_fast.optim.table_optimizer import TableOptimizer
from ubp_fast.progress import Progress
from ubp_fast.ranks.files import Fetch, seen_by_all, sending_device
from ubp_fast.sequences.batch import ViewBatch
from ubp_fast.sequences.loader import ViewLoader

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
ModuleT = TypeVar("ModuleT", bound=nn.Module)

MODEL_FILE, LOSSES_FILE, LOGS = "model.safetensors", "losses.json", "logs"
CURVE_POINTS = 60
TRIM_EVERY = 8  # steps
# The sum of their AUROCs says which epoch is the best; docs/winner.md 4.7.
SELECTION_LABELS = ("churn", "buy_sku", "buy_category")
_CHECKPOINT, _ROWS = "checkpoint.pt", "rows-{}.pt"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a damaged checkpoint, model or record makes its reader raise.
_UNREADABLE = (OSError, EOFError, RuntimeError, KeyError, ValueError, UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class TrainingConfig:
    """How long and in which way a model is trained."""

    epochs: int = 1  # passes over all views; docs/winner.md 6 (stacking)
    batch_size: int = 128  # client views per step; docs/winner.md 4.7
    seed: int = 0  # of initial weights, order and dropout
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # bf16: products in bfloat16, weights float32; auto: on a GPU
    device: Literal["cpu", "cuda", "auto"] = "cpu"  # auto takes a GPU when there is one
    gradient_clip_norm: float | None = None  # largest gradient norm; none in docs/winner.md 4.7 and 6
    checkpoint_every_s: float = 300.0  # seconds between checkpoints, inside of epochs, too
    table_updates: TableUpdates = "auto"  # of large tables: only rows in use where that is exact, see `adopt_tables`
    max_steps: int | None = None  # of every epoch at most, for rehearsals; None: as many as the views give; ours
    validation_views: int = 0  # of the window after training, scored after every epoch; docs/winner.md 4.7; 0: none
    patience: int | None = None  # epochs without a better one after which the training ends; None: never; ours
    cuda_graph: bool = False  # every step of a GPU is one launch, on batches of fixed sizes, see `CapturedStep`; ours
    logger: Literal["csv", "tensorboard"] | None = None  # writes losses and metrics to `logs` while it trains; ours

    def __post_init__(self) -> None:
        if self.patience is not None and (self.patience < 1 or not self.validation_views):
            raise UserError(
                "TrainingConfig: patience must be >= 1 with validation_views, or null, got"
                f" {self.patience} and {self.validation_views} views"
            )


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
    validation: ViewLoader | None = None,
    group: ProcessGroup | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place; leaves `model.safetensors` and `losses.json` in `directory`.

    `losses.json`: `epochs`, what is returned, and `curve`, means over about `CURVE_POINTS` parts of the training.
    Called again with a directory that holds a checkpoint of the same training, it continues; with a finished one, it
    only loads. An unreadable checkpoint, and one of another model (initial weights included), optimizer, training or
    data (`ViewLoader.digest`), is passed over, and leaves the model as it is. A full disk costs the checkpoint that
    does not fit and gives a warning; the last complete one stays.

    Args:
        model: has `loss(batch) -> dict of terms`; their sum is minimised. What its `epoch_metrics()` gives, if it has
            any, is recorded after every epoch.
        loader: training batches; its `set_epoch` is called before each pass.
        optimizer_factory: parameters -> optimizer. Schedule-free ones are switched between training and evaluation.
        config: epochs, seed, precision, device.
        directory: for checkpoints and results, created when missing.
        progress: called as progress(steps done, steps in all) after every step.
        validation: batches with labels, scored after every epoch by the model's `label_logits(batch)`: the weights of
            the epoch with the largest sum of AUROCs of `SELECTION_LABELS` are the result, and the training ends when
            none of the last `patience` epochs is better. None: those of the last step.
        group: processes of `torch.distributed` that train as one: all call this with the same arguments and the same
            directory, each takes its part of every batch, and all end with the same weights, those of one process to
            rounding, dropout included. The first one writes. A checkpoint of one
            number of processes is continued by any other. Tables that were made inside `divided_tables(group)` stay
            divided: no process holds one whole, `model.safetensors` does.

    Returns:
        Per epoch: `epoch` (from 0), `loss` (sum of the terms) and each term, means over the views; metrics, among them
        `valid_auroc_<label>` and `valid_score` with a validation loader.

    Raises:
        DataError: a loader without views.
        UserError: `table_updates` that this optimizer cannot have.
        UserError: `cuda_graph` without a GPU, in several processes, with tables whose rows alone are updated, or with a
            model that follows from the lengths of its sequences.
        UserError: a loss that is not finite; divided tables in a directory that a process does not see.
    """
    if not len(loader):
        raise DataError("fit: loader must have at least one view, got none; use an earlier cutoff or more data")
    if config.cuda_graph and group is not None:
        raise UserError("fit: cuda_graph must be false for several processes, got true; set it to false")
    if group is not None:
        loader.share(dist.get_rank(group), dist.get_world_size(group))
    if _is_first(group):
        directory.mkdir(parents=True, exist_ok=True)
    identity = _identity(model, loader, optimizer_factory, config, validation, group)
    _require_same(identity, group)
    with seen_by_all(directory, group) as fetch:
        return _fit(model, loader, optimizer_factory, config, directory, identity, progress, validation, group, fetch)


def _fit(
    model: nn.Module,
    loader: ViewLoader,
    optimizer_factory: OptimizerFactory,
    config: TrainingConfig,
    directory: Path,
    identity: dict[str, Any],
    progress: Progress | None,
    validation: ViewLoader | None,
    group: ProcessGroup | None,
    fetch: Fetch,
) -> list[dict[str, float]]:
    is_first = _is_first(group)
    if divided(model) and not _by_all(fetch(()) == directory, group):
        raise UserError(f"fit: divided tables need a directory that all processes see, got {directory}")
    finished = _load_finished(model, fetch((LOSSES_FILE, MODEL_FILE)), identity)
    _wait(group)  # until all have looked, none changes what they look at
    if finished is not None:
        if is_first:
            _clear(directory)
        if progress is not None:
            steps = config.epochs * _steps(loader, config)
            progress(steps, steps)
        return finished
    device = on_device(config.device)
    is_low = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    with _quiet_lightning(), torch.random.fork_rng(devices=_cuda_devices(config)):
        job = _Job(model, loader, optimizer_factory, config, directory, identity, progress, validation, group, fetch)
        _wait(group)
        torch.manual_seed(config.seed)  # what an optimizer draws is the training's own, and the same in all processes
        trainer = lightning.Trainer(
            accelerator=device.type,
            devices=1,
            precision="bf16-mixed" if is_low else "32-true",
            max_epochs=config.epochs - job.epochs_done,
            reload_dataloaders_every_n_epochs=1,  # the first one may be the rest of an epoch
            logger=job.log_steps or False,
            log_every_n_steps=1,  # of what Lightning itself would log: nothing
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(directory),
        )
        loader.pins = device.type == "cuda"
        loader.fills = loader.fixed_sizes() if config.cuda_graph else None
        try:
            trainer.fit(job)
        except SystemExit as stop:
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            # Lightning would end the process, which a notebook does not want.
            raise stop.__context__ from None
    if 0 <= job.best_epoch < job.epochs_done - 1:
        best = _best_file(job.best_epoch)
        model.load_state_dict(load_tensors(fetch([best]) / best))
    _wait(group)
    write_whole(directory / MODEL_FILE, model, is_first)
    if is_first:
        write_json(directory / LOSSES_FILE, {**identity, "epochs": job.losses, "curve": job.curve})
        _clear(directory)
    _wait(group)
    return job.losses


def _is_first(group: ProcessGroup | None) -> bool:
    return group is None or dist.get_rank(group) == 0


def _require_same(identity: dict[str, Any], group: ProcessGroup | None) -> None:
    """Raises UserError where processes would train something else than the first."""
    if group is None:
        return
    text = json.dumps(identity, sort_keys=True).encode()
    mine = torch.tensor(list(hashlib.blake2b(text, digest_size=7).digest()), device=sending_device(group))
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    others = [rank for rank, one in enumerate(found) if not torch.equal(one, found[0])]
    if others:
        raise UserError(
            f"fit: all processes must have the same model, settings and data, got others in process {others[0] + 1} of"
            f" {len(found)}; let all read one root on a disk that they share"
        )


def _by_all(answer: bool, group: ProcessGroup | None) -> bool:
    """Whether it is the answer of all processes."""
    answers = torch.tensor([int(answer)])
    if group is not None:
        dist.all_reduce(answers, op=dist.ReduceOp.MIN, group=group)
    return bool(answers)


def _wait(group: ProcessGroup | None) -> None:
    """Until all processes are here."""
    if group is not None:
        dist.barrier(group=group)


def on_device(name: str) -> torch.device:
    """The device that a configuration names: "cpu", "cuda", or "auto", a GPU when there is one.

    Raises:
        UserError: a GPU where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"compute: device must be one that this machine has, got '{name}'; use compute=cpu or auto")
    return torch.device(name)


def embed(
    model: nn.Module,
    loader: ViewLoader,
    progress: Progress | None = None,
    *,
    dtype: type[np.floating[Any]] = np.float32,
    file: Path | None = None,
) -> np.ndarray:
    """Profiles of the loader's views in their order, [N, E]; the model stays where it is, in evaluation mode.

    Args:
        model: called as model(batch).
        loader: keeps the order of its views.
        progress: called as progress(batches done, batches in all).
        dtype: np.float32 or np.float16.
        file: an npy file that the result is written to, and mapped from; None: it is in memory.

    Raises:
        ValueError: a loader that shuffles.
        DataError: a value that is not finite in this dtype.
    """
    if loader.shuffle_seed is not None:
        raise ValueError(f"embed: loader must keep the order of its views, got shuffle_seed {loader.shuffle_seed}")
    device = next(model.parameters()).device
    model.eval()
    width: Any = model.embedding_width
    shape = (loader.num_views, width)
    vectors = np.empty(shape, dtype) if file is None or not loader.num_views else create_array(file, dtype, shape)
    first = 0
    with torch.inference_mode():
        for step, batch in enumerate(loader, start=1):
            rows = model(batch.to(device)).float().cpu().numpy()
            with np.errstate(over="ignore"):
                vectors[first : first + len(rows)] = rows
            bad = ~np.isfinite(vectors[first : first + len(rows)])
            if bad.any():
                row, column = np.argwhere(bad)[0]
                raise DataError(
                    f"embed: vectors must be finite in {np.dtype(dtype).name}, got {rows[row, column]} in row"
                    f" {first + row}, column {column}; look for a diverged training"
                )
            first += len(rows)
            if step % TRIM_EVERY == 0:
                give_back_memory()
            if progress is not None:
                progress(step, len(loader))
    check_deferred()
    if file is not None:
        if not loader.num_views:
            save_array(file, vectors)
        return np.load(file, mmap_mode="r", allow_pickle=False)
    return vectors


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
        validation: ViewLoader | None,
        group: ProcessGroup | None,
        fetch: Fetch,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.validation = validation
        self.loader, self.optimizer_factory, self.config = loader, optimizer_factory, config
        self.directory, self.identity, self.progress = directory, identity, progress
        self.losses: list[dict[str, float]] = []
        self.curve: list[dict[str, float]] = []
        self._curve_start = 0
        self._resumed: dict[str, Any] | None = None
        self.divided = divided(model)  # weights of which every process has some rows
        self._terms: list[tuple[int, dict[str, Tensor]]] = []
        self._saved_at = time.monotonic()
        self._best_saved = -1  # that of the checkpoint
        self._rankings: dict[str, BinnedAuroc] = {}
        self._captured: CapturedStep[ViewBatch] | None = None
        if config.cuda_graph:
            self._captured = CapturedStep(lambda batch: self.model.loss(batch), model)
        self._resume(fetch)
        self.log_steps = _logger(config.logger, directory / LOGS) if self.rank == 0 else None
        for part in self.curve:  # what came before is told again: one file for the whole training
            self._log(part)
        for epoch in self.losses:
            self._log_epoch(epoch)
        # Before the first batch is drawn: Lightning starts iterating before it announces the epoch.
        loader.set_epoch(self.epochs_done, self.step)

    @property
    def epochs_done(self) -> int:
        return len(self.losses)

    @property
    def step(self) -> int:
        """Steps done in the epoch."""
        return len(self._terms)

    @property
    def best_epoch(self) -> int:
        """The first one with the largest score; -1 when none was scored."""
        return _best_epoch(self.losses)

    def _resume(self, fetch: Fetch) -> None:
        """Reads the checkpoint, and takes it where all of it fits; the model itself waits for the first step."""
        try:
            # Mapped: weights and optimizer are not twice in memory.
            place = fetch([_CHECKPOINT]) / _CHECKPOINT
            state = torch.load(place, map_location="cpu", weights_only=True, mmap=True)
            best = _best_epoch(state["losses"])
            if state["identity"] != self.identity or (
                best >= 0 and not (fetch([_best_file(best)]) / _best_file(best)).exists()
            ):
                return
            apart = state["tables_apart"]
            if not _fits(self.model, state["model"], apart["names"]):
                return
            parts = [
                torch.load(self.directory / name, map_location="cpu", weights_only=True, mmap=True)
                for name in apart["files"]
            ]
            # A copy: what stays mapped keeps a checkpoint that was replaced on the disk.
            values = state["values"].to(on_device(self.config.device), copy=True)
            terms = [dict(zip(state["terms"], one.unbind(), strict=True)) for one in values.unbind()]
            kept = list(zip(state["views"], terms, strict=True))
            losses, curve, curve_start = state["losses"], state["curve"], state["curve_start"]
        except _UNREADABLE:
            return
        self._resumed, self._terms, self._best_saved = {**state, "parts": parts}, kept, best
        self.losses, self.curve, self._curve_start = losses, curve, curve_start

    def train_dataloader(self) -> _Rest:
        return _Rest(self.loader, _steps(self.loader, self.config) - self.step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer_factory(self.model.parameters())
        try:
            self.optimizer = adopt_tables(optimizer, self.model, self.config.table_updates)
        except ValueError as error:  # `table_updates` that the optimizer or the tables cannot have
            raise UserError(str(error)) from error
        if self._captured is not None and isinstance(self.optimizer, TableOptimizer):
            raise UserError(
                "fit: cuda_graph must be false where the rows in use of a table alone are updated, which takes another"
                " number of steps every time, got true; set it to false, or table_updates=dense and table_dtype=float32"
            )
        return self.optimizer

    def transfer_batch_to_device(self, batch: ViewBatch, device: torch.device, dataloader_idx: int) -> ViewBatch:
        return replace(batch.to(device), group=self.group)

    def on_train_epoch_start(self) -> None:
        if self._resumed is not None:
            self._restore(self._resumed)
            self._resumed = None
        self.model.train()
        _switch(self.optimizer, is_training=True)

    def _restore(self, state: dict[str, Any]) -> None:
        """Model and optimizer as they were; nothing reads a table between this and the next step."""
        rank, world = (self.rank, dist.get_world_size(self.group)) if self.divided else (0, 1)
        weights, of_optimizer = dict(state["model"]), state["optimizer"]
        if isinstance(self.optimizer, TableOptimizer):
            parts = state["parts"] or [_table_parts(weights, of_optimizer["tables"], self._table_names())]
            of_tables = [regrouped(one, rank, world) for one in zip(*parts, strict=True)]
            weights |= {name: part["weight"] for name, part in zip(self._table_names(), of_tables, strict=True)}
            self.optimizer.load_exact_state({**of_optimizer, "tables": of_tables})
        else:
            self.optimizer.load_state_dict(deepcopy(of_optimizer))
        with _rows_as_they_lie():
            self.model.load_state_dict(weights)
            for name, values in _unsaved_buffers(self.model).items():
                values.copy_(state["buffers"][name])
        self._leave_rankings_to_the_first()

    def on_after_backward(self) -> None:
        if self.group is not None:
            return_gradients(self.divided.values())
            sum_gradients((part for part in self.model.parameters() if part not in self.divided), self.group)

    def _own_rankings(self) -> list[BinnedAuroc]:
        return [part for part in self.model.modules() if isinstance(part, BinnedAuroc)]

    def _sum_rankings(self) -> None:
        """What probes have counted in all processes."""
        for ranking in self._own_rankings() if self.group is not None else ():
            dist.all_reduce(ranking.counts, group=self.group)

    def _leave_rankings_to_the_first(self) -> None:
        for ranking in self._own_rankings() if self.rank else ():
            ranking.counts.zero_()

    def configure_gradient_clipping(self, *_: object, **__: object) -> None:
        if self.config.gradient_clip_norm is not None:
            # Probes watch: their gradients must not shorten those of the model.
            own = (part for name, part in self.model.named_parameters() if not name.startswith("probes."))
            clip_gradient_norm(own, self.config.gradient_clip_norm, self.divided)

    def training_step(self, batch: ViewBatch, batch_index: int) -> Tensor:
        seeds = [self.config.seed, self.epochs_done, self.step]
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        terms = self._terms_of(batch)
        values = torch.stack(list(terms.values()))
        if values.device.type == "cpu":  # elsewhere looking at them would wait for the device in every step
            _require_finite({name: term.item() for name, term in terms.items()}, self.epochs_done, self.step)
        self._terms.append(
            (batch.all_views or batch.num_views, dict(zip(terms, values.detach().unbind(), strict=True)))
        )
        return values.sum()

    def _terms_of(self, batch: ViewBatch) -> dict[str, Tensor]:
        try:
            terms: dict[str, Tensor] = (self._captured or self.model.loss)(batch)
            return terms
        except BackendUnavailable as error:
            raise UserError(f"fit: cuda_graph must be false here, got true: {error}") from error

    def optimizer_zero_grad(self, *arguments: Any, **options: Any) -> None:
        if self._captured is None:
            super().optimizer_zero_grad(*arguments, **options)

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        if self._captured is None:  # else the gradients came with the terms
            super().backward(loss, *arguments, **options)

    def on_train_batch_end(self, outputs: object, batch: ViewBatch, batch_index: int) -> None:
        steps = _steps(self.loader, self.config)
        done, total = self.epochs_done * steps + self.step, self.config.epochs * steps
        part = self._terms[self._curve_start :]
        if len(part) >= -(-total // CURVE_POINTS) or self.step == steps:
            means = _mean_terms(part)
            _require_finite(means, self.epochs_done, self.step - 1)
            self.curve.append({"epoch": done / steps, **means})
            self._log(self.curve[-1])
            self._curve_start = self.step
        if batch_index % TRIM_EVERY == 0:
            give_back_memory()
        if self.progress is not None:
            self.progress(done, total)
        if self.step < steps:  # the last one belongs to the end of the epoch
            self._checkpoint_when_due()

    def on_train_epoch_end(self) -> None:
        check_deferred()  # a wrong value on a GPU ends the training before it is written
        _switch(self.optimizer, is_training=False)
        self._sum_rankings()
        metrics: dict[str, float] = getattr(self.model, "epoch_metrics", dict)()
        metrics |= self._validate()
        self.losses.append({"epoch": float(self.epochs_done), **_mean_terms(self._terms), **metrics})
        self._log_epoch(self.losses[-1])
        self._terms, self._curve_start = [], 0
        is_best = self.best_epoch == self.epochs_done - 1
        self.loader.set_epoch(self.epochs_done)
        patience = self.config.patience
        is_last = self.epochs_done == self.config.epochs
        if not is_last and patience is not None and 0 <= self.best_epoch < self.epochs_done - patience:
            self.trainer.should_stop = is_last = True
            if self.progress is not None:
                total = self.config.epochs * _steps(self.loader, self.config)
                self.progress(total, total)
        if is_best and not is_last:
            write_whole(self.directory / _best_file(self.best_epoch), self.model, self.rank == 0)
        if is_best and not is_last and self.rank == 0:
            self._keep_best_files(self.best_epoch, self._best_saved)
        if not is_last:
            self._checkpoint_when_due()

    def _log(self, part: Mapping[str, float]) -> None:
        """Mean loss terms of a part of the training, at the step where it ends."""
        if self.log_steps is not None:
            step = round(part["epoch"] * _steps(self.loader, self.config))
            self.log_steps.log_metrics(dict(part), step)
            self.log_steps.save()

    def _log_epoch(self, epoch: Mapping[str, float]) -> None:
        """The means and metrics of an epoch, at its last step; their names begin with `epoch_`."""
        means = {f"epoch_{name}": value for name, value in epoch.items() if name != "epoch"}
        self._log({"epoch": epoch["epoch"] + 1, **means})

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        self.model.eval()
        device = next(self.model.parameters()).device
        for batch in self.validation:
            moved = batch.to(device)
            for name, logits in self.model.label_logits(moved).items():
                ranking = self._rankings.setdefault(name, BinnedAuroc(logits.shape[1]).to(device))
                ranking.add(logits, moved.labels[name].reshape(logits.shape))
        found = {name: area for name, ranking in self._rankings.items() if (area := ranking.take()) is not None}
        score = {"valid_score": sum(found.get(name, 0.0) for name in SELECTION_LABELS)} if found else {}
        return {f"valid_auroc_{name}": area for name, area in found.items()} | score

    def on_train_end(self) -> None:
        release_tables(self.model)  # while weights and rows are on one device: what comes next moves the module

    def _checkpoint_when_due(self) -> None:
        is_due = time.monotonic() - self._saved_at >= self.config.checkpoint_every_s
        if self.group is not None:  # by the clock of the first
            told = torch.tensor([int(is_due and self.rank == 0)], device=next(self.model.parameters()).device)
            dist.all_reduce(told, group=self.group)
            is_due = bool(told)
        if not is_due:
            return
        self._sum_rankings()
        self._leave_rankings_to_the_first()
        if self.rank and not self.divided:
            return
        check_deferred()  # a wrong value on a GPU is not written
        files, error = self._write_parts()
        if self.rank:
            return
        try:
            if error is not None:
                raise error
            write_atomically(self.directory / _CHECKPOINT, partial(self._write_checkpoint, files))
        except OSError as found:
            if found.errno not in _DISK_FULL:
                raise
            warnings.warn(
                f"{self.directory}: no room for a checkpoint ({found.strerror}); the training goes on, and after a stop"
                " from the last complete one; free some space",
                stacklevel=2,
            )
        else:
            self._best_saved = self.best_epoch
            self._keep_best_files(self.best_epoch)
            for path in self.directory.glob(_ROWS.format("*")):
                if path.name not in files:
                    path.unlink()
        self._saved_at = time.monotonic()

    def _table_names(self) -> list[str]:
        """The tables that a row-sparse optimizer steps, in its order."""
        return [
            f"{path}.weight" for path, module in self.model.named_modules() if isinstance(module, RowSparseEmbedding)
        ]

    def _write_parts(self) -> tuple[list[str], OSError | None]:
        """Every process's rows of divided tables; the names of all files, or what a full disk said of one of them."""
        if not self.divided:
            return [], None
        assert isinstance(self.optimizer, TableOptimizer) and self.group is not None
        world, error = dist.get_world_size(self.group), None
        files = [_ROWS.format(f"{self.epochs_done}-{self.step}-{rank}-of-{world}") for rank in range(world)]
        with _rows_as_they_lie():
            weights = self.model.state_dict()
        part = _table_parts(weights, self.optimizer.exact_state()["tables"], self._table_names())
        try:
            write_atomically(self.directory / files[self.rank], partial(_save, part))
        except OSError as found:
            if found.errno not in _DISK_FULL:
                raise
            error = found
        code = torch.tensor([0 if error is None else error.errno], device=next(self.model.parameters()).device)
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=self.group)
        if number := int(code):
            (self.directory / files[self.rank]).unlink(missing_ok=True)
            error = error or OSError(number, os.strerror(number))
        return files, error

    def _keep_best_files(self, *epochs: int) -> None:
        for path in self.directory.glob(_best_file("*")):
            if path.name not in map(_best_file, epochs):
                path.unlink()

    def _write_checkpoint(self, files: list[str], path: Path) -> None:
        """All but the rows that lie in `files`."""
        optimizer = self.optimizer
        of_optimizer = optimizer.exact_state() if isinstance(optimizer, TableOptimizer) else optimizer.state_dict()
        with _rows_as_they_lie():
            weights, buffers = dict(self.model.state_dict()), _unsaved_buffers(self.model)
        apart = self._table_names() if files else []
        if files:
            of_optimizer["tables"] = []
            weights = {name: part for name, part in weights.items() if name not in apart}
        values = [torch.stack(list(terms.values())) for _, terms in self._terms]
        state = {
            "identity": self.identity,
            "losses": self.losses,
            "curve": self.curve,
            "curve_start": self._curve_start,
            "terms": list(self._terms[0][1]) if self._terms else [],
            "values": torch.stack(values).cpu() if values else torch.empty(0, 0),
            "views": [views for views, _ in self._terms],
            "tables_apart": {"files": files, "names": apart},
            "model": weights,
            "buffers": buffers,
            "optimizer": of_optimizer,
        }
        _save(state, path)


@dataclass(frozen=True)
class _Rest:
    """So many batches of an epoch, from where the loader stands."""

    loader: ViewLoader
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[ViewBatch]:
        yield from islice(self.loader, self.steps)


def _save(state: Any, path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a file that takes no more
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _table_parts(weights: Mapping[str, Tensor], exact: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Weight and exact state of each table as one."""
    return [{"weight": weights[name], **state} for name, state in zip(names, exact, strict=True)]


def _logger(kind: str | None, directory: Path) -> Any:
    """A logger of Lightning that begins anew; None without one.

    Raises:
        UserError: a package that it needs is not installed.
    """
    if kind is None:
        return None
    clear_directory(directory)
    place = {"save_dir": str(directory.parent), "name": "", "version": directory.name}
    if kind == "csv":
        return lightning_loggers.CSVLogger(**place)  # type: ignore[arg-type]
    try:
        return lightning_loggers.TensorBoardLogger(**place)  # type: ignore[arg-type]
    except ImportError as error:
        raise UserError(
            f"training: logger 'tensorboard' is unavailable: {error}; pip install tensorboard, or take 'csv'"
        ) from error


def _best_file(epoch: int | str) -> str:
    return f"best-{epoch}.safetensors"


def _best_epoch(losses: list[dict[str, float]]) -> int:
    scores = [epoch.get("valid_score", -1.0) for epoch in losses]
    return scores.index(max(scores)) if scores and max(scores) >= 0 else -1


def _steps(loader: ViewLoader, config: TrainingConfig) -> int:
    """Of one epoch."""
    return len(loader) if config.max_steps is None else min(config.max_steps, len(loader))


def _switch(optimizer: torch.optim.Optimizer, *, is_training: bool) -> None:
    """Schedule-free optimizers train on other weights than those to be used; others have no such mode."""
    getattr(optimizer, "train" if is_training else "eval", lambda: None)()


def _require_finite(terms: Mapping[str, float], epoch: int, step: int) -> None:
    for name, term in terms.items():
        if not math.isfinite(term):
            raise UserError(
                f"fit: {name} must stay finite, got {term} in epoch {epoch}, step {step};"
                " use a smaller learning rate or precision='fp32'"
            )


def _mean_terms(terms: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    counts = torch.tensor([count for count, _ in terms], dtype=torch.float64)
    means = {}
    for name in terms[0][1]:
        values = torch.stack([part[name] for _, part in terms]).double().cpu()
        means[name] = float((values * counts).sum() / counts.sum())
    return {"loss": sum(means.values()), **means}


def _identity(
    model: nn.Module,
    loader: ViewLoader,
    optimizer_factory: OptimizerFactory,
    config: TrainingConfig,
    validation: ViewLoader | None,
    group: ProcessGroup | None,
) -> dict[str, Any]:
    """What has to be the same for a training to be continued, as JSON holds it."""
    training = asdict(config)
    for name in ("checkpoint_every_s", "logger"):
        training.pop(name)
    optimizer = optimizer_factory([nn.Parameter(torch.zeros(1))])
    weights = hashlib.blake2b(digest_size=8)
    for part in whole_state(model):
        weights.update(f"{part.name} {part.shape} {part.dtype}".encode())
        for piece in part.pieces:
            weights.update(piece.cpu().reshape(-1).view(torch.uint8).numpy().data)
    digest = torch.frombuffer(bytearray(weights.digest()), dtype=torch.uint8)
    if group is not None and divided(model):  # the first process has seen all rows
        moved = digest.to(next(model.parameters()).device)
        dist.broadcast(moved, dist.get_global_rank(group, 0), group=group)
        digest = moved.cpu()
    return {
        "model": f"{type(model).__name__}({getattr(model, 'config', '')})",
        "initial_weights": digest.numpy().tobytes().hex(),
        "optimizer": f"{type(optimizer).__name__}({optimizer.defaults})",
        "training": training,
        "data": loader.digest(),
        "validation": None if validation is None else validation.digest(),
    }


def _load_finished(model: nn.Module, directory: Path, identity: dict[str, Any]) -> list[dict[str, float]] | None:
    try:
        record = load_json(directory / LOSSES_FILE)
        epochs, _ = record.pop("epochs"), record.pop("curve")
        if record != identity or not _fits(model, weights := load_tensors(directory / MODEL_FILE)):
            return None
    except _UNREADABLE:
        return None
    model.load_state_dict(weights)
    return epochs


def _clear(directory: Path) -> None:
    """Removes what a finished training needs no more."""
    for path in (directory / _CHECKPOINT, *directory.glob(_best_file("*")), *directory.glob(_ROWS.format("*"))):
        path.unlink(missing_ok=True)


def _fits(model: nn.Module, weights: Mapping[str, Tensor], apart: Sequence[str] = ()) -> bool:
    """Whether all names, shapes and dtypes are those of the model, but for those that are kept apart."""
    return {name: (part.shape, part.dtype) for name, part in weights.items()} == {
        part.name: (part.shape, part.dtype) for part in whole_state(model) if part.name not in apart
    }


def _rows_as_they_lie() -> Any:
    """A context in which reading or writing a table's weight brings no row to the present."""
    return torch._C.DisableTorchFunctionSubclass()


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are no part of a model's state, such as counts of an epoch."""
    kept = model.state_dict().keys()
    return {name: part for name, part in model.named_buffers() if name not in kept}


def give_back_memory() -> None:
    """Returns the free pages of the C library's heap to the system, where it is glibc.

    It keeps them between what lives on. Batches differ in size, so the holes rarely fit, and the heap of a training on
    a CPU would grow to several times what is in use; after the fit of factors they are half of the process.
    """
    with suppress(AttributeError, TypeError):  # not glibc, not POSIX
        ctypes.CDLL(None).malloc_trim(0)


def _cuda_devices(config: TrainingConfig) -> list[int]:
    return [torch.cuda.current_device()] if on_device(config.device).type == "cuda" else []


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
