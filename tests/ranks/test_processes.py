"""An evaluation dealt out to processes gives the bytes of one; where a process ends, the next one goes on."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ubp_fast.evaluation import EvaluationConfig, Targets, build_targets, evaluate
from ubp_fast.evaluation.evaluator import keep_share
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import UserError
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.profiles import Profiles
from ubp_fast.ranks.processes import Processes, deal_out

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = EvaluationConfig(tasks=("churn", "conversion", "propensity_price"), orders=2, epochs=1)


def load(directory: Path) -> tuple[Profiles, Targets]:
    profiles = Profiles.load(GOLDEN / "f_embeddings")
    return profiles, build_targets(EventDirectory.open(directory), profiles.client_ids)


def load_in_one(directory: Path) -> tuple[Profiles, Targets]:
    """Of two processes the second ends at once, when the first has left a score."""
    if torch.multiprocessing.current_process().name.endswith("-2"):
        while not list((directory.parent / "kept").glob("*.json")):
            pass
        os._exit(9)
    return load(directory)


def test_scores_of_processes_are_those_of_one_process(tmp_path: Path) -> None:
    events, kept = tmp_path / "events", tmp_path / "kept"
    Challenge(dir=str(GOLDEN / "small")).prepare(events)
    steps: list[tuple[int, int]] = []

    def scored(load: Any) -> None:
        work = partial(keep_share, load, CONFIG, "cpu", False, kept)
        deal_out(work, Processes(2, "cpu", 2), lambda *pair: steps.append(pair), "evaluate", "with the next task")

    with pytest.raises(UserError, match=r"process 2 of 2 ended: .*; the same command continues with the next task"):
        scored(partial(load_in_one, events))
    finished = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    assert finished
    scored(partial(load, events))
    assert len(list(kept.glob("*.json"))) == 6
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "they were trained again"
    assert all(done <= total for done, total in steps)
    profiles, targets = load(events)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain = evaluate(profiles, targets, CONFIG)
    finally:
        torch.set_num_threads(threads)
    assert evaluate(profiles, targets, CONFIG, keep=kept).to_json() == plain.to_json()
    assert not kept.exists()
