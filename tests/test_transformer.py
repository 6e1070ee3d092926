"""Events to vectors as a step of a scikit-learn pipeline."""

from __future__ import annotations

import pickle
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks
from support.runs import TINY

from ubp_fast import Profiler, ProfileTransformer, RelevanceScaler, run
from ubp_fast.evaluation.readers.linear import FEW_FIRST, Regression
from ubp_fast.events.schema import DataError, UserError

DAY = datetime(2026, 10, 15)
SETTINGS = dict(setting.split("=", 1) for setting in TINY if not setting.startswith("evaluation"))
NAMES = ("customer", "time", "article")


def shop(late_article: str = "A3") -> pl.DataFrame:
    """120 clients in 120 days; whatever is bought after DAY is one article."""
    state = np.random.default_rng(0)
    seconds = np.sort(state.integers(1_783_000_000, 1_783_000_000 + 120 * 86_400, 1_500))
    table = pl.DataFrame(
        {
            "customer": [f"K{number}" for number in state.integers(0, 120, len(seconds))],
            "time": pl.from_epoch(pl.Series(seconds)),
            "article": [f"A{number}" for number in state.integers(0, 20, len(seconds))],
        }
    )
    late = pl.when(pl.col("time") >= DAY).then(pl.lit(late_article)).otherwise(pl.col("article"))
    return table.with_columns(late.alias("article"))


def transformer(**options: Any) -> ProfileTransformer:
    return ProfileTransformer(*NAMES, settings=SETTINGS, **options)


@pytest.fixture(scope="module")
def fitted() -> ProfileTransformer:
    return transformer(at=DAY).fit(shop())


def test_vectors_are_those_of_a_run(fitted: ProfileTransformer, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shop("A19").write_parquet("events.parquet")  # what lies behind the moment moves nothing
    columns = {
        f"data.{name}_column": column for name, column in zip(("client", "timestamp", "sku"), NAMES, strict=True)
    }
    end = {"data.end": DAY.isoformat(), "profiles.at": "end", "evaluation": "off"}
    made = run({"data": "table", "data.path": "events.parquet", **columns, **end, **SETTINGS}, quiet=True)
    wanted = Profiler.load(made).embed(shop(), at=DAY)
    found = fitted.transform(shop())
    assert found.dtype == np.float32 and np.array_equal(found, wanted.embeddings)
    assert np.array_equal(fitted.transform(shop().to_pandas()), found)
    names = fitted.get_feature_names_out()
    assert len(set(names)) == len(names) == found.shape[1] and names[0].startswith("strong: ")


def test_rows_are_the_clients_that_are_named(fitted: ProfileTransformer) -> None:
    clients = ["K7", "K1", "nobody"]
    some = clone(fitted).set_params(clients=clients, blocks=["near"])
    some.model_ = fitted.model_
    found = some.transform(shop())
    wanted = fitted.profiler_.embed(shop(), DAY, clients, ["near"]).embeddings
    assert np.array_equal(found, wanted) and found.shape == (3, len(some.get_feature_names_out()))
    pickled, folder = pickle.dumps(some), some.profiler_.directory
    assert folder.exists()
    del some
    assert not folder.exists()
    assert np.array_equal(pickle.loads(pickled).transform(shop()), found)


def test_a_step_of_a_pipeline() -> None:
    events = shop()
    clients = events.filter(pl.col("time") < DAY)["customer"].unique().sort()
    stays = clients.is_in(events.filter(pl.col("time") >= DAY)["customer"].implode()).to_numpy()
    assert 0.2 < stays.mean() < 0.95
    steps = make_pipeline(transformer(at=DAY, clients=clients), StandardScaler(), LogisticRegression(C=1e-3))
    steps.fit(events, stays)
    assert steps.predict_proba(events).shape == (len(clients), 2)
    today = steps.set_params(profiletransformer__at=None, profiletransformer__clients=["K5"]).predict_proba(events)
    assert today.shape == (1, 2)


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_set_params,
    ],
)
def test_habits_of_scikit_learn(check: Any) -> None:
    """The checks that need no matrix of numbers as input."""
    check("ProfileTransformer", ProfileTransformer())


@pytest.mark.parametrize("candidates", [None, np.array([9, 3, 4, 30])])
def test_a_scaler_before_a_ridge_is_the_linear_reader(candidates: np.ndarray | None) -> None:
    state = np.random.default_rng(0)
    vectors = (state.normal(size=(300, 40)) * 10.0 ** state.integers(-4, 3, 40)).astype(np.float32)
    vectors[:, 7] = 5.0
    label = vectors[:, 3] * 2 / vectors[:, 3].std() + state.normal(size=300) > 1
    regression = Regression(torch.from_numpy(vectors), np.arange(300), label[:, None].astype(np.float32), candidates)
    wanted = regression.predicted((FEW_FIRST, 0.1), torch.from_numpy(vectors), np.arange(300))[:, 0]
    scaler = RelevanceScaler(candidates)
    found = make_pipeline(scaler, Ridge(alpha=0.1 * 300)).fit(vectors, label).predict(vectors)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert 3 in scaler.first_ and len(scaler.first_) == (3 if candidates is None else 1)
    named = RelevanceScaler(candidates).fit(vectors, np.where(label, "stays", "goes"))
    np.testing.assert_array_equal(named.scale_, scaler.scale_)


@parametrize_with_checks([RelevanceScaler()])
def test_the_scaler_has_all_habits_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize(
    ("candidates", "labels", "words"),
    [
        ([0, 40], [0, 1, 1], r"candidates must be positions in 0\.\.3, got \[0, 40\]"),
        ([0.5], [0, 1, 1], "candidates must be positions"),
        ([True, False, True, False], [0, 1, 1], "candidates must be positions"),  # a mask would be columns 0 and 1
        (None, ["a", "b", "c"], "y must be numbers or two classes, got 3 classes"),
        (None, [[0, 1], [1, 0], [1, 1]], "y should be a 1d array"),
        (None, None, "requires y to be passed"),
    ],
)
def test_mistakes_of_the_scaler(candidates: Any, labels: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RelevanceScaler(candidates).fit(np.zeros((3, 4)), labels)
    assert len(RelevanceScaler([]).fit(np.eye(4), [0, 1, 0, 1]).first_) == 0


def test_mistakes() -> None:
    with pytest.raises(NotFittedError):
        transformer().transform(shop())
    with pytest.raises(UserError, match="must be a polars, pandas or Arrow table"):
        transformer().fit(np.zeros((3, 2)))
    with pytest.raises(DataError, match="customer"):
        transformer().fit(shop().rename({"customer": "kunde"}))
