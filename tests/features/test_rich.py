"""Rich features: every block against plain Python or Polars, free of the future, complete for any shop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.shops import write_rows

from ubp_fast.events.labels import make_label_lists
from ubp_fast.events.read import EventDirectory, stored_form
from ubp_fast.events.sources.synthetic import Synthetic
from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Block, Column, History
from ubp_fast.features.rich import RichConfig, rich_features
from ubp_fast.features.rich.item_blocks import Baskets, Conversions, Diversity, MeanCodes, Prices
from ubp_fast.features.rich.money import Money
from ubp_fast.features.rich.propensity import BOUGHT_EDGES, LARGEST, Propensities
from ubp_fast.features.rich.time_blocks import Activity, Calendar, Gaps
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import TIMELINE, EventStore

Lists = dict[str, tuple[np.ndarray, np.ndarray]]
KINDS = ("product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query")


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("shop") / "events"
    Synthetic(clients=80, days=80, skus=40, categories=8, urls=50, seed=4).prepare(directory)
    return EventDirectory.open(directory)


@pytest.fixture(scope="module")
def store(events: EventDirectory, tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    path = tmp_path_factory.mktemp("store") / "store"
    build_store(events, path, events.split.input_end_s)
    return EventStore.open(path)


@pytest.fixture(scope="module")
def lists(events: EventDirectory, store: EventStore) -> Lists:
    return make_label_lists(events, store.cutoff_s - 14 * DAY_S, store.cutoff_s, 6)


def columns_of(block: Block, store: EventStore, cutoff_s: int, lists: Lists | None = None) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, _, values in block.columns(History.of(store, cutoff_s, lists)):
        found |= {name: values} if isinstance(name, str) else dict(zip(name, values.T, strict=True))
    return found


def rows_of(events: EventDirectory, store: EventStore, kind: str, cutoff_s: int) -> list[pl.DataFrame]:
    """The events of each client of the store before the cutoff, with properties of skus."""
    if kind == TIMELINE:
        parts = [events.frame(each).select("client_id", "timestamp_s") for each in KINDS]
        frame = pl.concat(parts)
    else:
        frame = events.frame(kind)
    if "sku" in frame.columns:
        frame = frame.join(events.products(), on="sku", how="left", maintain_order="left")
    frame = frame.filter(pl.col("timestamp_s") < cutoff_s).sort("timestamp_s", maintain_order=True)
    return [frame.filter(pl.col("client_id") == client) for client in store.client_ids.tolist()]


@pytest.mark.parametrize("kind", ["product_buy", TIMELINE])
def test_activity(events: EventDirectory, store: EventStore, kind: str) -> None:
    cutoff_s = store.cutoff_s - 5 * DAY_S
    found = columns_of(Activity((kind,), (7, 30), (3.0,)), store, cutoff_s)
    history_days = (cutoff_s - store.first_timestamp_s) / DAY_S
    for index, rows in enumerate(rows_of(events, store, kind, cutoff_s)):
        age_days = (cutoff_s - rows["timestamp_s"].to_numpy()) / DAY_S
        counts = {"7d": (age_days <= 7).sum(), "30d": (age_days <= 30).sum(), "all": len(age_days)}
        wanted = {f"events_{name}": np.log1p(count) for name, count in counts.items()}
        wanted["share_7d_of_30d"] = counts["7d"] / max(counts["30d"], 1)
        wanted["share_30d_of_all"] = counts["30d"] / max(counts["all"], 1)
        wanted["decayed_3d"] = np.log1p((0.5 ** (age_days / 3)).sum())
        wanted["last"] = np.log1p(age_days.min(initial=history_days))
        wanted["first"] = np.log1p(age_days.max() if len(age_days) else history_days)
        wanted["span"] = np.log1p(np.ptp(age_days) if len(age_days) else 0)
        wanted["active_days_all"] = np.log1p(len(set((rows["timestamp_s"] // DAY_S).to_list())))
        for name, value in wanted.items():
            np.testing.assert_allclose(found[f"{kind}_{name}"][index], value, rtol=1e-9, err_msg=name)


def test_baskets(events: EventDirectory, store: EventStore) -> None:
    cutoff_s = store.cutoff_s - 5 * DAY_S
    found = columns_of(Baskets(("product_buy",), (20,)), store, cutoff_s)
    some_new = 0
    for index, rows in enumerate(rows_of(events, store, "product_buy", cutoff_s)):
        inside = rows.filter(pl.col("timestamp_s") >= cutoff_s - 20 * DAY_S)
        for window, part in (("20d", inside), ("all", rows)):
            baskets, spend = part["timestamp_s"].n_unique(), part["price"].sum() / 100
            each = {"basket_size": len(part), "basket_spend": spend}
            assert found[f"product_buy_baskets_{window}"][index] == np.log1p(baskets)
            np.testing.assert_allclose(found[f"product_buy_spend_{window}"][index], np.log1p(spend))
            for name, value in each.items():
                wanted = np.log1p(value / baskets) if baskets else np.nan
                np.testing.assert_allclose(found[f"product_buy_{name}_{window}"][index], wanted)
        before = set(rows.filter(pl.col("timestamp_s") < cutoff_s - 20 * DAY_S)["sku"].to_list())
        new = len(set(inside["sku"].to_list()) - before)
        some_new += 0 < new < inside["sku"].n_unique()
        assert found["product_buy_new_items_20d"][index] == np.log1p(new)
        wanted = new / inside["sku"].n_unique() if len(inside) else np.nan
        np.testing.assert_allclose(found["product_buy_new_share_20d"][index], wanted)
    assert some_new


def priced_store(path: Path, amounts: tuple[str, ...], changed_from_s: int | None = None) -> EventStore:
    """Baskets of many lines, times that repeat, a client whose only purchase is late, and rows out of order."""
    random = np.random.default_rng(8)
    rows = [(int(c), int(t) * 9_000, int(s)) for c, t, s in random.integers(0, (20, 400, 9), (900, 3))]
    rows += [(77, 399 * 9_000, 1)]
    events = write_rows(path / "events", {"product_buy": rows, "page_visit": [(99, 5, 1)]}, amounts=amounts)
    if changed_from_s is not None:
        is_late, names = pl.col("timestamp_s") >= changed_from_s, list(amounts)
        frame = events.frame("product_buy").with_columns(
            pl.when(is_late).then(pl.col(names) + 5).otherwise(pl.col(names))
        )
        stored_form(frame).write_parquet(events.path / "product_buy.parquet")
    build_store(EventDirectory.open(events.path), path / "store", 10**8)
    return EventStore.open(path / "store")


@pytest.mark.parametrize("amounts", [("quantity", "spend"), ("spend",)])
def test_money(amounts: tuple[str, ...], tmp_path: Path) -> None:
    store, cutoff_s = priced_store(tmp_path, amounts), 330 * 9_000
    found = columns_of(Money((7, 20), (3.0,)), store, cutoff_s)
    purchases = EventDirectory.open(tmp_path / "events").frame("product_buy").filter(pl.col("timestamp_s") < cutoff_s)
    for index, client in enumerate(store.client_ids.tolist()):
        rows = purchases.filter(pl.col("client_id") == client).sort("timestamp_s", maintain_order=True)
        age_days = (cutoff_s - rows["timestamp_s"].to_numpy()) / DAY_S
        for name in amounts:
            values, wanted = rows[name].to_numpy().astype(np.float64), {}
            for window, days in (("7d", 7), ("20d", 20), ("all", 10**6)):
                wanted[window] = values[age_days <= days].sum()
            wanted["half_life_3d"] = (values * 0.5 ** (age_days / 3)).sum()
            baskets = rows.group_by("timestamp_s", maintain_order=True).agg(pl.col(name).cast(pl.Float64).sum())[name]
            wanted["basket_mean"] = baskets.mean() if len(rows) else np.nan
            wanted["basket_last"] = baskets[-1] if len(rows) else np.nan
            wanted["basket_largest"] = baskets.max() if len(rows) else np.nan
            for column, value in wanted.items():
                np.testing.assert_allclose(
                    found[f"{name}_{column}"][index], np.log1p(value), rtol=1e-12, err_msg=column
                )
        if len(amounts) == 2:
            each = rows["spend"].cast(pl.Float64).sum() / rows["quantity"].sum() if len(rows) else np.nan
            np.testing.assert_allclose(found["spend_of_a_piece"][index], np.log1p(each), rtol=1e-6)
    lacks = np.isin(store.client_ids, (77, 99))
    assert np.isnan(found["spend_basket_last"]).tolist() == lacks.tolist() and not found["spend_all"][lacks].any()
    assert len(found) == 7 * len(amounts) + (len(amounts) == 2)


def test_money_is_the_same_in_blocks_and_free_of_the_future(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window begins with its first second and ends before the cutoff."""
    cutoff_s, config = 330 * 9_000, RichConfig((Money((7,)),))
    store = priced_store(tmp_path / "a", ("quantity", "spend"))
    matrix = rich_features(store, cutoff_s, {}, config)
    assert np.isfinite(matrix.values).all()
    for name in ("BLOCK_VALUES", "SMALLEST_BLOCK"):
        monkeypatch.setattr(f"ubp_fast.features.writing.{name}", 3)
    assert rich_features(store, cutoff_s, {}, config).values.tobytes() == matrix.values.tobytes()
    changed = priced_store(tmp_path / "b", ("quantity", "spend"), cutoff_s)
    assert rich_features(changed, cutoff_s, {}, config).values.tobytes() == matrix.values.tobytes()
    earlier = priced_store(tmp_path / "c", ("quantity", "spend"), cutoff_s - 9_000)
    assert rich_features(earlier, cutoff_s, {}, config).values.tobytes() != matrix.values.tobytes()
    edge = {"product_buy": [(1, cutoff_s - 7 * DAY_S, 1), (2, cutoff_s - 7 * DAY_S - 1, 1), (3, cutoff_s, 1)]}
    build_store(write_rows(tmp_path / "edge", edge, amounts=("quantity",)), tmp_path / "store", cutoff_s + 1)
    found = columns_of(Money((7,)), EventStore.open(tmp_path / "store"), cutoff_s)
    assert np.expm1(found["quantity_7d"]).round(9).tolist() == [1, 0, 0]
    assert np.expm1(found["quantity_all"]).round(9).tolist() == [1, 2, 0]


