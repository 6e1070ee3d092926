"""Normalised-temperature cross-entropy (NT-Xent, InfoNCE) between matched rows.

For a row i with candidates C(i) and one positive p(i) among them, with s = <u_i, v_j> / temperature:

    loss_i = log sum_{j in C(i)} exp(s_ij) - s_i,p(i) = log(1 + sum_{j in C(i), j != p(i)} exp(s_ij - s_i,p(i)))
    L      = sum_i weight_i loss_i / sum_i weight_i          over valid rows; 0 if that sum of weights is 0

    dL/ds_ij     = (weight_i / sum weight) p_ij              p_ij = exp(s_ij - s_i,p(i) - loss_i), j a negative
    dL/ds_i,p(i) = -(weight_i / sum weight) sum_{negatives j} p_ij
    dL/dtemperature = -1 / temperature * sum_ij dL/ds_ij (s_ij - s_i,p(i))

Which rows meet which (N pairs left_i, right_i):

    cross      rows are left, candidates are all of right, one direction
    symmetric  mean of cross(left, right) and cross(right, left)
    simclr     2N rows [left; right], candidates are all rows but the row itself, the positive is the partner

The positive is always a candidate. Any other candidate is dropped if its row is not valid, or has the same id.

Memory: native and triton hold a few [2N, E] matrices, whatever N; the reference holds several [N, N] matrices ([2N, 2N]
for simclr) in the dtype of the inputs. All are deterministic.
Source: Sohn 2016 (N-pair loss), van den Oord et al. 2018 (InfoNCE), Chen et al. 2020 (SimCLR, NT-Xent).
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from ubp_fast.kernels import backends, deferred, transforms
from ubp_fast.kernels.checks import number, require_same, require_tensors, to_autocast
from ubp_fast.kernels.nt_xent import _cuda, _native, _triton, reference
from ubp_fast.kernels.nt_xent.reference import Problem

NEGATIVES = ("cross", "symmetric", "simclr")
MAX_WIDTH = 2048
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IMPLEMENTATIONS: dict[str, ModuleType] = {"native": _native, "triton": _triton, "cuda": _cuda, "reference": reference}
ORDER = ("native", "triton", "reference")
SCHEMA = "Tensor left, Tensor right, Tensor temperature, str negatives, Tensor? weight, Tensor? valid, Tensor? ids"


def nt_xent(
    left: Tensor,
    right: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negatives: str = "cross",
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    ids: Tensor | None = None,
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Contrastive loss of matched rows: row i of left belongs to row i of right, all other rows are negatives.

    With the defaults it equals
    `F.cross_entropy(F.normalize(left) @ F.normalize(right).T / temperature, torch.arange(N))`.

    Args:
        left: [N, E], float32, bfloat16, float16 or float64, N >= 0, 1 <= E <= 2048. Under `torch.autocast` both sides
            become its dtype (float64 stays).
        right: [N, E], dtype and device of left.
        temperature: > 0 and finite; a number, or a floating tensor with one element, which then gets its gradient; on
            the device of the rows, or its gradient has to wait for the device.
        negatives: "cross" (rows of left against all of right), "symmetric" (both directions, mean of the two) or
            "simclr" (2N rows, everything against everything but itself).
        weight: [N] floating, >= 0 and finite: the loss is the weighted mean over rows. A weight acts on a row's own
            loss (on both rows of its pair for symmetric and simclr), never on its part as a negative. None: all 1.
            No gradient flows to it.
        valid: [N] bool; rows that are False leave the loss and the negatives, their gradient is 0, and they may hold
            anything, NaN included. None: all rows are valid.
        ids: [N] integer; rows with the same id are no negatives of each other. None: all ids differ.
        normalize: divide every row by its length first. Zero rows stay zero and get gradient 0.
        backend: "auto" or a name. "auto" is, for float32, bfloat16 and float16, "native" on the CPU and "triton" on
            NVIDIA GPUs, else "reference" (float64). Native computes small problems in float64, and so all others whose
            similarities divided by the temperature may exceed 60 (for bfloat16 it stays with its own products): about
            half the speed. Triton multiplies float32 rows in float64. "cuda" must be named: no device has run it yet.

    Returns:
        0-d loss: float32, float64 for float64 inputs. 0 (gradients 0) if no row is valid or all weights are 0.
        Without `normalize`, similarities beyond the range of the dtype overflow as in any matrix product.

    Derivatives beyond a plain backward (second ones, forward mode, transforms of `torch.func`, batched gradients) are
    those of the reference, which "auto" takes for them, with its N x N matrices. A backend that is named refuses them.
    Under `torch.vmap` values are not checked.

    Raises:
        ValueError: shapes, temperature or weight break the rules above, or a valid row is not finite (named). One pass
            over the [N, E] inputs. On a CUDA device nothing waits for it: a later call raises (`check_deferred`).
        TypeError: a dtype breaks the rules above.
        BackendUnavailable: the named backend does not exist, or not for this problem.
    """
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        require_tensors("nt_xent", left=left, right=right)
    left, right = to_autocast(left, right)
    _check_arguments(left, right, negatives, weight, valid, ids)
    tau = _temperature_tensor(temperature, left.device)
    if transforms.is_transforming():
        return _transformed(left, right, tau, negatives, weight, valid, ids, normalize, backend)
    loss, _ = _nt_xent(left, right, tau, negatives, weight, valid, ids, normalize, backend)
    return loss


