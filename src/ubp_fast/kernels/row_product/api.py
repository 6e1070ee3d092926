"""Products of matrices in which no row knows the others: what a client gets must not depend on who is at hand.

    row_product    out = rows weight + bias
    pair_network   out[c, l] = last_bias + last_weight . max(0, bias + weight h[c, l])
                   h[c, l]   = max(0, of_client[c] + of_label[:, l] + of_both[c, :, l] both_weight
                                      + inputs[p] input_weight)

The last term is there where a pair p of c and l is given.

A BLAS orders its sums by the shape of the whole matrix, so that a row gets other roundings in other company. Here every
sum runs in the order of the inputs: the same bytes for a row alone and for a row among others. The native backend
computes several rows side by side and is about as fast as a BLAS; its additions are fused where the machine can do
that, so the bytes are those of an instruction set. One thread each: callers share out rows.
Memory: the result.
"""

from __future__ import annotations

import numpy as np

from ubp_fast.kernels import backends
from ubp_fast.kernels.row_product import _native, reference

OP = "row_product"
IMPLEMENTATIONS = {"native": _native, "reference": reference}
ORDER = ("native", "reference")


def row_product(
    rows: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, backend: str = "auto"
) -> np.ndarray:
    """rows @ weight + bias, every sum in the order of the inputs.

    Args:
        rows: [N, F] float32 or float64.
        weight: [F, R] of the same dtype.
        bias: [R] of the same dtype; None: 0.
        backend: "auto", "native" or "reference".

    Returns:
        [N, R] of that dtype.

    Raises:
        ValueError: other shapes.
        TypeError: other dtypes.
        BackendUnavailable: the named backend does not exist.
    """
    _require_shapes(rows=(rows, ("N", "F")), weight=(weight, ("F", "R")), bias=(bias, ("R",)))
    _require_dtype((np.float32, np.float64), rows=rows, weight=weight, bias=bias)
    made = IMPLEMENTATIONS[backends.resolve(OP, backend, IMPLEMENTATIONS, ORDER, rows)]
    return made.row_product(rows, weight, bias)


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
    *,
    backend: str = "auto",
) -> np.ndarray:
    """Outputs of a network of two hidden layers for every pair of a client and a label.

    Args:
        of_client: float32 [U, H], what clients bring to the first units.
        of_label: float32 [H, L], what labels bring.
        of_both: float32 [U, J, L], what is known of every pair; J may be 0.
        both_weight: float32 [J, H].
        offsets: int64 [U + 1] of the pairs of which more is known, 0 at first.
        label: int32 [P], ascending for each client.
        inputs: float32 [P, F], what is known of these pairs.
        input_weight: float32 [F, H].
        weight: float32 [K, H] of the second units.
        bias: float32 [K].
        last_weight: float32 [K].
        last_bias: float32 [1].
        backend: "auto", "native" or "reference".

    Returns:
        float32 [U, L].

    Raises:
        ValueError: other shapes, offsets that fall, labels that do not ascend or lie outside.
        TypeError: other dtypes.
        BackendUnavailable: the named backend does not exist.
    """
    arguments = (
        *(of_client, of_label, of_both, both_weight, offsets, label, inputs, input_weight),
        *(weight, bias, last_weight, last_bias),
    )
    _require_shapes(
        of_client=(of_client, ("U", "H")), of_label=(of_label, ("H", "L")), label=(label, ("P",)),
        of_both=(of_both, ("U", "J", "L")), both_weight=(both_weight, ("J", "H")),
        inputs=(inputs, ("P", "F")), input_weight=(input_weight, ("F", "H")), weight=(weight, ("K", "H")),
        bias=(bias, ("K",)), last_weight=(last_weight, ("K",)), last_bias=(last_bias, ("1",)),
    )  # fmt: skip
    floats = {
        "of_label": of_label,
        "of_both": of_both,
        "both_weight": both_weight,
        "inputs": inputs,
        "input_weight": input_weight,
        "weight": weight,
        "bias": bias,
        "last_weight": last_weight,
    }
    _require_dtype((np.float32,), of_client=of_client, **floats, last_bias=last_bias)
    if offsets.dtype != np.int64 or label.dtype != np.int32:
        raise TypeError(f"{OP}: offsets must be int64 and label int32, got {offsets.dtype} and {label.dtype}")
    if (
        len(offsets) != len(of_client) + 1
        or offsets[0] != 0
        or offsets[-1] != len(label)
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"{OP}: offsets must rise from 0 to the {len(label)} pairs, one more than clients")
    made = IMPLEMENTATIONS[backends.resolve(OP, backend, IMPLEMENTATIONS, ORDER, of_client)]
    return made.pair_network(*arguments)


def _require_shapes(**named: tuple[np.ndarray | None, tuple[str, ...]]) -> None:
    """Equal letters stand for equal sizes."""
    sizes = {"1": 1}
    for name, (array, letters) in named.items():
        if array is None:
            continue
        if array.ndim != len(letters):
            raise ValueError(f"{OP}: {name} must be [{', '.join(letters)}], got shape {list(array.shape)}")
        for letter, size in zip(letters, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{OP}: {name} must have {letter} = {sizes[letter]}, got shape {list(array.shape)}")


def _require_dtype(allowed: tuple[type, ...], **named: np.ndarray | None) -> None:
    first = next(array for array in named.values() if array is not None)
    for name, array in named.items():
        if array is not None and (array.dtype not in allowed or array.dtype != first.dtype):
            names = " or ".join(one.__name__ for one in allowed)
            raise TypeError(f"{OP}: {name} must be {names}, all of one dtype, got {array.dtype}")