def test_no_money_where_purchases_say_none(store: EventStore, tmp_path: Path) -> None:
    assert columns_of(Money(), store, store.cutoff_s) == {}
    build_store(write_rows(tmp_path / "events", {"page_visit": [(1, 5, 1)]}, amounts=("spend",)), tmp_path / "store", 9)
    found = columns_of(Money(), EventStore.open(tmp_path / "store"), 9)
    assert found["spend_all"].tolist() == [0] and len(found) == 11, "a shop before its first purchase"
    for wrong in ({"windows_days": (30, 7)}, {"half_lives_days": (0.0,)}):
        with pytest.raises(ValueError, match=r"Money: .* must be > 0"):
            Money(**wrong)


@pytest.mark.parametrize("kind", ["add_to_cart", TIMELINE])
def test_gaps(events: EventDirectory, store: EventStore, kind: str) -> None:
    cutoff_s = store.cutoff_s - 5 * DAY_S
    found = columns_of(Gaps((kind,)), store, cutoff_s)
    clients = rows_of(events, store, kind, cutoff_s)
    gaps = [np.diff(sorted(set((rows["timestamp_s"] // DAY_S).to_list()))) for rows in clients]
    has = np.array([len(gap) > 0 for gap in gaps])
    assert has.any() and not has.all()
    means = np.array([np.log1p(gap.mean()) for gap in gaps if len(gap)])
    np.testing.assert_allclose(found[f"{kind}_gap_mean"][has], means)
    assert np.isnan(found[f"{kind}_gap_mean"][~has]).all()
    matrix = rich_features(store, cutoff_s, {}, RichConfig((Gaps((kind,)),)))
    filled = matrix.rows(slice(None))[:, matrix.names.index(f"{kind}_gap_mean")]
    np.testing.assert_allclose(filled[~has], means.mean(), rtol=1e-6, err_msg="the mean of those that have gaps")
    for index, (rows, gap) in enumerate(zip(clients, gaps, strict=True)):
        times = rows["timestamp_s"].to_numpy()
        sessions = int((np.diff(times) > 1_800).sum()) + (len(times) > 0)
        assert found[f"{kind}_sessions"][index] == np.log1p(sessions)
        if len(gap):
            np.testing.assert_allclose(found[f"{kind}_gap_last"][index], np.log1p(gap[-1]))
            np.testing.assert_allclose(found[f"{kind}_gap_deviation"][index], np.log1p(gap.std()), atol=1e-7)
            overdue = (cutoff_s - times[-1]) / DAY_S / gap.mean()
            np.testing.assert_allclose(found[f"{kind}_overdue"][index], np.log1p(overdue))


def test_diversity_and_calendar(events: EventDirectory, store: EventStore) -> None:
    cutoff_s = store.cutoff_s
    found = columns_of(Diversity(("add_to_cart",), (30,)), store, cutoff_s)
    found |= columns_of(Calendar(("add_to_cart",), 6), store, cutoff_s)
    for index, rows in enumerate(rows_of(events, store, "add_to_cart", cutoff_s)):
        recent = rows.filter(pl.col("timestamp_s") >= cutoff_s - 30 * DAY_S)
        for window, inside in (("30d", recent), ("all", rows)):
            share = inside["category"].value_counts()["count"].to_numpy() / max(len(inside), 1)
            entropy = found[f"add_to_cart_entropy_categories_{window}"][index]
            np.testing.assert_allclose(entropy, -(share * np.log(share)).sum(), atol=1e-12)
            again = (len(inside) - inside["sku"].n_unique()) / max(len(inside), 1)
            np.testing.assert_allclose(found[f"add_to_cart_again_items_{window}"][index], again)
        time = pl.from_epoch(rows["timestamp_s"], time_unit="s")
        for day in range(7):
            share = (time.dt.weekday() == day + 1).sum() / max(len(rows), 1)
            np.testing.assert_allclose(found[f"add_to_cart_weekday_{day}"][index], share)
        for hour in (0, 6, 12, 18):
            share = (time.dt.hour() // 6 * 6 == hour).sum() / max(len(rows), 1)
            np.testing.assert_allclose(found[f"add_to_cart_hour_{hour}"][index], share)


def test_prices_conversions_and_codes(events: EventDirectory, store: EventStore) -> None:
    cutoff_s = store.cutoff_s
    found = columns_of(Prices(("add_to_cart",), (14,), 5), store, cutoff_s)
    found |= columns_of(Conversions((("product_buy", "add_to_cart"),), (14,)), store, cutoff_s)
    found |= columns_of(MeanCodes(("add_to_cart", "search_query")), store, cutoff_s)
    carts, buys, searches = (
        rows_of(events, store, kind, cutoff_s) for kind in ("add_to_cart", "product_buy", "search_query")
    )
    for index, rows in enumerate(carts):
        price = rows["price"].to_numpy() / 100
        expected = price.mean() if len(price) else np.nan
        np.testing.assert_allclose(found["add_to_cart_price_mean_all"][index], expected)
        ratio = np.log1p(len(buys[index])) - np.log1p(len(rows))
        np.testing.assert_allclose(found["product_buy_per_add_to_cart_all"][index], ratio)
        if len(rows):
            np.testing.assert_allclose(found["add_to_cart_price_last"][index], price[-1])
            np.testing.assert_allclose(found["add_to_cart_price_deviation_all"][index], price.std(), atol=1e-7)
            share = (rows["price"].to_numpy() // 20 == 3).mean()
            np.testing.assert_allclose(found["add_to_cart_price_bin_3_all"][index], share, atol=1e-12)
            codes = np.stack(rows["name"].to_list())[:, 5].mean() / 255
            np.testing.assert_allclose(found["add_to_cart_mean_code_5"][index], codes)
            recent = rows.filter(pl.col("timestamp_s") >= cutoff_s - 14 * DAY_S)["price"]
            trend = recent.mean() / 100 - price.mean() if len(recent) else 0
            np.testing.assert_allclose(found["add_to_cart_price_trend_14d"][index], trend, atol=1e-12)
        if len(searches[index]):
            codes = np.stack(searches[index]["query"].to_list())[:, 0].mean() / 255
            np.testing.assert_allclose(found["search_query_mean_code_0"][index], codes)


def test_propensities_are_the_rates_of_their_cells(events: EventDirectory, store: EventStore, lists: Lists) -> None:
    """Two windows by plain loops: pairs and purchases per cell, then the two factors."""
    block = Propensities(windows=2, half_life_days=30.0, prior_events=5.0)
    found = columns_of(block, store, store.cutoff_s, lists)
    ids = lists["propensity_category"][0].tolist()

    def cells(end_s: int) -> list[list[tuple[int, int, int]]]:
        result = []
        for buys, carts in zip(
            rows_of(events, store, "product_buy", end_s), rows_of(events, store, "add_to_cart", end_s), strict=True
        ):
            weights = [0.5 ** ((end_s - rows["timestamp_s"].to_numpy()) / DAY_S / 30) for rows in (buys, carts)]
            activity = int(np.digitize(weights[0].sum(), [1e-9, 0.25, 0.75, 1.5, 3, 6, 12, 25, 50, 100, 200, 400]))
            row = []
            for label in ids:
                bought, carted = (
                    weight[rows["category"].to_numpy() == label].sum()
                    for weight, rows in zip(weights, (buys, carts), strict=True)
                )
                row.append(
                    (int(np.digitize(bought, BOUGHT_EDGES)), int(np.digitize(carted, [1e-9, 0.5, 1.5, 4])), activity)
                )
            result.append(row)
        return result

    pairs: dict[tuple, float] = {}
    hits: dict[tuple, float] = {}
    for window in range(2):
        end_s = store.cutoff_s - window * 14 * DAY_S
        purchases = rows_of(events, store, "product_buy", end_s)
        for row, rows in zip(cells(end_s - 14 * DAY_S), purchases, strict=True):
            inside = rows.filter(pl.col("timestamp_s") >= end_s - 14 * DAY_S)["category"].to_list()
            for label, cell in zip(ids, row, strict=True):
                pairs[label, cell] = pairs.get((label, cell), 0) + 1
                hits[label, cell] = hits.get((label, cell), 0) + (label in inside)
    whole = sum(hits.values()) / sum(pairs.values())

    def rate(cell: tuple) -> float:
        bought, all_of = (sum(n for (_, other), n in table.items() if other == cell) for table in (hits, pairs))
        return (bought + 5 * whole) / (all_of + 5)

    for place, label in enumerate(ids):
        expected = sum(n * rate(cell) for (other, cell), n in pairs.items() if other == label)
        lift = (sum(n for (other, _), n in hits.items() if other == label) + 5) / (expected + 5)
        odds = found[f"log_odds_propensity_category_{label}"]
        for index, row in enumerate(cells(store.cutoff_s)):
            chance = np.clip(rate(row[place]) * lift, 1e-6, LARGEST)
            np.testing.assert_allclose(odds[index], np.log(chance / (1 - chance)), rtol=1e-4)


def test_propensities_rank_the_next_purchases(events: EventDirectory, store: EventStore, lists: Lists) -> None:
    matrix = rich_features(store, store.cutoff_s, lists, RichConfig((Propensities(),)))
    split = events.split
    later = events.purchases(split.input_end_s, split.validation_start_s)
    bought, other = [], []
    for label in lists["propensity_category"][0].tolist():
        odds = matrix.values[:, matrix.names.index(f"log_odds_propensity_category_{label}")]
        buyers = np.isin(matrix.client_ids, later.filter(pl.col("category") == label)["client_id"].to_numpy())
        bought += odds[buyers].tolist()
        other += odds[~buyers].tolist()
    assert len(bought) > 20
    ahead = np.subtract.outer(bought, other)
    assert (ahead > 0).mean() + (ahead == 0).mean() / 2 > 0.7


def test_nothing_from_the_cutoff_on_changes_a_value(
    events: EventDirectory, store: EventStore, lists: Lists, tmp_path: Path
) -> None:
    """A store that ends at the cutoff, made from events whose later rows are gone, gives the same bytes."""
    cutoff_s = store.cutoff_s - 14 * DAY_S
    earlier = tmp_path / "events"
    earlier.mkdir()
    for file in events.path.iterdir():
        if file.is_file():
            (earlier / file.name).write_bytes(file.read_bytes())
    np.save(earlier / "relevant_clients.npy", np.array(store.client_ids))
    for kind in events.kinds:
        past = events.frame(kind).filter(pl.col("timestamp_s") < cutoff_s)
        stored_form(past).write_parquet(earlier / f"{kind}.parquet")
    build_store(EventDirectory.open(earlier), tmp_path / "store", cutoff_s)
    one, other = (rich_features(each, cutoff_s, lists) for each in (store, EventStore.open(tmp_path / "store")))
    assert one.names == other.names
    assert one.units == other.units
    np.testing.assert_array_equal(one.values, other.values)
    assert all(one.units)
    assert one.values.std(axis=0).astype(bool).mean() > 0.9, "columns must tell clients apart"


def test_shop_with_purchases_only(events: EventDirectory, store: EventStore, lists: Lists, tmp_path: Path) -> None:
    alone = EventDirectory(events.path, ("product_buy",), events.split, events.info)
    build_store(alone, tmp_path / "store", store.cutoff_s)
    few = EventStore.open(tmp_path / "store")
    matrix = rich_features(few, few.cutoff_s, lists)
    assert np.isfinite(matrix.values).all()
    assert not any(name.startswith(("add_to_cart", "page_visit", "search", "timeline")) for name in matrix.names)
    assert "timeline_sessions" in rich_features(few, few.cutoff_s, lists, RichConfig((Gaps(("timeline",)),))).names
    whole = rich_features(store, store.cutoff_s, lists)
    rows = np.isin(whole.client_ids, few.client_ids)
    name = "product_buy_entropy_items_all"
    np.testing.assert_array_equal(
        matrix.values[:, matrix.names.index(name)], whole.values[rows][:, whole.names.index(name)]
    )


def test_bad_blocks(store: EventStore) -> None:
    with pytest.raises(ValueError, match="hours_per_bin must divide 24, got 5"):
        Calendar(hours_per_bin=5)
    with pytest.raises(ValueError, match="windows must be > 0, got 0"):
        Propensities(windows=0)

    class Twice:
        def columns(self, history: History) -> list[Column]:
            return [Column("same", "events", np.zeros(len(history.rows)))] * 2

    with pytest.raises(ValueError, match="'same' more than once"):
        rich_features(store, store.cutoff_s, {}, RichConfig((Twice(),)))
