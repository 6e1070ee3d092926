"""Real purchases: the raw baseline scores what the organisers' own code scored on the same data."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from ubp_fast.evaluation import EvaluationConfig, build_targets, evaluate
from ubp_fast.events.checks import CODES
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.sources.complete_journey import CompleteJourney
from ubp_fast.events.write import event_writer
from ubp_fast.features.organisers import CountsConfig, count_features_once
from ubp_fast.profiles import Profiles

# Their run: one thread, torch 2.13, rows in the order of their baseline, best of three epochs.
THEIRS = {
    "churn": 0.7189,
    "conversion": 0.7189,
    "propensity_category": 0.5978,
    "propensity_sku": 0.5703,
    "propensity_new_sku": 0.5704,
    "propensity_price": 0.6006,
}


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    """Complete Journey with three made-up events in each other kind, because their baseline cannot do without."""
    root = tmp_path_factory.mktemp("complete_journey")
    CompleteJourney().prepare(root / "purchases")
    purchases = EventDirectory.open(root / "purchases")
    buys = purchases.frame("product_buy")
    first = buys.select("client_id", "timestamp_s", "sku").head(3)
    codes = pl.Series("query", (7 * np.arange(3)[:, None] + np.arange(16)).astype(np.uint8), dtype=CODES)
    with event_writer(root / "events", "test") as writer:
        writer.write_products(purchases.products())
        writer.write_events("product_buy", buys)
        writer.write_events("add_to_cart", first)
        writer.write_events("remove_from_cart", first)
        writer.write_events("page_visit", first.select("client_id", "timestamp_s", url=pl.int_range(3)))
        writer.write_events("search_query", first.select("client_id", "timestamp_s").with_columns(codes))
        writer.finish(purchases.split)
        writer.write_label_lists(purchases.label_lists)
    return EventDirectory.open(root / "events")


def check(events: EventDirectory, tasks: tuple[str, ...]) -> None:
    raw = count_features_once(events, events.split.input_end_s, CountsConfig(anchor="file_order"))
    assert raw.shape == (2464, 173)
    profiles = Profiles(raw.client_ids, raw.rows(slice(None))).to_float16()
    scores = evaluate(profiles, build_targets(events, profiles.client_ids, tasks), EvaluationConfig(tasks=tasks))
    for name, (score, _) in scores.summary().items():
        assert score == pytest.approx(THEIRS[name], abs=5e-3), name


def test_churn_of_the_raw_baseline(events: EventDirectory) -> None:
    check(events, ("churn",))


@pytest.mark.slow
def test_all_tasks_of_the_raw_baseline(events: EventDirectory) -> None:
    check(events, tuple(THEIRS))
