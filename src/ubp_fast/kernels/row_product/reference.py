"""Plain NumPy: one input after the other for all rows."""

from __future__ import annotations

from typing import Any

import numpy as np


def unsupported(problem: Any) -> str | None:
    """Nothing is."""
    return None


def row_product(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """See `api.row_product`."""
    out = np.zeros((len(rows), weight.shape[1]), rows.dtype)
    out += 0 if bias is None else bias
    for column in range(rows.shape[1]):
        out += rows[:, column, None] * weight[column]
    return out


def pair_network(
    of_client: np.ndarray,
    of_label: np.ndarray,
    of_both: np.ndarray,
    both_weight: np.ndarray,
    offsets: np.ndarray,
    label: np.ndarray,
    inputs: np.ndarray,
    input_weight: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    last_weight: np.ndarray,
    last_bias: np.ndarray,
) -> np.ndarray:
    """See `api.pair_network`."""
    first = of_client[:, None] + of_label.T
    for both in range(len(both_weight)):
        first += of_both[:, both, :, None] * both_weight[both]
    client = np.repeat(np.arange(len(of_client)), np.diff(offsets))
    if len(label) and (
        label.min() < 0 or label.max() >= first.shape[1] or (np.diff(label)[np.diff(client) == 0] < 1).any()
    ):
        raise ValueError(f"row_product: labels of a client must rise and stay below {first.shape[1]}")
    first[client, label] += row_product(inputs, input_weight, None)
    rows = np.maximum(first, 0).reshape(-1, first.shape[2])
    second = np.maximum(row_product(rows, np.ascontiguousarray(weight.T), bias), 0)
    return row_product(second, last_weight[:, None], last_bias).reshape(first.shape[:2])
