"""The organisers' baseline: equal to the golden vectors of their code, in file order and sorted by time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ubp_fast.events.read import EventDirectory, stored_form
from ubp_fast.events.schema import DataError
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.features.organisers import organisers_features

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("events")
    Challenge(dir=str(GOLDEN / "small")).prepare(directory)
    return EventDirectory.open(directory)


def copy_files(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


@pytest.mark.parametrize("form", ["file_order", "time_sorted"])
def test_equals_the_golden_vectors(events: EventDirectory, form: str) -> None:
    golden = np.load(GOLDEN / f"c_baseline_{form}.npz")
    facts = json.loads((GOLDEN / f"c_baseline_{form}.json").read_text())
    found = organisers_features(events, facts["num_days"], facts["top_n"], time_sorted=form == "time_sorted")
    np.testing.assert_array_equal(found.client_ids, golden["client_ids"])
    np.testing.assert_array_equal(found.values.astype(np.float16), golden["embeddings"])


@pytest.mark.parametrize("form", ["file_order", "time_sorted"])
def test_columns_are_the_golden_top_values(events: EventDirectory, form: str) -> None:
    tops = json.loads((GOLDEN / f"c_baseline_{form}.json").read_text())["top_values_in_column_order"]
    names = organisers_features(events, time_sorted=form == "time_sorted").names
    for kind in ("product_buy", "add_to_cart", "remove_from_cart", "page_visit"):
        for column, values in tops[kind].items():
            start = names.index(f"{kind}_{column}_{values[0]}_7d")
            assert names[start : start + 10] == tuple(f"{kind}_{column}_{value}_7d" for value in values)


def test_the_two_forms_differ_because_the_file_is_not_sorted(events: EventDirectory) -> None:
    one, other = (organisers_features(events, time_sorted=form).values for form in (False, True))
    assert (one != other).any(axis=1).sum() >= 200


def test_shop_with_purchases_only(events: EventDirectory) -> None:
    whole = organisers_features(events)
    alone = organisers_features(EventDirectory(events.path, ("product_buy",), events.split, events.info))
    buyers = len(alone.client_ids)
    assert alone.values.shape[1] == 91
    assert alone.names == whole.names[:91]
    np.testing.assert_array_equal(alone.client_ids, whole.client_ids[:buyers])
    np.testing.assert_array_equal(alone.values, whole.values[:buyers, :91])


def test_targets_are_not_seen(events: EventDirectory, tmp_path: Path) -> None:
    copy_files(events.path, tmp_path)
    for kind in events.kinds:
        table = events.frame(kind).filter(pl.col("timestamp_s") < events.split.input_end_s)
        path = tmp_path / f"{kind}.parquet"
        if path.is_dir():
            shutil.rmtree(path)
        stored_form(table).write_parquet(path)
    np.testing.assert_array_equal(
        organisers_features(EventDirectory.open(tmp_path)).values, organisers_features(events).values
    )


def test_relevant_clients_without_events(events: EventDirectory, tmp_path: Path) -> None:
    copy_files(events.path, tmp_path)
    np.save(tmp_path / "relevant_clients.npy", np.array([2**62], np.int64))
    with pytest.raises(DataError, match="input must hold events of relevant clients, got none"):
        organisers_features(EventDirectory.open(tmp_path))


def test_sku_without_properties(events: EventDirectory, tmp_path: Path) -> None:
    copy_files(events.path, tmp_path)
    products = events.products()
    sold = events.frame("product_buy")["sku"][0]
    stored_form(products.filter(pl.col("sku") != sold)).write_parquet(tmp_path / "product_properties.parquet")
    with pytest.raises(DataError, match=rf"product_buy: column 'sku' must have properties, got none for sku {sold} "):
        organisers_features(EventDirectory.open(tmp_path))