@transforms.outside_of_graphs("nt_xent in a transform of torch.func is computed outside of the graph")
def _transformed(left, right, temperature, negatives, weight, valid, ids, normalize, backend) -> Tensor:
    """The reference, through which transforms of PyTorch see its operations."""
    transforms.require_reference("nt_xent", backend)
    values = [
        None if part is None else transforms.untransformed(part) for part in (left, right, temperature, weight, valid)
    ]
    with transforms.outside_of_transforms():  # inside nobody may look at a value
        if not any(part is not None and is_batchedtensor(part) for part in values):
            _check_values(*values)  # type: ignore[arg-type]
    problem = _problem(left, right, temperature, negatives, weight, valid, ids, normalize)
    return reference.forward(problem)[0]


def _check_arguments(
    left: Tensor, right: Tensor, negatives: str, weight: Tensor | None, valid: Tensor | None, ids: Tensor | None
) -> None:
    if left.ndim != 2:
        raise ValueError(f"nt_xent: left must have shape [N, E], got {list(left.shape)}")
    if right.shape != left.shape:
        raise ValueError(
            f"nt_xent: right must have shape [N, E] = {list(left.shape)} like left, got {list(right.shape)}"
        )
    if not 1 <= left.shape[1] <= MAX_WIDTH:
        raise ValueError(f"nt_xent: left must have a width E in 1..{MAX_WIDTH}, got {left.shape[1]}")
    if left.dtype not in FLOATS:
        raise TypeError(f"nt_xent: left must be float32, float64, bfloat16 or float16, got {left.dtype}")
    require_same("nt_xent", "left", left, right=right)
    if negatives not in NEGATIVES:
        raise ValueError(f"nt_xent: negatives must be one of {list(NEGATIVES)}, got '{negatives}'")
    for name, rows in (("weight", weight), ("valid", valid), ("ids", ids)):
        if rows is None:
            continue
        require_tensors("nt_xent", **{name: rows})
        if rows.shape != left.shape[:1]:
            raise ValueError(f"nt_xent: {name} must have shape [N] = [{left.shape[0]}], got {list(rows.shape)}")
        if rows.device != left.device:
            raise ValueError(f"nt_xent: {name} must be on the device of left, {left.device}, got {rows.device}")
    if weight is not None and not weight.is_floating_point():
        raise TypeError(f"nt_xent: weight must be floating, got {weight.dtype}")
    if weight is not None and weight.requires_grad:
        raise ValueError("nt_xent: weight must not require a gradient, got one that does; pass weight.detach()")
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"nt_xent: valid must be bool, got {valid.dtype}")
    if ids is not None and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"nt_xent: ids must be integers, got {ids.dtype}")


