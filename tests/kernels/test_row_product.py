"""Products whose rows do not know each other: against float64, the same bytes in any company, and wrong arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ubp_fast import _core
from ubp_fast.kernels import BackendUnavailable
from ubp_fast.kernels.row_product import pair_network, row_product

SHAPES = [
    (1, 1, 1),
    (4, 4, 16),
    (5, 7, 3),
    (97, 38, 33),
    (6, 0, 5),
    (0, 3, 4),
    (3, 130, 128),
    (200, 33, 65),
    (7, 64, 0),
]
NETWORKS = [
    (5, 3, 4, 2, 3, 3, 2),
    (9, 300, 64, 32, 38, 200, 4),
    (4, 128, 7, 5, 1, 9, 0),
    (3, 130, 16, 16, 0, 4, 1),
    (0, 5, 4, 3, 2, 1, 3),
]


@pytest.fixture(params=_core.usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    first = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(first)


def arrays(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[np.ndarray]:
    state = np.random.default_rng(0)
    return [state.standard_normal(shape).astype(dtype) for shape in shapes]


def require_close(found: np.ndarray, plain: np.ndarray, exact: np.ndarray) -> None:
    """At most twice the error of the plain reference, and four roundings of the largest value."""
    assert found.shape == exact.shape and found.dtype == plain.dtype
    allowed = 2 * np.abs(plain - exact).max(initial=0) + 4 * np.finfo(found.dtype).eps * np.abs(exact).max(initial=0)
    assert (np.abs(found - exact) <= allowed).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products(isa: str, shape: tuple[int, int, int], dtype: type, with_bias: bool) -> None:
    count, inputs, outputs = shape
    rows, weight, bias = arrays((count, inputs), (inputs, outputs), (outputs,), dtype=dtype)
    given = bias if with_bias else None
    found, plain = (row_product(rows, weight, given, backend=name) for name in ("native", "reference"))
    exact = rows.astype(np.longdouble) @ weight.astype(np.longdouble) + (bias if with_bias else 0)
    require_close(found, plain, exact)
    for chosen in (slice(0, 1), slice(count // 2, None), slice(3, 8)):
        assert row_product(rows[chosen], weight, given).tobytes() == found[chosen].tobytes(), "whoever stands beside"
    turned = np.asfortranarray(rows)
    assert row_product(turned, weight, given).tobytes() == found.tobytes(), "however rows lie in memory"


def pairs(
    clients: int, labels: int, first: int, second: int, width: int, most: int, both: int
) -> tuple[np.ndarray, ...]:
    state = np.random.default_rng(1)
    number = state.integers(0, min(most, labels) + 1, clients)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(number)))
    label = [np.sort(state.choice(labels, count, replace=False)) for count in number]
    of_client, of_label, of_both, both_weight, inputs, input_weight, weight, bias, last_weight, last_bias = arrays(
        *((clients, first), (first, labels), (clients, both, labels), (both, first)),
        *((offsets[-1], width), (width, first)),
        *((second, first), (second,), (second,), (1,)),
    )
    listed = np.concatenate([np.zeros(0, np.int64), *label]).astype(np.int32)
    pairs = offsets, listed, inputs, input_weight
    return of_client, of_label, of_both, both_weight, *pairs, weight, bias, last_weight, last_bias


@pytest.mark.parametrize("sizes", NETWORKS)
def test_a_network_of_pairs(isa: str, sizes: tuple[int, int, int, int, int, int, int]) -> None:
    given = pairs(*sizes)
    of_client, of_label, of_both, both_weight, offsets, label, inputs, input_weight, *last = (
        array.astype(np.float64) if array.dtype == np.float32 else array for array in given
    )
    weight, bias, last_weight, last_bias = last
    exact = np.empty((len(of_client), of_label.shape[1]))
    for client, of_one in enumerate(of_client):
        first = of_one[:, None] + of_label + both_weight.T @ of_both[client]
        of_pairs = slice(offsets[client], offsets[client + 1])
        first[:, label[of_pairs]] += (inputs[of_pairs] @ input_weight).T
        second = np.maximum(weight @ np.maximum(first, 0) + bias[:, None], 0)
        exact[client] = last_weight @ second + last_bias
    found, plain = (pair_network(*given, backend=name) for name in ("native", "reference"))
    require_close(found, plain, exact)
    for client in range(len(found)):
        one = slice(given[4][client], given[4][client + 1])
        alone = (
            given[0][client : client + 1],
            given[1],
            given[2][client : client + 1],
            given[3],
            given[4][client : client + 2] - given[4][client],
            given[5][one],
        )
        assert pair_network(*alone, given[6][one], *given[7:]).tobytes() == found[client].tobytes()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_labels_must_rise_and_lie_inside(backend: str) -> None:
    given = list(pairs(4, 6, 3, 2, 2, 3, 1))
    given[4], given[6] = np.array([0, 0, 2, 2, 2]), given[6][:2]
    for label in ([1, 1], [3, 2], [0, 6], [-1, 2]):
        given[5] = np.array(label, np.int32)
        with pytest.raises(ValueError, match="labels of a client must rise and stay below 6"):
            pair_network(*given, backend=backend)
    given[5] = np.array([0, 5], np.int32)
    assert np.isfinite(pair_network(*given, backend=backend)).all()
    given[4] = np.array([0, 2, 1, 2, 2])
    with pytest.raises(ValueError, match="offsets must rise from 0 to the 2 pairs"):
        pair_network(*given, backend=backend)


def test_wrong_arguments() -> None:
    rows, weight, bias = arrays((3, 4), (4, 5), (5,))
    with pytest.raises(ValueError, match=r"weight must have F = 4, got shape \[3, 5\]"):
        row_product(rows, weight[:3])
    with pytest.raises(ValueError, match=r"bias must have R = 5, got shape \[4\]"):
        row_product(rows, weight, bias[:4])
    with pytest.raises(ValueError, match=r"rows must be \[N, F\], got shape \[4\]"):
        row_product(rows[0], weight)
    with pytest.raises(TypeError, match="weight must be float32 or float64, all of one dtype, got float64"):
        row_product(rows, weight.astype(np.float64))
    with pytest.raises(TypeError, match="rows must be float32 or float64"):
        row_product(rows.astype(np.float16), weight.astype(np.float16))
    with pytest.raises(BackendUnavailable, match="triton"):
        row_product(rows, weight, backend="triton")
