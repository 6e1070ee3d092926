"""Scaler: every kind against its formula, constant columns, other data than the fitted one, files, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ubp_fast.features.scaling import KINDS, Scaler

VALUES = np.array([[0, 0.1, 3], [1, 0.1, 4], [9, 0.1, 8]], np.float32)
OTHER = np.array([[18, 0.3, 3]], np.float32)


def formula(kind: str, fitted: np.ndarray, values: np.ndarray) -> np.ndarray:
    fitted, values = fitted.astype(np.float64), values.astype(np.float64)
    if kind.startswith("log1p"):
        fitted, values = np.log1p(fitted), np.log1p(values)
    if kind.endswith("standard"):
        spread = np.array([0 if np.ptp(column) == 0 else column.std() for column in fitted.T])
        return (values - fitted.mean(axis=0)) / np.where(spread > 0, spread, 1)
    if kind == "minmax":
        spread = np.ptp(fitted, axis=0)
        return (values - fitted.min(axis=0)) / np.where(spread > 0, spread, 1)
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_formula_also_on_other_data(kind: str, tmp_path: Path) -> None:
    scaler = Scaler(kind).fit(VALUES)
    scaler.save(tmp_path)
    loaded = Scaler.load(tmp_path)
    assert loaded.kind == kind
    for values in (VALUES, OTHER):
        np.testing.assert_allclose(scaler.transform(values), formula(kind, VALUES, values), rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(loaded.transform(values), scaler.transform(values))
    assert scaler.transform(VALUES).dtype == np.float32


@pytest.mark.parametrize("kind", ["standard", "minmax", "log1p_standard"])
def test_constant_columns_become_zero(kind: str) -> None:
    assert np.abs(Scaler(kind).fit(VALUES).transform(VALUES)[:, 1]).max() < 1e-6


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'robust'"):
        Scaler("robust")
    with pytest.raises(ValueError, match="fit must come before transform"):
        Scaler("none").transform(VALUES)
    with pytest.raises(ValueError, match="fit must come before save"):
        Scaler("none").save(tmp_path)
    with pytest.raises(ValueError, match=r"shape \[N >= 1, F\], got \[0, 3\]"):
        Scaler("none").fit(VALUES[:0])
    with pytest.raises(ValueError, match=r"shape \[N, 3\], got \[3, 2\]"):
        Scaler("none").fit(VALUES).transform(VALUES[:, :2])
    with pytest.raises(ValueError, match=r"finite and above -1, got -1.0 in row 0, column 0"):
        Scaler("log1p").fit(-np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="finite, got nan in row 0, column 0"):
        Scaler("standard").fit(np.full((2, 2), np.nan, np.float32))
