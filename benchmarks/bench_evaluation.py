"""The six tasks on real purchases against the loop that users write today, and the labels of a million clients."""

from __future__ import annotations

from functools import partial

import numpy as np
import polars as pl
import pytest
from contest import Contest
from reference_pytorch.organisers_loop import evaluate_by_loop

from ubp_fast.evaluation import TASKS, EvaluationConfig, Scores, build_targets, evaluate
from ubp_fast.events.labels import ClientRows, LabelMatrix, label_matrices
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.sources.complete_journey import CompleteJourney
from ubp_fast.features.organisers import CountsConfig, count_features_once
from ubp_fast.profiles import Profiles

CLIENTS, PURCHASES, LABELS = 1_000_000, 2_000_000, 100
# How far the best score of a task may be from the loop's; bf16 drifts, see `ubp_fast.evaluation.readers.network`.
CLOSENESS = {"fp32": 1e-3, "bf16": 5e-3}


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    path = tmp_path_factory.mktemp("complete_journey") / "events"
    CompleteJourney().prepare(path)
    return EventDirectory.open(path)


@pytest.mark.plain_glibc
def bench_six_tasks(contest: Contest, events: EventDirectory) -> None:
    raw = count_features_once(events, events.split.input_end_s, CountsConfig(anchor="file_order"))
    profiles = Profiles(raw.client_ids, raw.rows(slice(None))).to_float16()
    names = tuple(TASKS)

    def ours(precision: str) -> Scores:
        return evaluate(profiles, build_targets(events, profiles.client_ids), EvaluationConfig(precision=precision))

    def check(precision: str, mine: Scores, theirs: dict[str, list[float]]) -> None:
        for name, epochs in theirs.items():
            score = mine.tasks[name].score
            assert score is not None
            assert abs(score - max(epochs)) <= CLOSENESS[precision], f"{name}: {score} against {max(epochs)}"

    contest.once(
        "evaluation of six tasks",
        {precision: partial(ours, precision) for precision in ("bf16", "fp32")},
        ("plain loop", lambda: evaluate_by_loop(events, profiles, names)),
        {"fp32": 1.6, "bf16": 3.0},
        check,
        most_bytes=2_000_000_000,
        facts={"clients": profiles.num_clients, "width": profiles.dim, "tasks": list(names)},
    )


def bench_labels_of_a_million_clients(contest: Contest) -> None:
    """Both windows of all tasks; the rival joins and pivots with Polars, one list at a time."""
    random = np.random.default_rng(0)
    client_ids = np.sort(random.choice(10 * CLIENTS, CLIENTS, replace=False))
    purchases = pl.DataFrame(
        {
            "client_id": random.choice(client_ids, PURCHASES),
            "sku": random.zipf(1.3, PURCHASES).clip(max=50_000),
            "category": random.integers(0, 300, PURCHASES),
            "price": random.integers(0, 100, PURCHASES),
        }
    )
    columns = {"category": "category", "sku": "sku", "new_sku": "sku", "price": "price"}
    first = {"category": 0, "sku": 1, "new_sku": 101, "price": 0}
    lists = {name: (column, np.arange(first[name], first[name] + LABELS)) for name, column in columns.items()}

    def ours() -> tuple[np.ndarray, dict[str, LabelMatrix]]:
        return label_matrices(ClientRows(client_ids), purchases, lists)

    def with_polars() -> tuple[np.ndarray, dict[str, pl.DataFrame]]:
        rows = pl.DataFrame({"client_id": client_ids, "row": np.arange(CLIENTS)})
        known = purchases.join(rows, on="client_id")
        bought = np.zeros(CLIENTS, bool)
        bought[known["row"].to_numpy()] = True
        pairs = {}
        for name, (column, ids) in lists.items():
            labels = pl.DataFrame({column: ids, "label": np.arange(len(ids))})
            pairs[name] = known.join(labels, on=column).select("row", "label").unique().sort("row", "label")
        return bought, pairs

    def check(_: str, mine: tuple, theirs: tuple) -> None:
        assert np.array_equal(mine[0], theirs[0])
        for name, pairs in theirs[1].items():
            matrix = mine[1][name]
            assert np.array_equal(np.repeat(np.arange(CLIENTS), np.diff(matrix.indptr)), pairs["row"].to_numpy())
            assert np.array_equal(matrix.indices, pairs["label"].to_numpy())

    contest.run(
        "labels of 1 M clients, one window of all tasks",
        ours,
        {"Polars joins": (with_polars, None)},
        check,
        seconds=10,
        min_rounds=3,
        facts={"clients": CLIENTS, "purchases": PURCHASES, "labels_per_list": LABELS},
    )
