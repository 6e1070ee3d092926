"""What vectors know of money: who will spend most, beside recency, frequency, money and counts of products.

    python benchmarks/spend.py --output FILE --data NAME --path TABLE --days DATE ... [--root runs] [key=value ...]

TABLE is a log in one Parquet file with a row per line of an invoice; words with "=" say how its columns are named, as
for a run. Ninety days before each of the days a run learns from what lies before, and its model makes the vectors of
that moment and of the day. A reader learns at the earlier moment and is scored at the day: who is in the top quarter of
spend of the next 90 days, who spends more than the median buyer of the next 30. Rivals are made of the same lines by
Polars. Errors are those of the mean over the days, by a bootstrap over each day's clients, the same for all rows.
`python benchmarks/bars.py` makes the table of the documentation from the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from components import CONF
from contest import machine
from hydra import compose, initialize_config_dir
from lightgbm import LGBMClassifier
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ubp_fast.events.split import DAY_S
from ubp_fast.events.times import iso_seconds
from ubp_fast.features.scaling import one_blas_thread
from ubp_fast.files import write_json
from ubp_fast.pipeline.execute import run_stages
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.profiler import Profiler

AHEAD_DAYS, SOON_DAYS = 90, 30
WINDOWS_DAYS = (7, 30, 90, 180, 365)
PRODUCTS = 500
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
RESAMPLES = 500
VECTOR, BLIND, RFM, RF = "vector", "vector without money", "recency, frequency, money", "recency, frequency"
BESIDE = "vector and columns of money"
ROWS = (VECTOR, BLIND, RFM, RF, BESIDE)
TARGETS = {
    f"top quarter of spend, {AHEAD_DAYS} days": AHEAD_DAYS,
    f"more than the median buyer, {SOON_DAYS} days": SOON_DAYS,
}
Table = dict[str, np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes vectors and rivals at each moment, asks every reader, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", required=True, help="what the tables call the data")
    parser.add_argument("--path", type=Path, required=True, help="the log")
    parser.add_argument("--days", nargs="+", required=True, help="dates at which readers are scored")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    options, overrides = parser.parse_known_args(arguments)
    if bad := [word for word in overrides if "=" not in word]:
        parser.error(f"overrides must have the form key=value, got {bad}")
    found: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]] = {}
    for day in options.days:
        moments = [iso_seconds("days", day) - AHEAD_DAYS * DAY_S, iso_seconds("days", day)]
        before, after = examples(options.path, overrides, options.root, moments)
        for target, days in TARGETS.items():
            is_top = [top_spenders(one, days) for one in (before, after)]
            for reader, fit in READERS.items():
                of_rows = found.setdefault(f"{reader}: {target}", {})
                for row in ROWS:
                    scores = fit(before[row], is_top[0], after[row])
                    of_rows.setdefault(row, []).append((scores, is_top[1]))
                    print(day, reader, target, row, f"{auroc(scores, is_top[1]):.4f}", flush=True)
    report = {
        "data": options.data,
        "overrides": overrides,
        "days": options.days,
        "machine": machine(),
        "spend": {name: summary(of_rows) for name, of_rows in found.items()},
    }
    write_json(options.output, report)
    print(json.dumps(report["spend"], indent=1))


def examples(path: Path, overrides: Sequence[str], root: Path, moments: Sequence[int]) -> list[Table]:
    """What every row of the table knows of the clients of each moment, and what they spend after it.

    Args:
        path: the log.
        overrides: how its columns are named.
        root: of the runs.
        moments: the first is when the models learn.
    """
    config = composed(overrides, path, root, moments[0])
    data = config.data
    lines = pl.read_parquet(path).select(
        pl.col(data.client_column).alias("client_id"),
        pl.col(data.timestamp_column).dt.epoch("s").alias("time_s"),
        pl.col(data.sku_column).alias("sku"),
        pl.col(data.quantity_column).alias("pieces"),
        (pl.col(data.price_column).cast(pl.Float64).clip(lower_bound=0) * pl.col(data.quantity_column)).alias("spend"),
    )
    lines = lines.filter(pl.col("pieces") > 0)
    vectors = {name: vectors_at(one, lines, moments) for name, one in ((VECTOR, config), (BLIND, blind(config)))}
    popular = lines.filter(pl.col("time_s") < moments[0])["sku"].value_counts(sort=True)["sku"].head(PRODUCTS)
    tables = []
    for number, moment in enumerate(moments):
        clients, counts, money = rivals_at(lines, moment, popular)
        table = {name: of_moments[number] for name, of_moments in vectors.items()}
        table |= {RF: counts, RFM: np.concatenate([counts, money], axis=1)}
        table[BESIDE] = np.concatenate([table[VECTOR], money, np.expm1(money)], axis=1)
        later = lines.filter(pl.col("time_s") >= moment)
        for days in TARGETS.values():
            until = later.filter(pl.col("time_s") < moment + days * DAY_S)
            spent = clients.join(until.group_by("client_id").agg(pl.col("spend").sum()), on="client_id", how="left")
            table[f"spend of {days} days"] = spent.sort("client_id")["spend"].fill_null(0).to_numpy()
        tables.append(table)
    return tables


def composed(overrides: Sequence[str], path: Path, root: Path, end_s: int) -> DictConfig:
    """The configuration of a run that learns from what lies before a moment."""
    end = str(np.datetime64(end_s - 1, "s"))
    more = [f"data.path={path.absolute()}", f"data.end='{end}'", "profiles.at=end", "evaluation=off", f"root={root}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("run", overrides=["data=table", "compute.threads=1", *overrides, *more])


def blind(config: DictConfig) -> DictConfig:
    """The same without what vectors know of money."""
    plain: Any = OmegaConf.to_container(config)
    blocks = plain["features"]["rhythm"]["blocks"]
    kept = [block for block in blocks if not block["_target_"].endswith(".Money")]
    assert len(kept) < len(blocks)
    plain["features"]["rhythm"]["blocks"] = kept
    return OmegaConf.create(plain)


def vectors_at(config: DictConfig, lines: pl.DataFrame, moments: Sequence[int]) -> list[np.ndarray]:
    """Vectors float32 of the clients of each moment by the model of the first one, ids ascending."""
    run = run_stages(replace(read_settings(config), stages=("profiles",)), Console(file=sys.stderr))
    names = {"client_id": config.data.client_column, "sku": config.data.sku_column}
    names |= {"pieces": config.data.quantity_column, "time_s": config.data.timestamp_column}
    table = pl.read_parquet(config.data.path)
    vectors = []
    for moment in moments:
        earlier = table.filter(pl.col(config.data.timestamp_column).dt.epoch("s") < moment)
        found = Profiler.load(run).embed(earlier, moment, everybody=True)
        clients = lines.filter(pl.col("time_s") < moment)["client_id"].unique().sort()
        assert np.array_equal(found.client_ids, clients.to_numpy())
        vectors.append(found.embeddings.astype(np.float32))
    return vectors


def rivals_at(lines: pl.DataFrame, moment: int, popular: pl.Series) -> tuple[pl.DataFrame, np.ndarray, np.ndarray]:
    """Clients before a moment, ids ascending; log1p of recency, frequency and counts of products; log1p of money."""
    lines = lines.filter(pl.col("time_s") < moment)
    age = (moment - pl.col("time_s")) / DAY_S
    counts = [age.min().alias("last"), age.max().alias("first"), pl.col("time_s").n_unique().alias("baskets")]
    counts += [pl.col("sku").n_unique().alias("different"), pl.len().alias("lines")]
    money = [pl.col(name).sum() for name in ("pieces", "spend")]
    for days in WINDOWS_DAYS:
        inside = age <= days
        counts.append(pl.col("time_s").filter(inside).n_unique().alias(f"baskets_{days}"))
        money += [pl.col(name).filter(inside).sum().alias(f"{name}_{days}") for name in ("pieces", "spend")]
    basket = lines.group_by("client_id", "time_s").agg(pl.col("spend").sum().alias("basket")).sort("time_s")
    baskets = basket.group_by("client_id").agg(
        pl.col("basket").last().alias("last_basket"), pl.col("basket").max().alias("largest_basket")
    )
    found = lines.group_by("client_id").agg(*counts, *money).join(baskets, on="client_id").sort("client_id")
    bought = lines.filter(pl.col("sku").is_in(popular.implode())).group_by("client_id", "sku").len()
    row = found["client_id"].search_sorted(bought["client_id"]).to_numpy()
    place = {sku: index for index, sku in enumerate(popular.to_list())}
    matrix = np.zeros((len(found), len(popular)))
    matrix[row, [place[sku] for sku in bought["sku"].to_list()]] = bought["len"].to_numpy()
    of_money = [column.meta.output_name() for column in money] + ["last_basket", "largest_basket"]
    plain = found.select([column.meta.output_name() for column in counts]).to_numpy()
    logs = [np.log1p(np.asarray(one, np.float64)) for one in (np.concatenate([plain, matrix], axis=1), found[of_money])]
    return found.select("client_id"), logs[0], logs[1]


def top_spenders(table: Table, days: int) -> np.ndarray:
    """Bool, who spends most in the days after a moment."""
    spend = table[f"spend of {days} days"]
    bound = np.quantile(spend, 0.75) if days == AHEAD_DAYS else np.median(spend[spend > 0])
    return np.asarray(spend > bound)


def regression(inputs: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Logistic, of standardised columns; the penalty that ranks best in three folds."""

    def model(penalty: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=300))

    folds = [cross_val_score(model(one), inputs, labels, scoring="roc_auc", cv=3).mean() for one in PENALTIES]
    return np.asarray(model(PENALTIES[int(np.argmax(folds))]).fit(inputs, labels).decision_function(wanted))


