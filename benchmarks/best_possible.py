"""The best that anybody can score on a synthetic shop, beside the oracle, who knows what no event tells.

    python benchmarks/best_possible.py RUN --output FILE [--draws 256]

RUN is a run on `data=synthetic`. The oracle knows every client's traits, also who has died. Whoever knows the world
(catalogue, how traits are spread, how events come about) but of a client its past events alone can do no better than
the chances given that past, the posterior's mean; profiles have to learn the world, too. Activity (rate, hazard, dead
or alive), the chance to buy what is in the cart, the price segment and the taste are independent given the past: the
first two on a grid, the segment exactly, the taste by the normal distribution at the posterior's mode.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from bars import BEST_POSSIBLE
from components import oracle_aurocs, targets_of
from contest import machine

from ubp_fast.compiled import njit
from ubp_fast.evaluation.tasks.metrics import auroc
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.sources import synthetic
from ubp_fast.events.sources import synthetic_world as world
from ubp_fast.events.split import DAY_S
from ubp_fast.files import write_json
from ubp_fast.profiles import Profiles

CLIENTS_AT_ONCE = 1000
SESSION_S = synthetic.SESSION_S


@dataclass(frozen=True)
class Past:
    """What the events before a day tell of U clients.

    Attributes:
        day: the first that is not seen.
        sessions: i64 [U] after the one of the first day alive, which everybody has.
        first_day, last_day: i64 [U] of all events.
        categories: f64 [U, K] events of each category.
        segment: f64 [U, 5] probability of the price segments given the skus in the cart.
        carted, bought: i64 [U].
    """

    day: int
    sessions: np.ndarray
    first_day: np.ndarray
    last_day: np.ndarray
    categories: np.ndarray
    segment: np.ndarray
    carted: np.ndarray
    bought: np.ndarray

    @classmethod
    def of(
        cls, events: EventDirectory, client_ids: np.ndarray, shop: synthetic.Synthetic, catalogue: world.Catalogue
    ) -> Past:
        """Everything before the inputs' end."""
        order, num_clients, end_s = np.argsort(client_ids), len(client_ids), events.split.input_end_s
        rows, times, categories = {}, {}, []
        for kind in ("page_visit", "search_query", "add_to_cart", "product_buy"):
            batch = [events.frame(kind)[name].to_numpy() for name in events.frame(kind).columns]
            seen = (batch[1] < end_s) & np.isin(batch[0], client_ids)
            client, times[kind], item = (column[seen] for column in batch)
            rows[kind] = order[np.searchsorted(client_ids[order], client)]
            if kind == "page_visit":
                categories.append((item - synthetic.FIRST_URL) // (shop.urls // shop.categories))
            elif kind == "search_query":
                parts = np.array_split(item, len(item) // CLIENTS_AT_ONCE + 1)
                same = [(part[:, None] == catalogue.category_codes).sum(axis=2).argmax(axis=1) for part in parts]
                categories.append(np.concatenate(same))
            elif kind == "add_to_cart":
                sku = item - synthetic.FIRST_SKU
                categories.append(catalogue.sku_category[sku])
        counts = np.zeros((num_clients, shop.categories))
        for row, category in zip(rows.values(), categories, strict=False):
            np.add.at(counts, (row, category), 1)
        likelihood = np.zeros((num_clients, world.PRICE_SEGMENTS))
        np.add.at(likelihood, rows["add_to_cart"], np.log(catalogue.sku_share[:, sku].T))
        # What is bought or removed follows what was carted, so it begins no session.
        kinds = ("page_visit", "search_query", "add_to_cart")
        client, time_s = (np.concatenate([table[kind] for kind in kinds]) for table in (rows, times))
        chronological = np.lexsort((time_s, client))
        client, time_s = client[chronological], time_s[chronological]
        begins = _begins(client, time_s)
        days = (time_s - shop.first_s) // DAY_S
        first, last = np.full(num_clients, days.max()), np.zeros(num_clients, np.int64)
        np.minimum.at(first, client, days)
        np.maximum.at(last, client, days)
        return cls(
            int((end_s - shop.first_s) // DAY_S),
            np.maximum(np.bincount(client[begins], minlength=num_clients) - 1, 0),
            *(first, last, counts, _softmax(likelihood)),
            *(np.bincount(rows[kind], minlength=num_clients) for kind in ("add_to_cart", "product_buy")),
        )


@njit
def _begins(client, time_s):
    """Whether each event begins a session: the client's first, or one that is too late for the session before."""
    begins, begin_s = np.ones(len(client), np.bool_), time_s[0]
    for event in range(1, len(client)):
        if client[event] == client[event - 1] and time_s[event] - begin_s < SESSION_S:
            begins[event] = False
        else:
            begin_s = time_s[event]
    return begins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=256, help="of traits that chances are averaged over")
    options = parser.parse_args()
    config = yaml.safe_load((options.run / "config.yaml").read_text(encoding="utf-8"))["data"]
    shop = synthetic.Synthetic(**{name: value for name, value in config.items() if name != "_target_"})
    catalogue = world.draw_catalogue(np.random.default_rng([shop.seed, 0]), shop.skus, shop.categories)
    events = EventDirectory.open(options.run / "stages" / "events")
    profiles = Profiles.load(options.run / "profiles")
    targets = targets_of(options.run, profiles)
    past = Past.of(events, np.asarray(targets.client_ids), shop, catalogue)
    lists = events.label_lists
    assert lists is not None
    columns = {name: (task.task.column, lists[name][0]) for name, task in targets.tasks.items() if task.task.column}
    gap_days = (events.split.validation_start_s - events.split.input_end_s) // DAY_S
    chances = chances_of(past, catalogue, columns, gap_days, events.target_days, options.draws)
    oracle = oracle_aurocs(options.run, targets)
    assert oracle is not None
    report: dict[str, object] = {"machine": machine(), "clients": len(targets.client_ids), "draws": options.draws}
    scores = _scores_of(profiles, columns)
    of_chances: dict[str, float] = {}
    of_scores: dict[str, float] = {}
    for name, task in targets.tasks.items():
        labels = task.validation.take(np.flatnonzero(task.included))
        for chance, found in ((chances, of_chances), (scores, of_scores)):
            if (key := name if task.task.column else "purchase") in chance:
                wanted = chance[key] if task.task.column else -chance[key]
                found[name] = float(auroc(torch.from_numpy(np.ascontiguousarray(wanted[task.included])), labels))
    report["possible"] = {
        "the truth (oracle)": oracle,
        BEST_POSSIBLE: of_chances,
        "the profile's scores, no reader": of_scores,
    }
    write_json(options.output, report)
    print(json.dumps(report["possible"], indent=1))


def _scores_of(profiles: Profiles, columns: dict[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The profile's scores float32 [U, labels] as they are, of the lists that it has all labels of, and "purchase"."""
    selected = profiles.select("scores")
    assert selected.layout is not None
    place = {name: number for number, name in enumerate(selected.layout.blocks[0].columns)}
    wanted = {name: [f"propensity_{column}_{label}" for label in labels] for name, (column, labels) in columns.items()}
    wanted["purchase"] = ["buys"]
    vectors = np.asarray(selected.embeddings, np.float32)
    return {
        name: vectors[:, [place[label] for label in labels]]
        for name, labels in wanted.items()
        if place.keys() >= {*labels}
    }


def chances_of(
    past: Past,
    catalogue: world.Catalogue,
    columns: dict[str, tuple[str, np.ndarray]],
    gap_days: int,
    num_days: int,
    draws: int,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Chance f32 [U, labels] to buy each label of the lists, and "purchase" of anything, in a window after the past."""
    random = np.random.default_rng(seed)
    rate, hazard, is_alive = _activity(past, draws, random)
    is_alive &= random.random(is_alive.shape) < np.exp(-gap_days * hazard)
    buys, segment = _buy_probability(past, draws, random), _segment(past, draws, random)
    slope = world.TASTE_STRENGTH * catalogue.category_vector / np.sqrt(world.LATENT_DIM)
    mode, spread = _taste(past, catalogue, slope)
    found: dict[str, np.ndarray] = {}
    start_day = past.day + gap_days
    for draw in range(draws):
        taste = mode + np.einsum("uij,uj->ui", spread, random.normal(size=mode.shape))
        clients = world.Clients(
            rate[:, draw],
            buys[:, draw],
            hazard[:, draw],
            past.first_day,
            np.where(is_alive[:, draw], start_day + num_days, 0),
            segment[:, draw],
            _softmax(catalogue.category_popularity + taste @ slope.T),
        )
        shares = {"purchase": np.ones((len(rate), 1))}
        for name, (column, labels) in columns.items():
            index = labels - synthetic.FIRST_SKU if column == "sku" else labels
            shares[name] = world.label_shares(clients, catalogue, column, index)
        for name, share in shares.items():
            chance = world.purchase_probability(clients, share, start_day, num_days) / np.float32(draws)
            found[name] = found[name] + chance if name in found else chance
    return found


def _activity(past: Past, draws: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws [U, draws] of the session rate, the hazard, and whether the client is alive on the day after the past."""
    of_rate, of_hazard = np.linspace(-3.5, 3.5, 61), np.linspace(-3.2, 3.2, 31)
    rate = np.repeat(np.minimum(np.exp(-2.2 + 1.1 * of_rate), 5.0), len(of_hazard))
    hazard = np.tile(np.exp(np.log(1 / 150) + 0.9 * of_hazard), len(of_rate))
    prior = -0.5 * np.add.outer(of_rate**2, of_hazard**2).ravel()
    found: list[tuple[np.ndarray, ...]] = []
    for first in range(0, len(past.sessions), CLIENTS_AT_ONCE):
        rows = slice(first, first + CLIENTS_AT_ONCE)
        lived = np.maximum(past.day - past.first_day[rows], 1)[:, None]  # if alive still
        least = np.maximum(past.last_day[rows] - past.first_day[rows] + 1, 1)[:, None]  # days alive
        density = prior + past.sessions[rows, None] * np.log(rate)
        alive = density - (rate + hazard) * lived
        # Dead after d days: e^(-(rate + hazard) d) (e^hazard - 1), the sum over d = least .. lived.
        days = (lived - least + 1) * (rate + hazard)
        dead = density + np.log(np.expm1(hazard)) - (rate + hazard) * least
        dead = dead + np.log(-np.expm1(-days)) - np.log(-np.expm1(-rate - hazard))
        chosen = _draws(_softmax(np.concatenate([alive, dead], axis=1)), draws, random)
        found.append((rate[chosen % len(rate)], hazard[chosen % len(rate)], chosen < len(rate)))
    rates, hazards, is_alive = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return rates, hazards, is_alive


def _buy_probability(past: Past, draws: int, random: np.random.Generator) -> np.ndarray:
    normal = np.linspace(-4, 4, 81)
    logit = -0.5 + 0.8 * normal
    left = np.maximum(past.carted - past.bought, 0)[:, None]
    density = -past.bought[:, None] * np.logaddexp(0, -logit) - left * np.logaddexp(0, logit) - normal**2 / 2
    return 1 / (1 + np.exp(-logit[_draws(_softmax(density), draws, random)]))


def _segment(past: Past, draws: int, random: np.random.Generator) -> np.ndarray:
    return _draws(past.segment, draws, random)


def _taste(past: Past, catalogue: world.Catalogue, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mode f64 [U, 8] of the posterior by Newton steps, and a root f64 [U, 8, 8] of the covariance there."""
    mode, total = np.zeros((len(past.categories), slope.shape[1])), past.categories.sum(axis=1)
    for _ in range(50):
        share = _softmax(catalogue.category_popularity + mode @ slope.T)
        mean = share @ slope
        squares = np.einsum("uk,ki,kj->uij", share, slope, slope, optimize=True) - mean[:, :, None] * mean[:, None]
        curvature = total[:, None, None] * squares + np.eye(slope.shape[1])
        step = np.linalg.solve(curvature, (past.categories @ slope - total[:, None] * mean - mode)[..., None])[..., 0]
        mode += step * np.minimum(1, 1.5 / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-9))
        if np.abs(step).max() < 1e-6:
            break
    return mode, np.linalg.cholesky(np.linalg.inv(curvature))


def _draws(probability: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """Places i64 [U, draws] drawn from [U, n], one from every quantile, in any order."""
    sums = np.cumsum(probability, axis=1)
    quantiles = random.permuted((np.arange(draws) + random.random((len(sums), draws))) / draws, axis=1)
    found = [np.searchsorted(row, wanted * row[-1]) for row, wanted in zip(sums, quantiles, strict=True)]
    return np.minimum(np.stack(found), probability.shape[1] - 1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    main()