def _temperature_tensor(temperature: float | Tensor, device: torch.device) -> Tensor:
    """0-d tensor; the value of a tensor is checked inside the op, where reading it cannot break a graph."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                "nt_xent: temperature must be a number or a floating tensor with one element,"
                f" got shape {list(temperature.shape)}, {temperature.dtype}"
            )
        return temperature.reshape(())
    temperature = number("nt_xent", "temperature", temperature)
    _check_temperature(temperature)
    return torch.full((), temperature, dtype=torch.float64, device=device)


def _check_temperature(value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"nt_xent: temperature must be finite and > 0, got {value}")


def _check_values(
    left: Tensor, right: Tensor, temperature: Tensor, weight: Tensor | None, valid: Tensor | None
) -> None:
    """Value rules, for valid rows only."""
    is_deferred = deferred.is_deferred(temperature.device)
    if is_deferred:
        is_bad = ~((temperature > 0) & torch.isfinite(temperature))
        deferred.report(deferred.fault(is_bad, ValueError, "nt_xent: temperature must be finite and > 0"))
    else:
        _check_temperature(float(temperature))
    for name, rows in (("left", left), ("right", right)):
        # The quick look: a finite sum has finite parts. Rows that are not valid may hold anything.
        if not is_deferred and math.isfinite(rows.sum(dtype=torch.float64).item()):
            continue
        bad = ~torch.isfinite(rows).all(dim=1)
        _raise_bad_rows(name, "be finite in every valid row", bad, valid, "mark such rows in `valid` or repair them")
    if weight is not None:
        bad = ~(torch.isfinite(weight) & (weight >= 0))
        _raise_bad_rows("weight", "be finite and >= 0", bad, valid, "clip the weights", weight)


def _raise_bad_rows(
    name: str, rule: str, bad: Tensor, valid: Tensor | None, remedy: str, values: Tensor | None = None
) -> None:
    bad = bad if valid is None else bad & valid
    if deferred.is_deferred(bad.device):
        deferred.report(deferred.fault(bad.any(), ValueError, f"nt_xent: {name} must {rule}; {remedy}"))
    elif bool(bad.any()):
        first = int(bad.nonzero()[0])
        value = "NaN or infinity" if values is None else f"{float(values[first]):g}"
        raise ValueError(f"nt_xent: {name} must {rule}, got {value} in row {first} ({int(bad.sum())} rows); {remedy}")


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the loss for inputs of that dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _problem(
    left: Tensor,
    right: Tensor,
    temperature: Tensor,
    negatives: str,
    weight: Tensor | None,
    valid: Tensor | None,
    ids: Tensor | None,
    normalize: bool,
) -> Problem:
    dtype = loss_dtype(left.dtype)
    if weight is None:
        row_weight = torch.ones(len(left), dtype=dtype, device=left.device)
    else:
        # Largest weight 1 in the weights' own dtype: a small common factor cannot underflow on the way.
        largest = weight.masked_fill(~valid, 0) if valid is not None else weight
        peak = largest.amax() if len(weight) else weight.new_ones(())
        row_weight = (largest / torch.where(peak > 0, peak, torch.ones_like(peak))).to(dtype)
    if valid is not None:
        row_weight = row_weight.masked_fill(~valid, 0)
    ids = None if ids is None else ids.to(torch.int64)
    return Problem(left, right, temperature, negatives, row_weight, valid, ids, normalize)


@torch.library.custom_op(
    "ubp_fast::nt_xent",
    mutates_args=(),
    schema=f"({SCHEMA}, bool normalize, str backend) -> (Tensor, Tensor)",
)
def _nt_xent(left, right, temperature, negatives, weight, valid, ids, normalize, backend):
    deferred.poll(left.device)
    _check_values(left, right, temperature, weight, valid)
    problem = _problem(left, right, temperature, negatives, weight, valid, ids, normalize)
    return _implementation(backend, problem).forward(problem)


@torch.library.custom_op(
    "ubp_fast::nt_xent_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor row_losses, {SCHEMA}, bool normalize, str backend) -> (Tensor, Tensor, Tensor)",
)
def _nt_xent_backward(grad, row_losses, left, right, temperature, negatives, weight, valid, ids, normalize, backend):
    problem = _problem(left, right, temperature, negatives, weight, valid, ids, normalize)
    return _implementation(backend, problem).backward(problem, grad, row_losses)


def _implementation(backend: str, problem: Problem) -> ModuleType:
    return IMPLEMENTATIONS[backends.resolve("nt_xent", backend, IMPLEMENTATIONS, ORDER, problem)]


@_nt_xent.register_fake
def _fake_forward(left, right, temperature, negatives, weight, valid, ids, normalize, backend):
    dtype = loss_dtype(left.dtype)
    rows = left.shape[0] * (1 if negatives == "cross" else 2)
    return left.new_empty((), dtype=dtype), left.new_empty((rows,), dtype=torch.float64)


@_nt_xent_backward.register_fake
def _fake_backward(grad, row_losses, left, right, temperature, negatives, weight, valid, ids, normalize, backend):
    return left.new_empty(left.shape), right.new_empty(right.shape), torch.empty_like(temperature)


def _setup_context(ctx, inputs, output):
    left, right, temperature, ctx.negatives, weight, valid, ids, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(output[1], left, right, temperature, weight, valid, ids)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    row_losses, left, right, temperature, weight, valid, ids = ctx.saved_tensors
    more = (ctx.negatives, weight, valid, ids, ctx.normalize)
    if torch.is_grad_enabled() or transforms.is_transforming():
        transforms.require_reference("nt_xent", ctx.backend)
        gradients = transforms.differentiable_gradients(
            lambda *inputs: reference.forward(_problem(*inputs, *more))[0],
            (left, right, temperature),
            ctx.needs_input_grad,
            grad,
        )
    else:
        gradients = _nt_xent_backward(grad, row_losses, left, right, temperature, *more, ctx.backend)
    wanted = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None, None, None)


_nt_xent.register_autograd(_backward, setup_context=_setup_context)