def boosting(inputs: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """LightGBM with its defaults."""
    model = LGBMClassifier(n_jobs=1, deterministic=True, force_row_wise=True, verbose=-1)
    return np.asarray(model.fit(inputs, labels).predict_proba(wanted)[:, 1])


READERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "regression": regression,
    "boosting": boosting,
}


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that one of those looked for is ranked before another; ties count half."""
    order = np.argsort(scores, kind="stable")
    _, first, number = np.unique(scores[order], return_index=True, return_counts=True)
    rank = np.empty(len(scores))
    rank[order] = np.repeat(first + (number + 1) / 2, number)
    positive = int(labels.sum())
    return float((rank[labels].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))


def summary(of_rows: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> dict[str, dict[str, Any]]:
    """Of every row: AUROC each day, and how far the vector leads it in the mean of the days, with its error."""
    means = {name: [auroc(*one) for one in days] for name, days in of_rows.items()}
    leads: dict[str, list[float]] = {name: [] for name in of_rows}
    for seed in range(RESAMPLES):
        random = np.random.default_rng(seed)
        drawn = [random.integers(0, len(labels), len(labels)) for _, labels in of_rows[VECTOR]]
        again = {
            name: np.mean(
                [auroc(scores[rows], labels[rows]) for (scores, labels), rows in zip(days, drawn, strict=True)]
            )
            for name, days in of_rows.items()
        }
        for name in of_rows:
            leads[name].append(float(again[VECTOR] - again[name]))
    return {
        name: {
            "auroc": means[name],
            "lead": float(np.mean(means[VECTOR]) - np.mean(means[name])),
            "error": float(np.std(leads[name], ddof=1)),
        }
        for name in of_rows
    }


if __name__ == "__main__":
    with one_blas_thread():
        main()
