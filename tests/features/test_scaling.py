"""moments and MinMaxScaler: against their formulas, constant columns, other data than the fitted one, files, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ubp_fast.features import scaling
from ubp_fast.features.scaling import DayStatistics, MinMaxScaler, add_product, moments, projected

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


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shape \[N >= 1, F\], got \[0, 3\]"):
        MinMaxScaler.fit(VALUES[:0])
    with pytest.raises(ValueError, match=r"shape \[N, 3\], got \[3, 2\]"):
        MinMaxScaler.fit(VALUES).transform(VALUES[:, :2])
    with pytest.raises(ValueError, match="finite, got nan in row 1, column 0"):
        MinMaxScaler.fit(np.array([[1], [np.nan]], np.float32))


def test_a_product_of_a_row_does_not_depend_on_the_others() -> None:
    state = np.random.default_rng(0)
    inputs, matrix = state.standard_normal((301, 712)), state.standard_normal((712, 7))
    whole = projected(inputs, matrix)
    np.testing.assert_allclose(whole, inputs @ matrix, rtol=1e-9, atol=1e-9)
    for rows in (slice(0, 1), slice(300, 301), slice(3, 20), slice(0, 256)):
        assert projected(inputs[rows], matrix).tobytes() == whole[rows].tobytes()


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 4, 16), (5, 7, 3), (9, 38, 33), (6, 0, 5), (0, 3, 4), (3, 130, 128)])
def test_products_add_in_the_order_of_the_columns(dtype: type, shape: tuple[int, int, int]) -> None:
    rows, columns, width = shape
    state = np.random.default_rng(1)
    inputs, matrix = (state.standard_normal(one).astype(dtype) for one in ((rows, columns), (columns, width)))
    found, wanted = (state.standard_normal((rows, width)).astype(dtype) for _ in range(2))
    wanted[:] = found
    for column in range(columns):
        wanted += inputs[:, column, None] * matrix[column]
    together = found.copy()
    add_product(inputs, matrix, together)
    assert together.tobytes() == wanted.tobytes()
    for row in range(rows):
        add_product(inputs[row : row + 1], matrix, found[row : row + 1])
    assert found.tobytes() == wanted.tobytes(), "whoever stands beside it"
