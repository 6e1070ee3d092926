"""The anchor "file_order": equal to the golden vectors of the organisers' code, and to its rules in plain Python."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shops import Rows, product_frame, write_rows

from ubp_fast.events import read
from ubp_fast.events.read import EventDirectory, stored_form
from ubp_fast.events.schema import EVENT_KINDS, DataError
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import Features
from ubp_fast.features.organisers import CountsConfig, count_features_once

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CUTOFF_S = 100 * DAY_S


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("events")
    Challenge(dir=str(GOLDEN / "small")).prepare(directory)
    return EventDirectory.open(directory)


@pytest.fixture(scope="module")
def by_form(events: EventDirectory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EventDirectory]:
    """The golden events as they are, and with every table sorted by time."""
    path = tmp_path_factory.mktemp("sorted")
    copy_files(events.path, path)
    for kind in events.kinds:
        replace_table(path, kind, events.frame(kind).sort("timestamp_s", maintain_order=True))
    return {"file_order": events, "time_sorted": EventDirectory.open(path)}


def in_file_order(events: EventDirectory, **config: object) -> Features:
    return count_features_once(events, events.split.input_end_s, CountsConfig(anchor="file_order", **config))  # type: ignore[arg-type]


def copy_files(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def replace_table(directory: Path, kind: str, table: pl.DataFrame) -> None:
    path = directory / f"{kind}.parquet"
    if path.is_dir():
        shutil.rmtree(path)
    stored_form(table).write_parquet(path)


@pytest.mark.parametrize("form", ["file_order", "time_sorted"])
def test_equals_the_golden_vectors(by_form: dict[str, EventDirectory], form: str) -> None:
    golden = np.load(GOLDEN / f"c_baseline_{form}.npz")
    facts = json.loads((GOLDEN / f"c_baseline_{form}.json").read_text())
    found = in_file_order(by_form[form], windows_days=tuple(facts["num_days"]), top_values=facts["top_n"])
    clients = len(golden["client_ids"])
    np.testing.assert_array_equal(found.client_ids[:clients], golden["client_ids"])
    np.testing.assert_array_equal(found.rows(slice(0, clients)).astype(np.float16), golden["embeddings"])
    assert not found.rows(slice(clients, None)).any(), "clients without events follow, as zeros"


@pytest.mark.parametrize("form", ["file_order", "time_sorted"])
def test_columns_are_the_golden_top_values(by_form: dict[str, EventDirectory], form: str) -> None:
    tops = json.loads((GOLDEN / f"c_baseline_{form}.json").read_text())["top_values_in_column_order"]
    names = in_file_order(by_form[form]).names
    for kind in ("product_buy", "add_to_cart", "remove_from_cart", "page_visit"):
        for column, values in tops[kind].items():
            start = names.index(f"{kind}_{column}_{values[0]}_7d")
            assert names[start : start + 10] == tuple(f"{kind}_{column}_{value}_7d" for value in values)


def test_the_two_forms_differ_because_the_file_is_not_sorted(by_form: dict[str, EventDirectory]) -> None:
    one, other = (in_file_order(form).rows(slice(None)) for form in by_form.values())
    assert (one != other).any(axis=1).sum() >= 200


SKUS = [0, 1, 2, 3, 2**40, 2**63 - 1, -1]
PROPERTIES = {name: dict(zip(SKUS, product_frame(SKUS)[name], strict=True)) for name in ("sku", "category", "price")}
CLIENTS, ITEMS = st.integers(1, 5), st.sampled_from(SKUS)
TIMES = st.integers(94 * DAY_S, CUTOFF_S + DAY_S) | st.sampled_from([CUTOFF_S - days * DAY_S for days in (0, 1, 2, 3)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.fixed_dictionaries(
        {kind: st.lists(st.tuples(CLIENTS, TIMES, ITEMS), max_size=25) for kind in EVENT_KINDS[:4]}
    ),
    batch_rows=st.sampled_from([3, 1 << 20]),
    top_values=st.integers(0, 3),
)
def test_random_shops_equal_the_rules_in_plain_python(rows: Rows, batch_rows: int, top_values: int) -> None:
    """Rows in any order: windows leave out the first rows of the file, ties go to what came first, buyers lead."""
    rows["page_visit"] = [(3, 94 * DAY_S, 3), *rows["page_visit"]]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "BATCH_ROWS", batch_rows)
        events = write_rows(Path(folder) / "events", rows, [5, 2, 3, 9])
        config = CountsConfig(windows_days=(1, 3), top_values=top_values, anchor="file_order")
        found = count_features_once(events, CUTOFF_S, config)
    clients: list[int] = []
    wanted: dict[str, dict[int, int]] = {}
    for kind in EVENT_KINDS[:4]:
        seen = [row for row in rows[kind] if row[0] in (2, 3, 5, 9) and row[1] < CUTOFF_S]
        if not seen:
            continue
        clients += sorted({client for client, _, _ in seen} - {*clients})
        wanted[f"{kind}_count"] = Counter(client for client, _, _ in seen)
        columns = {"url": {item: item for item in SKUS}} if kind == "page_visit" else PROPERTIES
        for days in (1, 3):
            start_s = max(time_s for _, time_s, _ in seen) - days * DAY_S
            left_out = Counter(client for client, time_s, _ in seen if time_s < start_s)
            inside = []
            for client, _, item in seen:
                left_out[client] -= 1
                if left_out[client] < 0:
                    inside.append((client, item))
            for name, value in columns.items():
                top = Counter(value[item] for _, _, item in seen).most_common(top_values)  # ties: the first one
                for best, _ in top:
                    column = Counter(client for client, item in inside if value[item] == best)
                    wanted[f"{kind}_{name}_{best}_{days}d"] = column
    clients += sorted({2, 3, 5, 9} - {*clients})
    assert found.client_ids.tolist() == clients
    assert found.names == tuple(wanted)
    expected = [[column.get(client, 0) for column in wanted.values()] for client in clients]
    np.testing.assert_array_equal(found.rows(slice(None)), np.array(expected, np.float32))


def test_shop_with_purchases_only(events: EventDirectory) -> None:
    whole = in_file_order(events)
    alone = in_file_order(EventDirectory(events.path, ("product_buy",), events.split, events.info))
    assert alone.shape == (whole.shape[0], 91)
    assert alone.names == whole.names[:91]
    buyers = int((alone.rows(slice(None))[:, 0] > 0).sum())
    np.testing.assert_array_equal(alone.client_ids[:buyers], whole.client_ids[:buyers])
    np.testing.assert_array_equal(alone.rows(slice(0, buyers)), whole.rows(slice(0, buyers))[:, :91])


def test_targets_are_not_seen(events: EventDirectory, tmp_path: Path) -> None:
    copy_files(events.path, tmp_path)
    for kind in events.kinds:
        replace_table(tmp_path, kind, events.frame(kind).filter(pl.col("timestamp_s") < events.split.input_end_s))
    one, other = (in_file_order(each).rows(slice(None)) for each in (EventDirectory.open(tmp_path), events))
    np.testing.assert_array_equal(one, other)


def test_relevant_clients_without_events(events: EventDirectory, tmp_path: Path) -> None:
    copy_files(events.path, tmp_path)
    np.save(tmp_path / "relevant_clients.npy", np.array([2**62], np.int64))
    with pytest.raises(DataError, match="the cutoff must lie after the first event of a client"):
        in_file_order(EventDirectory.open(tmp_path))
