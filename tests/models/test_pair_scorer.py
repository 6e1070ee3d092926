"""Pair scores: against the network written out, what they learn, leaks, blocks, threads, seeds, and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.shops import END_S, NUM_SKUS, make_store

from ubp_fast.events.schema import EVENT_KINDS, LabelLists, UserError
from ubp_fast.events.split import DAY_S
from ubp_fast.features import writing
from ubp_fast.features.scaling import DayStatistics
from ubp_fast.files import load_arrays, write_arrays
from ubp_fast.models import pair_scorer
from ubp_fast.models.pair_scorer import OF_SKUS, Factors, PairScorer, PairScorerConfig
from ubp_fast.store.event_store import EventStore, KindColumns

CONFIG = PairScorerConfig(pairs=6000, epochs=4, batch_size=256)
CUTOFFS = tuple(END_S - days * DAY_S for days in (14, 28, 42))
KINDS = ("product_buy", "add_to_cart")


def lists(*columns: str) -> LabelLists:
    values = {"category": np.arange(7, 12), "sku": np.arange(NUM_SKUS)[::-1].copy(), "price": np.arange(10)}
    return {f"propensity_{name}": (values[name], np.ones(len(values[name]))) for name in columns}


ALL = lists("category", "sku", "price")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return make_store(tmp_path_factory.mktemp("pairs"), clients=150)


@pytest.fixture(scope="module")
def scorer(shop: EventStore) -> PairScorer:
    return PairScorer.fit(shop, CUTOFFS, ALL, CONFIG)


def scores(scorer: PairScorer, store: EventStore, cutoff_s: int = END_S) -> np.ndarray:
    return scorer.transform(store, cutoff_s).rows(slice(None))


def counts_of(store: EventStore, client: int, cutoff_s: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Decayed counts of a client event by event: kind -> [half-lives, items], the last for tastes; and its inputs."""
    found, activity = {}, []
    for kind in (*EVENT_KINDS, "timeline"):
        columns = store.timeline if kind == "timeline" else store.kind(kind)
        rows = [
            row
            for row in range(columns.offsets[client], columns.offsets[client + 1])
            if columns.timestamp_s[row] < cutoff_s
        ]
        ages = np.array([(cutoff_s - int(columns.timestamp_s[row])) / DAY_S for row in rows])
        if isinstance(columns, KindColumns):
            found[kind] = np.zeros((4, max(store.num_skus, store.num_urls, 16 * 256)))
            for age, row in zip(ages, rows, strict=True):
                codes = np.zeros(0) if columns.codes is None else columns.codes[row] + 256 * np.arange(16)
                items = codes if columns.item is None else columns.item[row : row + 1]
                for number, days in enumerate((*CONFIG.half_lives_days, CONFIG.taste_half_life_days)):
                    found[kind][number, items] += 0.5 ** (age / days)
        if kind not in CONFIG.activity_kinds:
            continue
        never = (cutoff_s - store.first_timestamp_s) / DAY_S
        days = np.array([int(columns.timestamp_s[row]) // DAY_S for row in rows])
        activity += [(0.5 ** (ages / half_life)).sum() for half_life in CONFIG.activity_half_lives_days]
        activity += [ages.min(initial=never) if len(ages) else never, ages.max(initial=0) if len(ages) else never]
        activity += [len(np.unique(days[ages <= length])) for length in (14, 30, 90, np.inf)]
    return found, np.log1p(activity)


def test_scores_are_those_of_the_network_written_out(shop: EventStore, scorer: PairScorer) -> None:
    cutoff_s = END_S - 7 * DAY_S
    # Steep inputs, so that all three kinds are cut off at both ends somewhere.
    steep = {name: array * (8 if name.endswith("_scale") else 1) for name, array in scorer.arrays.items()}
    scorer = PairScorer.of_arrays(steep, CONFIG)
    found = scores(scorer, shop, cutoff_s)
    column = list(scorer.names).index("propensity_sku_13")
    arrays = {name: array.astype(np.float64) for name, array in scorer.groups["propensity_sku"].arrays.items()}
    is_sku, category = np.asarray(shop.sku_ids) == 13, np.asarray(shop.products.category)
    is_category = category == category[is_sku][0]
    counted = [counts_of(shop, client, cutoff_s) for client in range(shop.num_clients)]
    popularity = []
    items, neighbours = scorer.factors.items, scorer.factors.neighbours
    assert neighbours is not None and list(neighbours.items) == list(KINDS)
    assert list(items) == ["product_buy", "add_to_cart", "page_visit", "search_query"]
    of_label = sum(items[kind].weights[is_sku[items[kind].items]].sum(axis=0, dtype=np.float64) for kind in KINDS)
    is_sku, is_category = (np.pad(array, (0, 16 * 256 - len(array))) for array in (is_sku, is_category))
    for kind in KINDS:
        mean = np.mean([counts[kind][:3, is_sku].sum(axis=1) for counts, _ in counted], axis=0)
        popularity += [*np.log(mean + 1e-6), np.log(mean + 1e-6)[0] - np.log(mean + 1e-6)[2]]
    for client in (*range(12), 77):
        counts, activity = counted[client]
        pair, changes, of_category = [], [], []
        for kind in KINDS:
            own, all_items = counts[kind][:3, is_sku].sum(axis=1), counts[kind][:3].sum(axis=1)
            for count, total in zip(own, all_items, strict=True):
                share = min(count / max(total, 0.05), 1)
                pair += [np.log1p(count), np.sqrt(np.log1p(count)), np.sqrt(share), float(np.log1p(count) > 0.02)]
            changes.append(np.log1p(own[0]) - np.log1p(own[2]))
            for count in counts[kind][:3, is_category].sum(axis=1):
                of_category += [np.log1p(count), np.sqrt(np.log1p(count))]
        known = [np.log1p(counts[kind][3][one.items]) @ one.weights for kind, one in items.items()]
        mine, tastes = np.sum(known, axis=0), []
        for rank in CONFIG.tastes:
            product = mine[:rank] @ of_label[:rank] / np.linalg.norm(of_label[:rank])
            tastes += [product, product / max(np.linalg.norm(mine[:rank]), 1e-9)]
        of_items, cosines = neighbours.items, neighbours.lists["propensity_sku"]
        has = np.concatenate([np.log1p(counts[kind][3][one.items]) for kind, one in of_items.items()])
        near = np.zeros(len(has))
        for item in range(len(has)):
            entries = slice(cosines.starts[item], cosines.starts[item + 1])
            near[item] = cosines.cosines[entries][cosines.labels[entries] == NUM_SKUS - 1 - 13].sum()
        tastes += [has @ near, has @ near / max(np.linalg.norm(has), 1e-9)]
        inputs = {"client": activity, "label": np.array(popularity), "pair": np.array(pair + changes + of_category)}
        inputs["taste"] = np.array(tastes)
        hidden = arrays["bias_1"].copy()
        for name, values in inputs.items():
            scaled = ((values - arrays[f"{name}_mean"]) * arrays[f"{name}_scale"]).clip(-5, 5)
            hidden += scaled @ arrays[f"{name}_weight"]
        hidden = np.maximum(np.maximum(hidden, 0) @ arrays["weight_2"] + arrays["bias_2"], 0)
        expected = hidden @ arrays["weight_3"] + arrays["bias_3"][0]
        assert found[client, column] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_what_a_client_likes_scores_higher(shop: EventStore, scorer: PairScorer) -> None:
    """A client of the shop buys skus with sku % 5 == client % 5 alone, and categories are sku % 5 + 7."""
    found, names = scores(scorer, shop), scorer.names
    assert len(names) == 57 and names[:3] == ("buys", "carts", "propensity_category_7")
    assert names[7] == f"propensity_sku_{NUM_SKUS - 1}"
    busy = np.diff(shop.kind("product_buy").offsets) > 5
    client = np.flatnonzero(busy)
    for prefix, of_label in (
        ("propensity_category_", lambda value: value - 7),
        ("propensity_sku_", lambda value: value),
    ):
        columns = [number for number, name in enumerate(names) if name.startswith(prefix)]
        liked = np.array([of_label(int(names[column].split("_")[-1])) % 5 for column in columns]) == client[:, None] % 5
        own = found[np.ix_(client, columns)]
        ranks = own.ravel().argsort().argsort()
        is_liked = liked.ravel()
        area = (ranks[is_liked].mean() - (is_liked.sum() - 1) / 2) / (~is_liked).sum()
        assert area > 0.95
    rate = 1 / (1 + np.exp(-found[:, [name.startswith("propensity_sku") for name in names]]))
    later = shop.kind("product_buy").timestamp_s >= END_S - 14 * DAY_S
    bought = later.sum() / found.shape[0] / NUM_SKUS
    assert rate.mean() == pytest.approx(bought, rel=0.5), "log odds must belong to real rates, whatever was drawn"


def test_a_client_alone_has_a_score_of_coming_back(shop: EventStore, scorer: PairScorer) -> None:
    found, names = scores(scorer, shop, CUTOFFS[0]), list(scorer.names)
    for name, kind in (("buys", "product_buy"), ("carts", "add_to_cart")):
        columns = shop.kind(kind)
        times = columns.timestamp_s
        returns = np.array(
            [
                (times[first:end] >= CUTOFFS[0]).any()
                for first, end in zip(columns.offsets, columns.offsets[1:], strict=False)
            ]
        )
        ranks = found[:, names.index(name)].argsort().argsort()
        area = (ranks[returns].mean() - (returns.sum() - 1) / 2) / (~returns).sum()
        assert area > 0.7
        rate = (1 / (1 + np.exp(-found[:, names.index(name)]))).mean()
        assert rate == pytest.approx(returns.mean(), abs=0.15), "log odds of real rates"


def test_tastes_and_neighbours_tell_what_was_never_bought(tmp_path: Path) -> None:
    """Clients buy skus of one residue of 5; without its own counts a label is known by what its buyers buy besides."""
    store = make_store(tmp_path, clients=150, kinds=("product_buy",))
    found: dict[tuple[tuple[int, ...], int], float] = {}
    for tastes, neighbours in (((), 0), ((4,), 0), ((), 10)):
        config = replace(CONFIG, tastes=tastes, item_neighbours=neighbours)
        scorer = PairScorer.fit(store, CUTOFFS, lists("sku"), config)
        assert [one.weights.shape[1] for one in scorer.factors.items.values()] == [*tastes]
        values = scores(scorer, store)[:, 1:]
        columns, rows = store.kind("product_buy"), np.arange(store.num_clients)
        client = np.repeat(rows, np.diff(columns.offsets))
        bought = np.zeros((store.num_clients, NUM_SKUS), bool)
        bought[client, np.asarray(store.sku_ids)[columns.item]] = True
        sku = np.array([int(name.split("_")[-1]) for name in scorer.names[1:]])
        never = ~bought[:, sku] & (np.diff(columns.offsets) > 5)[:, None]
        liked = (sku % 5 == rows[:, None] % 5)[never]
        ranks = values[never].argsort().argsort()
        found[tastes, neighbours] = (ranks[liked].mean() - (liked.sum() - 1) / 2) / (~liked).sum()
    nothing, *others = found.values()
    assert min(others) > max(0.9, nothing + 0.1)


def test_a_past_window_is_scored_by_the_tastes_of_its_time(shop: EventStore, scorer: PairScorer) -> None:
    found = scores(scorer, shop, CUTOFFS[0])
    then = PairScorer(CONFIG, scorer.lists, scorer.groups, scorer.past[CUTOFFS[0]])
    np.testing.assert_array_equal(found, scores(then, shop, CUTOFFS[0]))
    today = PairScorer.of_arrays(scorer.arrays, CONFIG)
    assert not np.array_equal(found, scores(today, shop, CUTOFFS[0]))
    np.testing.assert_array_equal(scores(scorer, shop), scores(today, shop))


def test_nothing_from_the_cutoff_on_is_seen(shop: EventStore, tmp_path: Path) -> None:
    cutoff_s = END_S - 14 * DAY_S
    changed = make_store(tmp_path, clients=150, scrambled_from_s=cutoff_s)
    assert not np.array_equal(changed.kind("product_buy").item, shop.kind("product_buy").item)
    ours, theirs = (PairScorer.fit(store, CUTOFFS[1:], ALL, CONFIG) for store in (shop, changed))
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(theirs.arrays[name], array)
    np.testing.assert_array_equal(scores(theirs, changed, cutoff_s), scores(ours, shop, cutoff_s))


def test_blocks_of_clients_do_not_matter(
    shop: EventStore, scorer: PairScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores(scorer, shop)
    for name in ("BLOCK_CLIENTS", "SMALLEST_BLOCK"):
        monkeypatch.setattr(writing, name, 7)
    np.testing.assert_array_equal(scorer.transform(shop, END_S, tmp_path / "scores").rows(slice(None)), whole)


def test_a_known_day_tells_how_popular_labels_are(shop: EventStore, scorer: PairScorer) -> None:
    day = DayStatistics()
    whole = scorer.transform(shop, END_S, day=day).rows(slice(None))
    again = scorer.transform(shop, END_S, day=DayStatistics(day.arrays)).rows(slice(None))
    np.testing.assert_array_equal(again, whole)
    moved = DayStatistics({name: array + 1 for name, array in day.arrays.items()})
    assert np.abs(scorer.transform(shop, END_S, day=moved).rows(slice(None)) - whole).max() > 0.01


def test_the_same_seed_gives_the_same_weights_on_any_number_of_threads(shop: EventStore, scorer: PairScorer) -> None:
    # Large batches, of which several threads would each sum a part.
    large, found = replace(CONFIG, batch_size=6000, hidden=(256, 128)), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(PairScorer.fit(shop, CUTOFFS, ALL, large).arrays)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[1][name], array) for name, array in found[0].items())
    other = PairScorer.fit(shop, CUTOFFS, ALL, CONFIG, seed=1)
    assert not np.array_equal(scores(other, shop), scores(scorer, shop))


def test_files_hold_all_of_it(shop: EventStore, scorer: PairScorer, tmp_path: Path) -> None:
    write_arrays(tmp_path / "pairs.safetensors", scorer.arrays)
    read = PairScorer.of_arrays(load_arrays(tmp_path / "pairs.safetensors"), CONFIG)
    assert read.names == scorer.names
    np.testing.assert_array_equal(scores(read, shop), scores(scorer, shop))


@pytest.mark.parametrize(("tastes", "neighbours"), [((), 0), ((), 5), ((4,), 0)])
def test_a_model_without_tastes_or_neighbours_is_read_from_its_file(
    shop: EventStore, tastes: tuple[int, ...], neighbours: int
) -> None:
    config = replace(CONFIG, tastes=tastes, item_neighbours=neighbours, epochs=1)
    scorer = PairScorer.fit(shop, CUTOFFS, ALL, config)
    # The configuration of a model from before there were neighbours does not name them.
    for one in (config, replace(config, item_neighbours=PairScorerConfig.item_neighbours)):
        np.testing.assert_array_equal(scores(PairScorer.of_arrays(scorer.arrays, one), shop), scores(scorer, shop))


def test_an_interrupted_fit_goes_on_from_its_parts(
    shop: EventStore, scorer: PairScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, train, calls = pair_scorer._fit_factors, pair_scorer._train, []

    def counted(true, *arguments):  # type: ignore[no-untyped-def]
        if len(calls) in (2, 5):
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append(true.__name__)
        return true(*arguments)

    monkeypatch.setattr(pair_scorer, "_fit_factors", lambda *rest: counted(fitted, *rest))
    monkeypatch.setattr(pair_scorer, "_train", lambda *rest: counted(train, *rest))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            PairScorer.fit(shop, CUTOFFS, ALL, CONFIG, folder=tmp_path)
    found = PairScorer.fit(shop, CUTOFFS, ALL, CONFIG, folder=tmp_path)
    assert calls.count("_fit_factors") == len(CUTOFFS) + 1
    trained = calls.count("_train")
    again = PairScorer.fit(shop, CUTOFFS, ALL, CONFIG, folder=tmp_path)
    assert calls.count("_train") == trained, "all of it was there"
    for one in (found, again):
        assert one.arrays.keys() == scorer.arrays.keys()
        assert all(np.array_equal(one.arrays[name], array) for name, array in scorer.arrays.items())
        for cutoff_s in (CUTOFFS[0], END_S):
            np.testing.assert_array_equal(scores(one, shop, cutoff_s), scores(scorer, shop, cutoff_s))


def test_lists_and_kinds_may_be_missing(tmp_path: Path) -> None:
    store = make_store(tmp_path, kinds=("product_buy",), clients=80)
    without = PairScorer.fit(store, CUTOFFS, lists("sku"), CONFIG)
    assert list(without.groups) == ["buys", "propensity_sku"] and OF_SKUS not in without.lists
    assert len(without.groups["buys"].arrays["client_mean"]) == 12, "all kinds together are the purchases again"
    assert np.isfinite(scores(without, store)).all()


def test_a_list_that_nobody_buys_from_has_no_scores(shop: EventStore) -> None:
    unknown: LabelLists = {"propensity_sku": (np.array([900, 901]), np.ones(2)), **lists("price")}
    found = PairScorer.fit(shop, CUTOFFS, unknown, CONFIG)
    assert list(found.groups) == ["buys", "carts", "propensity_price"]
    assert found.transform(shop, END_S).shape == (150, 12)


def test_nothing_to_learn_from_is_no_column(shop: EventStore) -> None:
    unknown: LabelLists = {"propensity_sku": (np.array([900, 901]), np.ones(2))}
    assert PairScorer.fit(shop, CUTOFFS, unknown, CONFIG).names == ("buys", "carts")
    nothing = PairScorer(CONFIG, unknown, {}, Factors({}, {}))
    assert scores(nothing, shop).shape == (150, 0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kinds": ("page_visit",)}, "kinds"),
        ({"activity_kinds": ("visit",)}, "activity_kinds"),
        ({"taste_kinds": ()}, "taste_kinds"),
        ({"pairs": 0}, "pairs"),
        ({"half_lives_days": (0.0,)}, "half_lives_days"),
        ({"hidden": (8, 0)}, "hidden"),
        ({"tastes": (16, 8)}, "tastes"),
        ({"item_neighbours": -1}, "item_neighbours"),
        ({"client_epochs": 0}, "client_epochs"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        PairScorerConfig(**settings)  # type: ignore[arg-type]
