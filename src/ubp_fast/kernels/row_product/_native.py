"""The compiled CPU kernels: `csrc/row_product/cpu.cpp`, in the instruction set that suits the machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from ubp_fast import _core


def unsupported(problem: Any) -> str | None:
    """Nothing is: there is a kernel for every CPU."""
    return None


def row_product(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """See `api.row_product`."""
    out = np.empty((len(rows), weight.shape[1]), rows.dtype)
    arrays = {"rows": rows, "weight": weight, "out": out} | ({} if bias is None else {"bias": bias})
    sizes = {"count": len(rows), "inputs": rows.shape[1], "outputs": weight.shape[1]}
    made = _core.FloatProduct if rows.dtype == np.float32 else _core.DoubleProduct
    kept, addresses = _placed(arrays)
    _core.row_product(made(**addresses, **sizes))
    del kept
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
    out = np.empty((len(of_client), of_label.shape[1]), np.float32)
    arrays = {"of_client": of_client, "of_label": of_label, "of_both": of_both, "both_weight": both_weight}
    arrays |= {
        "offsets": offsets,
        "label": label,
        "inputs": inputs,
        "input_weight": input_weight,
        "weight": weight,
        "bias": bias,
        "last_weight": last_weight,
        "last_bias": last_bias,
        "out": out,
    }
    sizes = {"clients": len(of_client), "labels": of_label.shape[1], "both": len(both_weight)}
    sizes |= {"width": inputs.shape[1], "first": weight.shape[1], "second": len(weight)}
    kept, addresses = _placed(arrays)
    _core.pair_network(_core.PairNetwork(**addresses, **sizes))
    del kept
    return out


def _placed(arrays: dict[str, np.ndarray]) -> tuple[list[np.ndarray], dict[str, int]]:
    """Contiguous arrays, to be kept as long as their addresses are used."""
    kept = [np.ascontiguousarray(array) for array in arrays.values()]
    return kept, {name: array.ctypes.data for name, array in zip(arrays, kept, strict=True)}
