"""What a run is about, in a few lines: clients, events, span, windows, and how often what is asked for happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from rich.table import Table

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.split import DAY_S, utc_text
from ubp_fast.pipeline.model_stages import cutoffs_of
from ubp_fast.pipeline.settings import Settings
from ubp_fast.store.event_store import EventStore


def facts_of(run: Path, settings: Settings) -> dict[str, str]:
    """Facts of a run whose first stages are there; empty before that.

    Args:
        run: its directory.
        settings: its settings.
    """
    folders = run / "stages"
    if not (folders / "events").exists():
        return {}
    events = EventDirectory.open(folders / "events")
    split, info = events.split, events.info
    input_end, validation_start, end = map(utc_text, (split.input_end_s, split.validation_start_s, split.end_s))
    days = (split.end_s - info["first_s"]) / DAY_S
    purchases = events.scan("product_buy").select("client_id", "timestamp_s")
    past = purchases.filter(pl.col("timestamp_s") < split.input_end_s).select("client_id").unique().collect()
    facts = {"source": str(info["source"])}
    if (folders / "store").exists():
        store = EventStore.open(folders / "store")
        facts["clients with a profile"] = f"{int(store.is_relevant.sum()):,}"
        facts["of these with a purchase so far"] = _share(store.client_ids[store.is_relevant], past["client_id"])
    facts["events"] = ", ".join(f"{rows:,} {kind}" for kind, rows in info["rows"].items())
    facts["span"] = f"{utc_text(info['first_s'])} to {end} ({days:.0f} days)"
    facts["profiles see events before"] = input_end
    if (folders / "store").exists():
        cutoffs = cutoffs_of(store, settings)[1]
        wanted = settings.windows.stacking_cutoffs
        few = f" ({wanted} were asked for, the history is short)" if len(cutoffs) < wanted else ""
        facts["past windows learned from"] = f"from {', '.join(utc_text(cutoff)[:10] for cutoff in cutoffs)}{few}"
    facts["readers learn from"] = f"{input_end} to {validation_start}"
    facts["scores are of"] = f"{validation_start} to {end} (inclusive)"
    for name, (start_s, end_s) in (
        ("learned from", split.train_window_s),
        ("scored", split.validation_window_s),
    ):
        inside = purchases.filter((pl.col("timestamp_s") >= start_s) & (pl.col("timestamp_s") < end_s))
        buyers = inside.select(pl.col("client_id").unique()).collect()["client_id"]
        churned = 1 - past["client_id"].is_in(buyers.implode()).mean() if len(past) else None  # type: ignore[operator]
        rate = "" if churned is None else f", {churned:.0%} of those who bought before do not (churn)"
        facts[f"buyers in the window {name}"] = f"{len(buyers):,}{rate}"
    facts["values bought in the window learned from"] = ", ".join(
        f"{count:,} of {name}" for name, count in _different(events).items()
    )
    facts["repetitions (evaluation.orders)"] = str(settings.evaluation.orders)
    return facts


def _different(events: EventDirectory) -> dict[str, int]:
    """How many values the purchases of the first target window have."""
    window = events.purchases(*events.split.train_window_s)
    return {name: window[name].n_unique() for name in ("category", "sku", "price")}


def _share(clients: np.ndarray, buyers: pl.Series) -> str:
    ids = pl.Series(clients)
    return f"{int(ids.is_in(buyers.implode()).sum()):,}"


def facts_table(facts: dict[str, str]) -> Table:
    """The facts for a terminal."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in facts.items():
        table.add_row(name, text)
    return table
