"""What is learned from all rows: against formulas, in parts of processes, for constant columns, other data, files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from ubp_fast.features import scaling
from ubp_fast.features.scaling import (
    PANEL,
    ColumnExtremes,
    ColumnMoments,
    DayStatistics,
    MinMaxScaler,
    Statistic,
    log_counts,
    moments,
    products,
    standardised,
)
from ubp_fast.models.membership import NewtonSums
from ubp_fast.models.reduced_rank import RegressionSums

VALUES = np.array([[0, 0.1, 3], [1, 0.1, 4], [9, 0.1, 8]], np.float32)


def test_scaler_equals_its_formula_also_on_other_data(tmp_path: Path) -> None:
    scaler = MinMaxScaler.fit(VALUES)
    scaler.save(tmp_path)
    for values in (VALUES, np.array([[18, 0.3, 3]], np.float32)):
        wanted = (values - VALUES.min(axis=0).astype(np.float64)) / [9, 1, 5]
        np.testing.assert_allclose(scaler.transform(values), wanted, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(MinMaxScaler.load(tmp_path).transform(values), scaler.transform(values))
    assert scaler.transform(VALUES).dtype == np.float32
    assert not scaler.transform(VALUES)[:, 1].any(), "a constant column becomes 0"


def test_moments_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(5, [1, 100, 0], (1_000, 3)).astype(np.float32)
    for rows_at_once in (7, 1_000, 4_096):
        monkeypatch.setattr(scaling, "ROWS_AT_ONCE", rows_at_once)
        mean, deviation = moments(values)
        np.testing.assert_allclose(mean, values.mean(axis=0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(deviation, values.std(axis=0, dtype=np.float64), rtol=1e-12, atol=1e-12)


def merged(empty: Callable[[], Statistic], parts: list[tuple[Any, ...]], processes: int) -> Any:
    """Numbered parts dealt out to processes, each of which adds its own backwards; what all of them say."""
    of_processes = [empty() for _ in range(processes)]
    for number in reversed(range(len(parts))):
        of_processes[number * 7 % processes].add(number, *parts[number])
    first, *others = reversed(of_processes)
    for number, other in enumerate(others):
        if number % 2:
            first.merge(other)
        else:  # as it travels between processes
            first.unpack(load(save(other.packed())))
    return first.finish()


@pytest.mark.parametrize("count", [1, 2, 7, 12])
@pytest.mark.parametrize("statistic", ["moments", "extremes", "regression", "newton"])
def test_parts_of_several_processes_give_the_bytes_of_one_pass(statistic: str, count: int) -> None:
    state = np.random.default_rng(0)
    inputs = [state.lognormal(size=(33 - number, 5)) for number in range(count)]
    labels = [(state.random(len(rows)) > 0.7).astype(float) for rows in inputs]
    whole, target = np.concatenate(inputs), np.concatenate(labels)
    empty: Callable[[], Statistic]
    parts: list[tuple[Any, ...]] = [(rows,) for rows in inputs]
    if statistic == "moments":
        empty, wanted = ColumnMoments, [whole.mean(axis=0), whole.std(axis=0)]
    elif statistic == "extremes":
        scaler = MinMaxScaler.fit(whole)
        empty, wanted = ColumnExtremes, [scaler.shift, scaler.scale]
    elif statistic == "regression":
        empty, wanted = RegressionSums, [np.array([len(whole)]), whole.T @ whole, whole.T @ target[:, None]]
        parts = [([(rows, [label[:, None]])],) for rows, label in zip(inputs, labels, strict=True)]
    else:
        empty, parts = partial(NewtonSums, np.zeros(6)), [*zip(inputs, labels, strict=True)]
        design = np.column_stack([whole, np.ones(len(whole))])
        wanted = [design.T @ (0.5 - target), design.T @ design / 4]
    found = [
        [result.shift, result.scale] if isinstance(result, MinMaxScaler) else [*result]
        for result in (merged(empty, parts, processes) for processes in (1, 2, 3, 5))
    ]
    for values, right in zip(found[0], wanted, strict=True):
        np.testing.assert_allclose(values, right, rtol=1e-12, atol=1e-12)
    for other in found[1:]:
        assert [values.tobytes() for values in other] == [values.tobytes() for values in found[0]]


def test_parts_that_do_not_fit_together() -> None:
    found = ColumnMoments()
    with pytest.raises(ValueError, match=r"numbered 0, 1, 2, \.\.\., got \[\]"):
        found.finish()
    found.add(2, VALUES)
    found.add(0, VALUES)
    with pytest.raises(ValueError, match="numbered 0, 1, 2"):
        found.finish()
    with pytest.raises(ValueError, match="added once, got 2 again"):
        found.add(2, VALUES)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shape \[N >= 1, F\], got \[0, 3\]"):
        MinMaxScaler.fit(VALUES[:0])
    with pytest.raises(ValueError, match=r"shape \[N, 3\], got \[3, 2\]"):
        MinMaxScaler.fit(VALUES).transform(VALUES[:, :2])
    with pytest.raises(ValueError, match="finite, got nan in row 1, column 0"):
        MinMaxScaler.fit(np.array([[1], [np.nan]], np.float32))


def test_standardised_columns_are_rounded_once() -> None:
    state = np.random.default_rng(0)
    values = (state.standard_normal((301, 7)) * 3 + 5).astype(np.float32)
    values[:, 2] = 4
    mean, deviation = moments(values)
    factor = np.arange(1.0, 8)
    wanted = (values - mean) / np.where(deviation > 0, deviation, 1) * factor
    for dtype, eps in ((np.float64, 1e-12), (np.float32, 2e-7)):
        parts = list(standardised(values, mean, deviation, 100, factor, dtype))
        assert [part.start for part, _ in parts] == [0, 100, 200, 300]
        found = np.concatenate([rows for _, rows in parts])
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=eps, atol=eps)
    np.testing.assert_array_equal(found[:, 2], 0)
    (_, alone), *_ = standardised(values[17:18], mean, deviation, factor=factor, dtype=np.float32)
    assert alone.tobytes() == found[17:18].tobytes()


def test_logarithms_of_counts() -> None:
    values = np.array([[0, 1, 7], [0.5, 0, 3]], np.float32)
    wanted = np.log1p(values)
    wide = np.full((2, 5), 9, np.float32)
    wide[:, 1:4] = values
    log_counts(wide[:, 1:4])
    np.testing.assert_allclose(wide[:, 1:4], wanted, rtol=2e-7)
    np.testing.assert_array_equal(wide[:, [0, 4]], 9)


def test_a_known_day_measures_nothing() -> None:
    values = np.arange(12.0).reshape(4, 3)
    day = DayStatistics()
    mean, deviation = day.moments("one", values)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    again, _ = day.moments("one", values * 2)
    assert again is mean, "measured once"
    known = DayStatistics(day.arrays)
    np.testing.assert_array_equal(known.moments("one", values * 2)[1], deviation)
    with pytest.raises(KeyError):
        known.moments("other", values)


@pytest.mark.parametrize("width", [0, 1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 3])
def test_products_of_columns(width: int) -> None:
    random = np.random.default_rng(width)
    values = random.normal(size=(37, width + 5))[:, 5:]  # rows that do not follow each other without a gap
    others = [random.normal(size=(37, other)).astype(np.float32) for other in (1, PANEL + 1)]
    own, *found = products(values, others)
    exact = np.concatenate([values, *others], axis=1, dtype=np.longdouble)
    wanted = values.T.astype(np.longdouble) @ exact
    assert own.shape == (width, width) and np.array_equal(own, own.T)
    for product, other in zip(found, others, strict=True):
        assert product.dtype == np.float64 and product.shape == (width, other.shape[1])
    np.testing.assert_allclose(np.concatenate([own, *found], axis=1), wanted.astype(np.float64), rtol=0, atol=1e-13)
