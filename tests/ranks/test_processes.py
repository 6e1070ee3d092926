"""An evaluation dealt out to processes gives the bytes of one; where a process ends, the next one goes on."""

from __future__ import annotations

import atexit
import os
import time
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


def second_ends(work: Any, kept: Path, rank: int, world: int, progress: Any) -> None:
    """The second process ends at once when the first has left a score."""
    if rank == 1:
        while not list(kept.glob("*.json")):
            time.sleep(0.01)
        os._exit(9)
    work(rank, world, progress)


def test_scores_of_processes_are_those_of_one_process(tmp_path: Path) -> None:
    events, kept = tmp_path / "events", tmp_path / "kept"
    Challenge(dir=str(GOLDEN / "small")).prepare(events)
    steps: list[tuple[int, int]] = []

    work = partial(keep_share, partial(load, events), CONFIG, "cpu", False, kept)

    def scored(work: Any) -> None:
        deal_out(work, Processes(2, "cpu", 2), lambda *pair: steps.append(pair), "evaluate", "with the next task")

    with pytest.raises(UserError, match=r"process 2 of 2 ended: .*; the same command continues with the next task"):
        scored(partial(second_ends, work, kept))
    finished = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    assert finished
    scored(work)
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


def dies_at_its_end(folder: Path, rank: int, world: int, progress: Any) -> None:
    """As a process does whose interpreter ends while a thread of a group still holds a tensor."""
    atexit.register(os.abort)
    (folder / str(rank)).write_text(f"{rank} of {world}", encoding="utf-8")


def test_work_that_is_done_is_no_error_however_its_process_would_end(tmp_path: Path) -> None:
    deal_out(partial(dies_at_its_end, tmp_path), Processes(2, "cpu", 2), lambda *_: None, "evaluate", "")
    assert sorted(file.read_text(encoding="utf-8") for file in tmp_path.iterdir()) == ["0 of 2", "1 of 2"]
