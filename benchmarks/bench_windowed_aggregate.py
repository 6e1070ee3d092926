"""The organisers' aggregated features, made again from stored events: 1/100 and 1/10 of the challenge's size.

Everybody begins with client-sorted events in the form that suits it best (we: the memory-mapped store, others: a table)
and makes lists of frequent values, counts per window, totals and mean query codes. All cells are compared before any
clock starts.
"""

from __future__ import annotations

import os

os.environ.setdefault("POLARS_MAX_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
from contest import Contest
from reference_dataframes import Cells, load_into_duckdb, tables_of, with_duckdb, with_polars
from shop_logs import CUTOFF_S, write_logs

from ubp_fast.features.matrix import FeatureMatrix, Features, SparseFeatureMatrix
from ubp_fast.features.organisers import CountsConfig, count_features
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore

SMALL, WIDE = CountsConfig(), CountsConfig(windows_days=(1, 7, 14, 30, 60, 90), top_values=100)
POLARS_BARS, DUCKDB_BARS = {"default": 1.5, "wide": 1.2}, {"default": 1.3, "wide": 1.2}


def make_store(path: Path, scale: float) -> EventStore:
    """The store of logs of the challenge's size, or a part of it."""
    build_store(write_logs(path / "events", scale), path / "store", CUTOFF_S)
    return EventStore.open(path / "store")


def agree(store: EventStore | None, config: CountsConfig, mine: Features, cells: Cells) -> None:
    """Every cell of the rival is in our matrix, and ours holds no more than these; ids are the store's, if any."""
    original = {} if store is None else {"sku": store.sku_ids, "category": store.category_ids, "url": store.url_ids}
    columns = {name: index for index, name in enumerate(mine.names)}
    rows, places, values = [], [], []
    for kind, totals in cells.totals.items():
        rows.append(totals[:, 0])
        places.append(np.full(len(totals), columns[f"{kind}_count"]))
        values.append(totals[:, 1])
    for (kind, column), counts in cells.counts.items():
        ids = cells.names[kind, column]
        if store is not None:
            ids = ids - 2 if column == "price" else original[column][ids]
        labels = ids.tolist()
        table = np.array(
            [[columns[f"{kind}_{column}_{label}_{days}d"] for label in labels] for days in config.windows_days]
        )
        rows.append(counts[:, 0])
        places.append(table[counts[:, 1], counts[:, 2]])
        values.append(counts[:, 3])
    first_code = columns["search_query_mean_code_0"]
    row, place, value = (np.concatenate(parts) for parts in (rows, places, values))
    if isinstance(mine, SparseFeatureMatrix):
        client = np.repeat(np.arange(len(mine.client_ids)), np.diff(mine.indptr))
        is_code = mine.indices >= first_code
        order = np.lexsort((place, row))
        assert np.array_equal(client[~is_code], row[order])
        assert np.array_equal(mine.indices[~is_code], place[order])
        assert np.array_equal(mine.values[~is_code], value[order])
        means = np.zeros((len(mine.client_ids), 16), np.float32)
        means[client[is_code], mine.indices[is_code] - first_code] = mine.values[is_code]
    else:
        found = mine.values[:, :first_code].copy()
        assert np.array_equal(found[row, place], value)
        found[row, place] = 0
        assert not found.any()
        means = mine.values[:, first_code:]
    clients, wanted = cells.means
    np.testing.assert_allclose(means[clients], wanted, rtol=1e-6)
    assert not np.delete(means, clients, axis=0).any()


@pytest.mark.parametrize("scale", [0.01, 0.1], ids=["1of100", "1of10"])
@pytest.mark.parametrize("name", ["default", "wide"])
def bench_recompute(contest: Contest, tmp_path: Path, name: str, scale: float) -> None:
    store, config = make_store(tmp_path, scale), SMALL if name == "default" else WIDE
    tables = tables_of(store)
    base = load_into_duckdb(tables, tmp_path)
    arguments = config.windows_days, config.top_values
    contest.run(
        f"features again, {len(config.windows_days)} windows, top {config.top_values}, 1/{round(1 / scale)} size",
        lambda: count_features(store, store.cutoff_s, config),
        {
            "Polars": (lambda: with_polars(tables, *arguments), POLARS_BARS[name] if scale == 0.1 else None),
            "DuckDB": (lambda: with_duckdb(*base, *arguments), DUCKDB_BARS[name] if scale == 0.1 else None),
        },
        lambda _, mine, cells: agree(store, config, mine, cells),
        min_rounds=5,
        facts={"clients": store.num_clients, "scale": scale, "windows_days": list(config.windows_days)},
    )


def bench_two_threads(contest: Contest, tmp_path: Path) -> None:
    """A twentieth of a second for a thread: what both share shows. The full size has the bar."""
    two_threads(contest, make_store(tmp_path, 0.1), "1/10 size", None)


def two_threads(contest: Contest, store: EventStore, size: str, bar: float | None) -> None:
    """The same bytes with one thread and with two; the ratio is one thread's time over two threads'."""

    def check(_: str, mine: FeatureMatrix, theirs: FeatureMatrix) -> None:
        assert np.array_equal(mine.values, theirs.values)

    contest.run(
        f"features again on 2 threads, {size}",
        lambda: count_features(store, store.cutoff_s),
        {"1 thread": (lambda: count_features(store, store.cutoff_s), bar)},
        check,
        threads={"ubp_fast": 2},
        min_rounds=15,
        facts={"clients": store.num_clients},
    )
