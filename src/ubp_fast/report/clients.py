"""Clients in a report: a map of their profiles, and a few of them beside those who are nearest.

Clients are told by what they did, in counts; their ids are left out unless they are asked for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import UserError
from ubp_fast.events.split import DAY_S
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.blocks import NEAR
from ubp_fast.progress import Progress, Steps

MOST_ON_MAP, MAP_STEPS = 1_000, 500
# Fewer have no neighbourhoods that a map could show.
LEAST_ON_MAP = 20
PERPLEXITY = 30
# Places on the map are whole numbers up to this.
MAP_SIZE = 1_000
CATEGORIES_SHOWN = 7
# Clients that are shown with their neighbours lie here in the order of activity.
ASKED_QUANTILES = (0.2, 0.5, 0.8, 0.95)
NEIGHBOURS, ITEMS_SHOWN = 3, 8
NOT_INSTALLED = "the map needs scikit-learn: pip install 'ubp_fast[evaluate]'"


def portray(
    profiles: Profiles,
    events: EventDirectory,
    cutoff_s: int,
    seed: int = 0,
    show_ids: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A map of some clients and a few clients beside their nearest, as plain data for JSON.

    Args:
        profiles: vectors of the cutoff; of those with a block for neighbours that block is looked at.
        events: what the clients did.
        cutoff_s: every count is of events before it, but for who buys in the 14 days from it on.
        seed: of the sample and of the map.
        show_ids: the facts hold the shop's own ids of the clients that they show.
        progress: called as progress(steps done, steps in all).

    Returns:
        `clients`, `has_near`; `map`: columns of one entry per client, or `map_missing`: why there is none;
        `neighbours`: a list of clients with those who are nearest.
    """
    steps = Steps(progress, 4)
    has_near = profiles.layout is not None and NEAR in [block.name for block in profiles.layout.blocks]
    vectors = _unit(profiles.select(NEAR) if has_near else profiles)
    activity = _activity(events, profiles.client_ids, cutoff_s)
    steps.done()
    total = activity["events"].to_numpy()
    generator = np.random.default_rng([seed, len(vectors)])
    chosen = np.sort(generator.permutation(len(vectors))[:MOST_ON_MAP])
    asked = _asked(total)
    nearest = {row: _nearest(vectors, row) for row in asked}
    shown = np.unique(np.concatenate([chosen, asked, *nearest.values()]))
    bought = _bought(events, profiles.client_ids[shown], cutoff_s)
    item = "category" if bought["category"].n_unique() > 1 else "sku"
    names = _names(events, item)
    found: dict[str, Any] = {"clients": len(vectors), "has_near": bool(has_near), "item": item, "neighbours": []}
    own = pl.Series(profiles.client_ids) if profiles.own_ids is None else profiles.own_ids
    for row, others in nearest.items():
        rows = [row, *others.tolist()]
        entry = _baskets(profiles.client_ids[rows], bought, item, names)
        entry["cosine"] = [1.0, *(float(vectors[row] @ vectors[other]) for other in others)]
        entry["events"] = [int(total[one]) for one in rows]
        if show_ids:
            entry["ids"] = _texts(own, rows)
        found["neighbours"].append(entry)
    steps.done()
    try:
        places = _places(vectors[chosen], seed)
    except UserError as error:
        return found | {"map_missing": str(error)}
    finally:
        steps.done(2)
    found["map"] = {
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "events": total[chosen].astype(int).tolist(),
        "kinds": {kind: activity[kind][chosen].to_list() for kind in events.kinds},
        "days": [None if math.isnan(day) else round(day, 1) for day in activity["days"][chosen].to_list()],
        "buys": activity["buys"][chosen].cast(pl.Int8).to_list(),
        **_main(profiles.client_ids[chosen], bought, item, names),
    }
    if show_ids:
        found["map"]["ids"] = _texts(own, chosen.tolist())
    return found


def _texts(ids: pl.Series, rows: list[int]) -> list[str]:
    return ids.gather(rows).cast(pl.String).to_list()


def _unit(profiles: Profiles) -> np.ndarray:
    """Vectors of length one, float32 [U, D]; a vector of zeros stays."""
    vectors = profiles.embeddings.astype(np.float32)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def _activity(events: EventDirectory, client_ids: np.ndarray, cutoff_s: int) -> pl.DataFrame:
    """One row per client: events of each kind and in all before the cutoff, days since the newest, who buys next."""
    found = pl.DataFrame({"client_id": client_ids})
    newest = []
    for kind in events.kinds:
        past = events.scan(kind).select("client_id", "timestamp_s").filter(pl.col("timestamp_s") < cutoff_s)
        each = past.group_by("client_id").agg(pl.len().alias(kind), pl.col("timestamp_s").max().alias("newest"))
        counted = each.collect()
        newest.append(counted.select("client_id", "newest"))
        found = found.join(counted.drop("newest"), on="client_id", how="left", maintain_order="left")
    last = pl.concat(newest).group_by("client_id").agg(pl.col("newest").max())
    found = found.join(last, on="client_id", how="left", maintain_order="left")
    window = events.purchases(cutoff_s, cutoff_s + events.target_days * DAY_S)["client_id"].unique()
    return found.with_columns(
        *(pl.col(kind).fill_null(0) for kind in events.kinds),
        events=pl.sum_horizontal(pl.col(kind).fill_null(0) for kind in events.kinds),
        days=((cutoff_s - pl.col("newest")) / DAY_S).fill_null(math.nan),
        buys=pl.col("client_id").is_in(window.implode()),
    )


