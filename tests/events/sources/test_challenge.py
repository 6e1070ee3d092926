from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS, DataError
from ubp_fast.events.sources.challenge import Challenge

SMALL = Path(__file__).resolve().parents[2] / "golden" / "small"
DAY_S = 86_400


def prepared(directory: Path, **config: str) -> EventDirectory:
    Challenge(**config).prepare(directory)  # type: ignore[arg-type]
    return EventDirectory.open(directory)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SMALL, tmp_path / "small"))


def shift_days(path: Path, days: float) -> None:
    table = pl.read_parquet(path)
    table.with_columns(pl.col("timestamp") + pl.duration(milliseconds=int(days * DAY_S * 1000))).write_parquet(path)


def test_both_layouts_have_the_same_windows_and_purchases(tmp_path: Path) -> None:
    raw = prepared(tmp_path / "raw", dir=str(SMALL), layout="raw")
    split = prepared(tmp_path / "split", dir=str(SMALL), layout="split")
    assert raw.split == split.split
    for window in (raw.split.train_window_s, raw.split.validation_window_s):
        assert raw.purchases(*window).equals(split.purchases(*window))
    assert (
        raw.frame("product_buy")
        .sort("client_id", "timestamp_s", "sku")
        .equals(split.frame("product_buy").sort("client_id", "timestamp_s", "sku"))
    )
    end_s = raw.split.input_end_s
    for kind in EVENT_KINDS:
        history = raw.frame(kind).filter(pl.col("timestamp_s") < end_s)
        assert history.equals(split.frame(kind).filter(pl.col("timestamp_s") < end_s))


def test_purchases_are_the_target_tables(tmp_path: Path) -> None:
    events = prepared(tmp_path / "events", dir=str(SMALL))
    assert events.info["layout"] == "split"  # "auto" prefers it
    windows = {"train": events.split.train_window_s, "validation": events.split.validation_window_s}
    for name, window in windows.items():
        target = pl.read_parquet(SMALL / "target" / f"{name}_target.parquet")
        expected = target.select("client_id", pl.col("timestamp").dt.epoch("s"), "sku", "category", "price")
        assert events.purchases(*window).rows() == expected.rows()
    history = events.purchases(0, events.split.input_end_s)
    assert len(history) == len(pl.read_parquet(SMALL / "input" / "product_buy.parquet"))
    everything = events.purchases(0, events.split.end_s + 1)
    assert len(everything) == events.info["rows"]["product_buy"]


def test_lists_keep_their_order(tmp_path: Path) -> None:
    events = prepared(tmp_path / "events", dir=str(SMALL))
    np.testing.assert_array_equal(events.relevant_clients, np.load(SMALL / "input" / "relevant_clients.npy"))
    np.testing.assert_array_equal(events.active_clients, np.load(SMALL / "target" / "active_clients.npy"))
    assert events.label_lists is not None
    assert len(events.label_lists) == 4
    for name, (ids, popularity) in events.label_lists.items():
        np.testing.assert_array_equal(ids, np.load(SMALL / "target" / f"{name}.npy"))
        np.testing.assert_array_equal(popularity, np.load(SMALL / "target" / f"popularity_{name}.npy"))


def test_properties_joined_by_the_source_win_and_new_skus_are_added(tmp_path: Path, small: Path) -> None:
    path = small / "target" / "train_target.parquet"
    target = pl.read_parquet(path)
    row = target.row(0, named=True)
    changed = target.with_columns(price=pl.when(pl.col("sku") == row["sku"]).then(99 - row["price"]).otherwise("price"))
    new = changed.head(1).with_columns(sku=pl.lit(123_456, pl.Int64), category=pl.lit(77, pl.Int64))
    pl.concat([changed, new]).write_parquet(path)
    events = prepared(tmp_path / "events", dir=str(small))
    train = events.purchases(*events.split.train_window_s)
    assert train["price"][0] == 99 - row["price"]
    assert train.row(-1, named=True)["category"] == 77
    products = events.products()
    assert products.filter(sku=123_456)["category"].to_list() == [77]
    assert products.filter(sku=row["sku"])["price"].to_list() == [row["price"]]


def test_windows_that_do_not_follow_the_rule(tmp_path: Path, small: Path) -> None:
    """The official scoring data end ten minutes after midnight: the rule alone would put the windows a day too late."""
    path = small / "target" / "validation_target.parquet"
    target = pl.read_parquet(path)
    before = prepared(tmp_path / "before", dir=str(small)).split
    last = target.tail(1).with_columns(timestamp=pl.lit("2022-09-09 00:09:59").str.to_datetime())
    pl.concat([target, last]).write_parquet(path)
    after = prepared(tmp_path / "after", dir=str(small)).split
    assert (after.input_end_s, after.validation_start_s) == (before.input_end_s, before.validation_start_s)
    assert after.end_s > before.end_s


def test_inputs_that_show_the_answers(tmp_path: Path, small: Path) -> None:
    shift_days(small / "input" / "page_visit.parquet", 5)
    with pytest.raises(DataError, match=r"events of input must lie before those of target/train_target.parquet"):
        prepared(tmp_path / "events", dir=str(small))
    assert not (tmp_path / "events").exists()


def test_targets_that_overlap(tmp_path: Path, small: Path) -> None:
    shift_days(small / "target" / "validation_target.parquet", -3)
    with pytest.raises(DataError, match=r"target/train_target.parquet must lie before those of target/validation"):
        prepared(tmp_path / "events", dir=str(small))


@pytest.mark.parametrize("layout", ["raw", "split"])
def test_an_earlier_end_moves_the_windows(tmp_path: Path, layout: str) -> None:
    events = prepared(tmp_path / "events", dir=str(SMALL), layout=layout, end="2022-09-03 12:00:00")
    full = prepared(tmp_path / "full", dir=str(SMALL), layout="raw")
    assert events.split.input_end_s == full.split.input_end_s - 5 * DAY_S
    expected = full.purchases(*events.split.validation_window_s)
    columns = expected.columns
    assert events.purchases(*events.split.validation_window_s).sort(columns).equals(expected.sort(columns))
    assert max(events.frame(kind)["timestamp_s"].max() for kind in events.kinds) <= events.split.end_s + DAY_S  # type: ignore[operator, type-var]
    assert events.label_lists is None
    assert events.active_clients is None
    assert events.relevant_clients is not None
    assert any("belong to another end" in note for note in events.info["notes"])


def test_duplicate_relevant_clients(tmp_path: Path, small: Path) -> None:
    path = small / "input" / "relevant_clients.npy"
    clients = np.load(path)
    np.save(path, np.concatenate([clients, clients[3:5]]))
    with pytest.raises(DataError, match=f"relevant_clients.npy: column 'ids' .* in row {len(clients)} \\(2 bad rows"):
        prepared(tmp_path / "events", dir=str(small))


def test_configuration(tmp_path: Path, shop: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"layout must be one of .* got 'zip'"):
        prepared(tmp_path / "events", dir=str(SMALL), layout="zip")
    with pytest.raises(DataError, match="challenge directory must exist"):
        prepared(tmp_path / "events", dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"end must be a date-time like .* got 'May'"):
        prepared(tmp_path / "events", dir=str(SMALL), end="May")
    assert prepared(tmp_path / "events", dir=str(shop())).info["layout"] == "raw"


def test_progress_and_same_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    Challenge(str(SMALL)).prepare(tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    Challenge(str(SMALL)).prepare(tmp_path / "b")
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 19  # purchases in two parts: of the input, and of the target windows
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
