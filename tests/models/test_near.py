"""Near vectors: against a dense principal component analysis, and that a row depends on its own client alone."""

from __future__ import annotations

import numpy as np
import pytest

from ubp_fast.features import scaling
from ubp_fast.models.near import NearModel, NearPart


def parts(rows: slice = slice(None)) -> list[NearPart]:
    random = np.random.default_rng(0)
    found = []
    for width, weight in ((6, 1.0), (9, 0.3)):
        values = (random.normal(size=(80, width)) * random.uniform(0.1, 50, width) + 7).astype(np.float32)
        values[4] = values.mean(axis=0)
        mean, deviation = scaling.moments(values)
        found.append(NearPart(values[rows], mean, deviation, weight))
    return found


def joined() -> np.ndarray:
    blocks = []
    for values, mean, deviation, weight in parts():
        scaled = (values - mean) / deviation
        blocks.append((weight / 1.3) ** 0.5 * scaled / np.linalg.norm(scaled, axis=1, keepdims=True))
    whole = np.concatenate(blocks, axis=1)
    return whole - whole.mean(axis=0)


def cosines(rows: np.ndarray) -> np.ndarray:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_all_directions_keep_every_cosine() -> None:
    found = NearModel.fit(parts(), 100).transform(parts())
    assert found.shape == (80, 15) and found.dtype == np.float32
    np.testing.assert_allclose(found @ found.T, cosines(joined()), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_fewer_directions_are_the_leading_ones() -> None:
    found = NearModel.fit(parts(), 3).transform(parts()).astype(np.float64)
    left, values, _ = np.linalg.svd(joined(), full_matrices=False)
    np.testing.assert_allclose(found @ found.T, cosines(left[:, :3] * values[:3]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_row_depends_on_its_own_client_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NearModel.fit(parts(), 5)
    whole = model.transform(parts())
    for row in (0, 4, 41):
        np.testing.assert_array_equal(model.transform(parts(slice(row, row + 1)))[0], whole[row])
    monkeypatch.setattr(scaling, "ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(model.transform(parts()), whole)


def test_nobody_gives_an_empty_matrix() -> None:
    assert NearModel.fit(parts(), 5).transform(parts(slice(0, 0))).shape == (0, 5)