def _bought(events: EventDirectory, client_ids: np.ndarray, cutoff_s: int) -> pl.DataFrame:
    """Purchases of some clients before the cutoff: client_id, sku, category."""
    wanted = pl.Series(client_ids).implode()
    past = events.scan("product_buy").filter(pl.col("timestamp_s") < cutoff_s, pl.col("client_id").is_in(wanted))
    rows = past.select("client_id", "sku").collect()
    return rows.join(events.products(["sku", "category"]), on="sku", how="left", maintain_order="left")


def _names(events: EventDirectory, item: str) -> dict[int, str]:
    """The names of categories or skus, where the shop or the source has any."""
    if item == "category" and "category_names" in events.info:
        return dict(enumerate(events.info["category_names"]))
    path = events.path / "maps" / f"{item}.parquet"
    return dict(pl.read_parquet(path).select("id", "value").iter_rows()) if path.exists() else {}


def _asked(total: np.ndarray) -> np.ndarray:
    """Rows of the clients to show with their neighbours, from little to much activity."""
    active = np.flatnonzero(total > 0)
    if len(active) <= NEIGHBOURS:
        return np.empty(0, np.int64)
    order = active[np.argsort(total[active], kind="stable")]
    places = dict.fromkeys(int(share * (len(order) - 1)) for share in ASKED_QUANTILES)
    return order[list(places)]


def _nearest(vectors: np.ndarray, row: int) -> np.ndarray:
    """Rows of the nearest others by cosine."""
    likeness = vectors @ vectors[row]
    likeness[row] = -np.inf
    return np.argsort(-likeness, kind="stable")[:NEIGHBOURS]


def _baskets(client_ids: np.ndarray, bought: pl.DataFrame, item: str, names: dict[int, str]) -> dict[str, Any]:
    """What a client and its nearest bought: items, and per client how often each."""
    counts = bought.filter(pl.col("client_id").is_in(pl.Series(client_ids).implode())).group_by("client_id", item).len()
    # Shares, so that a client who buys a lot does not fill the list alone.
    shares = counts.with_columns(share=pl.col("len") / pl.col("len").sum().over("client_id"))
    ranked = shares.group_by(item).agg(pl.col("share").sum()).sort(["share", item], descending=[True, False])
    items = ranked[item].head(ITEMS_SHOWN).to_list()
    known = {(client, value): count for client, value, count in counts.select("client_id", item, "len").iter_rows()}
    return {
        "items": [names.get(value, f"{item} {value}") for value in items],
        "counts": [[known.get((int(client), value), 0) for value in items] for client in client_ids],
    }


def _main(client_ids: np.ndarray, bought: pl.DataFrame, item: str, names: dict[int, str]) -> dict[str, Any]:
    """The item that each client bought most, as a position in a list of those with most clients; -1 for others."""
    counts = bought.group_by("client_id", item).len().sort(["client_id", "len", item], descending=[False, True, False])
    most = counts.group_by("client_id", maintain_order=True).agg(pl.col(item).first())
    own = pl.DataFrame({"client_id": client_ids}).join(most, on="client_id", how="left", maintain_order="left")[item]
    common = own.drop_nulls().value_counts(name="n").sort(["n", item], descending=[True, False])[item]
    shown = common.head(CATEGORIES_SHOWN).to_list()
    position = {value: number for number, value in enumerate(shown)}
    return {
        "main": [position.get(value, -1) for value in own.to_list()],
        "mains": [names.get(value, f"{item} {value}") for value in shown],
    }


def _places(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Where clients lie on the map, i64 [n, 2] from 0 to `MAP_SIZE`: neighbours by cosine stay neighbours (t-SNE).

    Raises:
        UserError: there is no scikit-learn, or too few clients.
    """
    if len(vectors) < LEAST_ON_MAP:
        raise UserError(f"the map needs {LEAST_ON_MAP} clients, got {len(vectors)}")
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError(NOT_INSTALLED) from error
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    projection = TSNE(perplexity=perplexity, init="pca", max_iter=MAP_STEPS, random_state=seed, n_jobs=1)
    places = projection.fit_transform(vectors)
    low, high = places.min(axis=0), places.max(axis=0)
    return np.rint((places - low) / np.where(high > low, high - low, 1) * MAP_SIZE).astype(np.int64)
