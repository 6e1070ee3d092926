"""One training step of the winner's models: packed and row-sparse against padded and dense."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from breakdown import cpu_ms_by_part
from contest import Contest, give_memory_back
from reference_pytorch.contrastive_step import PaddedContrastive, PaddedPair, pad_pair
from reference_pytorch.multitask_step import PaddedBatch, PaddedMultitask, pad_views
from reference_pytorch.padded import without_initialisation
from torch import Tensor, nn
from training_parts import Parts, contrastive_parts, multitask_parts, padded_contrastive_parts, padded_multitask_parts
from training_steps import (
    FEATURES,
    OUTPUTS,
    FirstStep,
    Step,
    by_onednn,
    contrastive_batch,
    in_precision,
    multitask_batches,
    our_step,
    padded_step,
    sizes_of,
    steps_alone,
)

from ubp_fast.models.contrastive import ContrastiveConfig, ContrastiveModel
from ubp_fast.models.multitask import MultitaskConfig, MultitaskModel
from ubp_fast.sequences.batch import ViewBatch


@pytest.mark.filterwarnings("ignore")  # of what PyTorch's compiler imports and decides
@pytest.mark.parametrize(
    ("share", "precision", "bar"), [(0.1, "fp32", None), (0.1, "bf16", None), (1.0, "fp32", 3.0), (1.0, "bf16", 5.0)]
)
def bench_multitask_step(contest: Contest, share: float, precision: str, bar: float | None) -> None:
    """Full vocabularies take 14 GB of memory, 10 of them for the rival; its compilation takes one to two minutes."""
    sizes, config = sizes_of(share), MultitaskConfig()
    model = MultitaskModel(config, sizes, FEATURES, OUTPUTS)
    rival = without_initialisation(lambda: PaddedMultitask(config, sizes, FEATURES, OUTPUTS)).load_from(model)
    batches = multitask_batches(sizes)
    padded = [pad_views(batch, config.history_length) for batch in batches]
    assert_same_loss(model, rival, batches[0], padded[0])
    ours, theirs = our_step(model, batches, precision), padded_step(rival, padded)
    ours(), theirs()  # their memory comes into being
    by_part = {
        "ubp_fast": cpu_ms_of(ours, model, multitask_parts(model, batches[0])),
        "rival": cpu_ms_of(theirs, rival, padded_multitask_parts(rival, padded[0])),
    }
    rivals: dict[str, tuple[Step, float | None]] = {"padded PyTorch fp32 + AdamW(fused)": (theirs, bar)}
    if precision == "bf16":
        in_bf16 = Step(rival.loss, padded, theirs.optimizer, "bf16")
        rivals["padded PyTorch bf16 autocast + AdamW(fused)"] = (in_bf16, None if bar is None else 4.0)
    else:
        for name, loss in (("by oneDNN", by_onednn(rival.loss)), ("torch.compile", torch.compile(rival.loss))):
            rivals[f"padded PyTorch fp32, {name} + AdamW(fused)"] = (Step(loss, padded, theirs.optimizer, "fp32"), None)
    contest.run(
        f"multi-task training step {precision}, {sizes.num_skus + sizes.num_urls:,} rows, batch 128",
        ours,
        rivals,
        lambda *_: None,  # both drop out at random; the losses were compared without that
        min_rounds=10,
        seconds=30,
        facts=facts([batch.history.num_tokens for batch in batches], 128 * 64, by_part),
    )


@pytest.mark.plain_glibc
def bench_contrastive_step(contest: Contest) -> None:
    """1,024 pairs: three minutes and 16 GB, nearly all of it the rival's. Futures are padded to 64 events, too.

    One step each is timed, by its CPU time, after small ones that pay for the memory of our optimizer's state. That
    of the rival's comes into being in the step, off the clock, after its activations are gone: together they would
    need 19 GB. Ours is freed before the rival runs.
    """
    sizes, config = sizes_of(1.0), ContrastiveConfig()
    model = ContrastiveModel(config, sizes)
    model.set_age_edges(np.linspace(0, 150, config.events.age_bins + 1, dtype=np.float32))
    rival = without_initialisation(lambda: PaddedContrastive(config, sizes)).load_from(model)
    batches = [contrastive_batch(sizes, clients, seed) for seed, clients in enumerate((32, 1024))]
    padded = [pad_pair(batch, config) for batch in batches]
    assert_same_loss(model, rival, batches[0], padded[0])
    ours, theirs = our_step(model, batches, "fp32"), FirstStep.of(padded_step(rival, padded[1:]), contest.off_the_clock)
    in_bf16 = Step(ours.loss, batches, ours.optimizer, "bf16")
    ours(), in_bf16()
    by_part = {"ubp_fast": cpu_ms_of(ours, model, contrastive_parts(model, batches[1]), rounds=1)}
    tokens = batches[1].history.num_tokens + batches[1].future.num_tokens
    del model

    def take_turns() -> None:
        ours.release(), in_bf16.release()
        give_memory_back()
        by_part["rival"] = cpu_ms_of(
            padded_step(rival, []), rival, padded_contrastive_parts(rival, padded[1]), rounds=1
        )
        give_memory_back()

    contest.once(
        f"contrastive training step, {sizes.num_skus + sizes.num_urls:,} rows, batch 1,024",
        {"fp32": ours, "bf16": in_bf16},
        ("padded PyTorch fp32 + AdamW(fused)", theirs),
        {"fp32": 3.0, "bf16": 5.0},
        lambda *_: None,  # as above
        facts=facts([tokens], 1024 * 128, by_part),
        before_rival=take_turns,
    )


def facts(tokens: list[int], padded_tokens: int, by_part: dict[str, dict[str, float]]) -> dict[str, Any]:
    """How much of the padded batch is real, and the parts of both steps."""
    return {
        "tokens": int(np.mean(tokens)),
        "share_of_padded": round(float(np.mean(tokens)) / padded_tokens, 3),
        "cpu_ms_by_part": by_part,
    }


def cpu_ms_of(step: Step, model: nn.Module, parts: Parts, rounds: int = 3) -> dict[str, float]:
    """Milliseconds per part of a step that was taken before."""
    return cpu_ms_by_part(*parts, step.optimizer, large_tables(model), partial(in_precision, step.precision), rounds)


def large_tables(model: nn.Module) -> list[Tensor]:
    """The weights of the tables of skus and urls."""
    return [
        module.weight for module in model.modules() if isinstance(module, nn.Embedding) and len(module.weight) > 7000
    ]


@pytest.mark.parametrize("name", ["multi-task", "contrastive"])
def bench_memory_and_start(contest: Contest, name: str) -> None:
    """Our step alone in a process of its own, at full vocabularies: 4 to 6 GB."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        start_s, peak_bytes = contest.alone(lambda: pool.submit(steps_alone, name).result())
    contest.at_most(f"{name} model, full vocabularies: peak memory of training", "GB", peak_bytes / 1e9, 10.0)
    contest.at_most(f"{name} model, full vocabularies: until the first batch", "s", start_s, 10.0)


@torch.no_grad()
def assert_same_loss(model: nn.Module, rival: nn.Module, batch: ViewBatch, padded: PaddedBatch | PaddedPair) -> None:
    """Without dropout both give one loss."""
    model.eval(), rival.eval()
    ours, theirs = sum(model.loss(batch).values()), rival.loss(padded)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    model.train(), rival.train()
