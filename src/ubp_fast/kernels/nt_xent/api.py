"""Normalised-temperature cross-entropy (NT-Xent, InfoNCE): queries, their positives, and candidates.

For a query i with negatives C(i) and the positive p(i), with s = <u_i, v_j> / temperature + bias_j:

    loss_i = log(1 + sum_{j in C(i)} exp(s_ij - s_i,p(i)))
    L      = sum_i weight_i loss_i / sum_i weight_i          over valid rows; 0 if that sum of weights is 0

    dL/ds_ij     = (weight_i / sum weight) p_ij              p_ij = exp(s_ij - s_i,p(i) - loss_i), j a negative
    dL/ds_i,p(i) = -(weight_i / sum weight) sum_{negatives j} p_ij
    dL/dtemperature = -1 / temperature * sum_ij dL/ds_ij (s_ij - s_i,p(i)), of s without biases

Which rows meet which (N rows of left, M of right):

    cross      rows of left are queries, all of right candidates; row i belongs to row i, or where `positive` says
    symmetric  N = M: mean of cross(left, right) and cross(right, left)
    simclr     N = M: 2N rows [left; right], candidates are all rows but the row itself, the positive is the partner

The positive is always a candidate. Any other candidate is dropped if its row is not valid, or has the same id.

Memory: native and triton hold a few matrices of the inputs' size, whatever N and M; the reference holds several [N, M]
matrices ([2N, 2N] for simclr) in the dtype of the inputs. All are deterministic.
Source: Sohn 2016 (N-pair loss), van den Oord et al. 2018 (InfoNCE), Chen et al. 2020 (SimCLR, NT-Xent), He et al. 2020
(queues), Yi et al. 2019 (log-Q correction).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.nn import functional

from ubp_fast.kernels import backends, deferred, transforms
from ubp_fast.kernels.checks import number, require_same, require_tensors, to_autocast
from ubp_fast.kernels.nt_xent import _native, _triton, reference
from ubp_fast.kernels.nt_xent.reference import Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NEGATIVES = ("cross", "symmetric", "simclr")
REDUCTIONS = ("mean", "sum", "none")
MAX_WIDTH = 2048
LARGEST_SERIAL_SUM = 32_767  # PyTorch divides larger ones among its threads
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IMPLEMENTATIONS: dict[str, ModuleType] = {"native": _native, "triton": _triton, "reference": reference}
ORDER = ("native", "triton", "reference")
SCHEMA = (
    "Tensor left, Tensor right, Tensor? positive, Tensor temperature, str negatives, Tensor? valid,"
    " Tensor? right_valid, Tensor? ids, Tensor? right_ids, Tensor? places, Tensor? bias, Tensor? positive_bias,"
    " Tensor? weight, bool normalize, str backend"
)


def nt_xent(
    left: Tensor,
    right: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negatives: str = "cross",
    positive: Tensor | None = None,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    ids: Tensor | None = None,
    candidate_valid: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    candidate_bias: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
    backend: str = "auto",
) -> Tensor:
    """Contrastive loss: row i of left belongs to row i of right, or where `positive` says; other rows are negatives.

    With the defaults it equals
    `F.cross_entropy(F.normalize(left) @ F.normalize(right).T / temperature, torch.arange(N))`.

    Args:
        left: queries [N, E], float32, bfloat16, float16 or float64, N >= 0, 1 <= E <= 2048. Under `torch.autocast` all
            rows become its dtype (float64 stays).
        right: candidates [M, E], dtype and device of left; M = N without `positive`.
        temperature: > 0 and finite; a number, or a floating tensor with one element, which then gets its gradient; on
            the device of the rows, or its gradient has to wait for the device.
        negatives: "cross" (rows of left against all of right), "symmetric" (both directions, mean of the two) or
            "simclr" (2N rows, everything against everything but itself).
        positive: what belongs to each query, for "cross" only. int64 [N]: its row of right, in 0..M - 1, one that is
            valid where the query is. Rows [N, E], dtype of left: the positives themselves, which need not be candidates
            and are no negatives of other queries; they get their gradient. With a queue of past candidates, right is
            the queue. None: row i of right.
        weight: [N] floating, >= 0 and finite: the loss is the weighted mean over rows. A weight acts on a row's own
            loss (on both rows of its pair for symmetric and simclr), never on its part as a negative. None: all 1.
            No gradient flows to it.
        valid: [N] bool; rows that are False leave the loss and the negatives, their gradient is 0, and they may hold
            anything, NaN included. With `positive` it is of the queries, and candidates have their own. None: all rows
            are valid.
        ids: [N] integer; rows with the same id are no negatives of each other. None: all ids differ.
        candidate_valid: [M] bool, for "cross" only; None: `valid` without `positive`, else all.
        candidate_ids: [M] integer, for "cross" only: candidates with the id of the query are no negatives of it. None:
            `ids` without `positive`, else none.
        candidate_bias: [M] floating, finite, for "cross" only: added to similarity / temperature of a candidate, as
            negative and as positive (0 for rows given as positives). -log q of a candidate that was drawn with
            probability q corrects for the drawing; log w lets a negative count w times. No gradient flows to it.
        normalize: divide every row by its length first. Zero rows stay zero and get gradient 0.
        reduction: "mean", "sum" (of weight times loss) or "none" (weight times loss of each row, 0 where it is not
            valid; the mean of its two directions for symmetric and simclr).
        group: processes of `torch.distributed` that share the loss: rows are the local ones, any number on each (also
            none), candidates those of all. Mean and sum are of all rows and the same number everywhere; the local rows
            get their gradient of it, and what the processes share, such as the temperature, has the sum of their
            gradients. All make the same calls with the same options. Without `positive`, `candidate_valid` and
            `candidate_ids`. None: this process alone.
        exchange: with a group, "gather" (each process holds the rows of all) or "ring" (those of one other at a time:
            memory does not grow with their number; only plain backwards).
        backend: "auto" or a name. "auto" is, for float32, bfloat16 and float16, "native" on the CPU and "triton" on
            NVIDIA GPUs, else "reference" (float64). Native computes small problems in float64, and so all others whose
            similarities divided by the temperature may exceed 60 (for bfloat16 it stays with its own products): about
            half the speed. Triton multiplies float32 rows in float64.

    Returns:
        0-d loss, or [N] for reduction "none": float32, float64 for float64 inputs. 0 (gradients 0) if no row is valid
        or all weights are 0. Without `normalize`, similarities beyond the range of the dtype overflow as in any matrix
        product.

    Derivatives beyond a plain backward (second ones, forward mode, transforms of `torch.func`, batched gradients) are
    those of the reference, which "auto" takes for them, with its N x M matrices. A backend that is named refuses them.
    Under `torch.vmap` values are not checked.

    Raises:
        ValueError: shapes, temperature, weight or positions break the rules above, or a valid row is not finite
            (named). One pass over the inputs. On a CUDA device nothing waits for it: a later call raises
            (`check_deferred`).
        TypeError: a dtype breaks the rules above.
        BackendUnavailable: the named backend does not exist, or not for this problem.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"nt_xent: reduction must be one of {list(REDUCTIONS)}, got '{reduction}'")
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        require_tensors("nt_xent", left=left, right=right)
    left, right = to_autocast(left, right)
    _check_rows(left, right, negatives)
    _check_facts("N", left, weight=weight, valid=valid, ids=ids)
    tau = _temperature_tensor(temperature, left.device)
    if group is not None:
        given = {"positive": positive, "candidate_valid": candidate_valid, "candidate_ids": candidate_ids}
        given |= {} if negatives == "cross" else {"candidate_bias": candidate_bias}
        for name, part in given.items():
            if part is not None:
                raise ValueError(f"nt_xent: {name} must be None with a group and negatives='{negatives}', got a tensor")
        _require_pairs(left, right)
        _check_facts("N", right, candidate_bias=candidate_bias)
        bias = None if candidate_bias is None else candidate_bias.to(torch.float64)
        more = (weight, valid, _long(ids), bias, normalize, backend, group, exchange)
        return _over_ranks(left, right, tau, negatives, more, reduction)
    of_candidates = {"valid": candidate_valid, "ids": candidate_ids, "bias": candidate_bias}
    if positive is None and all(part is None for part in of_candidates.values()):
        _require_pairs(left, right)
        places = rows = right_valid = right_ids = bias = positive_bias = None
    else:
        if negatives != "cross":
            raise ValueError(
                f"nt_xent: negatives must be 'cross' with positive or candidate_valid, _ids, _bias, got '{negatives}'"
            )
        rows, places = _positives(left, right, positive)
        _check_facts("M", right, **{f"candidate_{name}": part for name, part in of_candidates.items()})
        is_paired = positive is None
        right_valid = valid if is_paired and candidate_valid is None else candidate_valid
        right_ids = ids if is_paired and candidate_ids is None else candidate_ids
        if (ids is None) != (right_ids is None):
            raise ValueError("nt_xent: ids and candidate_ids must be given together, got one of them")
        bias, positive_bias = candidate_bias, None
        if bias is not None:
            bias = bias.to(torch.float64)
            positive_bias = bias.new_zeros(len(left)) if places is None else bias[_inside(places, right)]
    facts = (
        negatives,
        valid,
        right_valid,
        _long(ids),
        _long(right_ids),
        places,
        bias,
        positive_bias,
        weight,
        normalize,
    )
    row_losses = row_losses_of(left, right, rows, tau, *facts, backend)
    return reduced(row_losses, row_weight(left, weight, valid), reduction, loss_dtype(left.dtype), negatives != "cross")


@torch.compiler.disable
def _over_ranks(
    left: Tensor, right: Tensor, temperature: Tensor, negatives: str, more: tuple[Any, ...], reduction: str
) -> Tensor:
    from ubp_fast.kernels.nt_xent import ranks  # it takes this module's parts, and few need it

    weight, valid, *_, group, exchange = more
    if exchange not in ranks.EXCHANGES:
        raise ValueError(f"nt_xent: exchange must be one of {list(ranks.EXCHANGES)}, got '{exchange}'")
    losses = ranks.row_losses(left, right, temperature, negatives, *more)
    weights, dtype = row_weight(left, weight, valid), loss_dtype(left.dtype)
    total = ranks.total(weights.sum(), group)
    # In float64 until all parts are there.
    share = reduced(losses, weights, reduction, torch.float64, negatives != "cross", total)
    if reduction == "none":
        return share.to(dtype)
    return (ranks.total(share, group) + (share - share.detach())).to(dtype)


def row_losses_of(*arguments: Any) -> Tensor:
    """Row losses [N] or [2N] of the arguments of `SCHEMA`, float32 or wider, by what may differentiate them."""
    found: Tensor = _transformed(*arguments) if transforms.is_transforming() else _direct(*arguments)
    return found


def row_weight(left: Tensor, weight: Tensor | None, valid: Tensor | None) -> Tensor:
    """Weight of each row, float64 [N], 0 where it is not valid."""
    if weight is None:
        found = torch.ones(left.shape[0], dtype=torch.float64, device=left.device)
    else:
        found = weight.to(torch.float64)
    return found if valid is None else found.masked_fill(~valid, 0)


def reduced(
    row_losses: Tensor,
    weight: Tensor,
    reduction: str,
    dtype: torch.dtype,
    is_both: bool = False,
    total: Tensor | None = None,
) -> Tensor:
    """The loss from row losses [N], of both directions [2N], and weights [N]; `total` None: the sum of weights."""
    losses = row_losses.view(2, weight.shape[0]).mean(dim=0) if is_both else row_losses
    # What no weight counts may be anything.
    weighted = torch.where(weight == 0, torch.zeros_like(weight), losses * weight)
    if reduction == "none":
        return weighted.to(dtype)
    if reduction == "sum":
        return weighted.sum().to(dtype)
    total = weight.sum() if total is None else total
    return (weighted.sum() / torch.where(total == 0, torch.ones_like(total), total)).to(dtype)


@transforms.outside_of_graphs("nt_xent in a transform of torch.func is computed outside of the graph")
def _transformed(left, right, positive, temperature, negatives, *others) -> Tensor:
    """The reference, through which transforms of PyTorch see its operations."""
    *facts, weight, normalize, backend = others
    transforms.require_reference("nt_xent", backend)
    tensors = (left, right, positive, temperature, *facts, weight)
    values = [None if part is None else transforms.untransformed(part) for part in tensors]
    with transforms.outside_of_transforms():  # inside nobody may look at a value
        if not any(part is not None and is_batchedtensor(part) for part in values):
            check_values(*values)  # type: ignore[arg-type]
    problem = problem_of(left, right, positive, temperature, negatives, *facts, normalize=normalize)
    return reference.forward(problem)


def _require_pairs(left: Tensor, right: Tensor) -> None:
    if right.shape != left.shape:
        raise ValueError(
            f"nt_xent: right must have shape [N, E] = {list(left.shape)} like left, got {list(right.shape)};"
            " other numbers of rows need `positive`"
        )


def _positives(left: Tensor, right: Tensor, positive: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The positive of each query, and its row of right where it is one."""
    count = len(left)
    if positive is None:
        _require_pairs(left, right)
        return right, torch.arange(count, device=left.device)
    require_tensors("nt_xent", positive=positive)
    if positive.is_floating_point():
        (positive,) = to_autocast(positive)
        require_same("nt_xent", "left", left, positive=positive)
        if positive.shape != left.shape:
            raise ValueError(
                f"nt_xent: positive must have shape [N, E] = {list(left.shape)} like left, got {list(positive.shape)}"
            )
        return positive, None
    if positive.dtype != torch.int64:
        raise TypeError(f"nt_xent: positive must be int64, or rows with the dtype of left, got {positive.dtype}")
    _check_facts("N", left, positive=positive)
    if count and not len(right):
        raise ValueError(f"nt_xent: right must hold the positives of {count} queries, got no row")
    # Its backward adds up in one order, whatever the threads; that of an index does not.
    return functional.embedding(_inside(positive, right), right), positive


def _inside(places: Tensor, right: Tensor) -> Tensor:
    """Places for reading: those of rows that are not valid may lie anywhere, others are checked with the values."""
    return places.clamp(0, max(0, len(right) - 1))


def _check_rows(left: Tensor, right: Tensor, negatives: str) -> None:
    for name, rows in (("left", left), ("right", right)):
        if rows.ndim != 2:
            size = "N" if name == "left" else "M"
            raise ValueError(f"nt_xent: {name} must have shape [{size}, E], got {list(rows.shape)}")
    if right.shape[1] != left.shape[1]:
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


def _check_facts(size: str, of: Tensor, **facts: Tensor | None) -> None:
    """One number for each row of `of`, of the kind that the name says."""
    for name, rows in facts.items():
        if rows is None:
            continue
        require_tensors("nt_xent", **{name: rows})
        if rows.shape != of.shape[:1]:
            raise ValueError(f"nt_xent: {name} must have shape [{size}] = [{of.shape[0]}], got {list(rows.shape)}")
        if rows.device != of.device:
            raise ValueError(f"nt_xent: {name} must be on the device of left, {of.device}, got {rows.device}")
        if name.endswith("valid"):
            if rows.dtype != torch.bool:
                raise TypeError(f"nt_xent: {name} must be bool, got {rows.dtype}")
        elif name.endswith("ids"):
            if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
                raise TypeError(f"nt_xent: {name} must be integers, got {rows.dtype}")
        elif name.endswith(("weight", "bias")):
            if not rows.is_floating_point():
                raise TypeError(f"nt_xent: {name} must be floating, got {rows.dtype}")
            if rows.requires_grad:
                raise ValueError(
                    f"nt_xent: {name} must not require a gradient, got one that does; pass {name}.detach()"
                )


def _long(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.to(torch.int64)


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
    if not 0 < value < math.inf:  # `isfinite` would end a graph of which the number is an input
        raise ValueError(f"nt_xent: temperature must be finite and > 0, got {value}")


def check_values(
    left: Tensor,
    right: Tensor,
    positive: Tensor | None,
    temperature: Tensor,
    valid: Tensor | None,
    right_valid: Tensor | None,
    ids: Tensor | None,
    right_ids: Tensor | None,
    places: Tensor | None,
    bias: Tensor | None,
    positive_bias: Tensor | None,
    weight: Tensor | None,
) -> None:
    """Value rules, for valid rows only."""
    is_deferred = deferred.is_deferred(temperature.device)
    if is_deferred:
        is_bad = ~((temperature > 0) & torch.isfinite(temperature))
        deferred.report(deferred.fault(is_bad, ValueError, "nt_xent: temperature must be finite and > 0"))
    else:
        _check_temperature(float(temperature))
    if places is not None:
        last = len(right) - 1
        is_outside = (places < 0) | (places > last)
        _raise_bad_rows("positive", f"be a row of right, 0..{last},", is_outside, valid, "", places)
        if right_valid is not None and len(right):
            is_lost = ~right_valid[_inside(places, right)]
            remedy = "mark such queries in `valid`, too"
            _raise_bad_rows("positive", "be valid where the query is,", is_lost, valid, remedy, places)
    right_valid = valid if positive is None else right_valid
    own = positive if places is None else None
    for name, rows, kept in (("left", left, valid), ("right", right, right_valid), ("positive", own, valid)):
        # Rows that are not valid may hold anything.
        if rows is None or (not is_deferred and _has_finite_sum(rows)):
            continue
        bad = ~torch.isfinite(rows).all(dim=1)
        _raise_bad_rows(name, "be finite in every valid row", bad, kept, "mark such rows in `valid` or repair them")
    if bias is not None:
        _raise_bad_rows("candidate_bias", "be finite", ~torch.isfinite(bias), right_valid, "clip it", bias)
    if weight is not None:
        bad = ~(torch.isfinite(weight) & (weight >= 0))
        _raise_bad_rows("weight", "be finite and >= 0", bad, valid, "clip the weights", weight)


def _has_finite_sum(rows: Tensor) -> bool:
    """The quick look: a finite sum has finite parts. Sums that overflow are left to the long look.

    On a CPU in pieces that PyTorch sums on the thread that calls. Its helpers, once awake, keep cores busy for
    milliseconds in which they wait for more, and the kernel's threads need those cores.
    """
    pieces = rows.detach().reshape(-1).split(LARGEST_SERIAL_SUM if rows.is_cpu else max(1, rows.numel()))
    return math.isfinite(sum(piece.sum().item() for piece in pieces))


def _raise_bad_rows(
    name: str, rule: str, bad: Tensor, valid: Tensor | None, remedy: str, values: Tensor | None = None
) -> None:
    bad = bad if valid is None else bad & valid
    remedy = remedy and f"; {remedy}"
    if deferred.is_deferred(bad.device):
        deferred.report(deferred.fault(bad.any(), ValueError, f"nt_xent: {name} must {rule.rstrip(',')}{remedy}"))
    elif bool(bad.any()):
        first = int(bad.nonzero()[0])
        value = "NaN or infinity" if values is None else f"{float(values[first]):g}"
        raise ValueError(
            f"nt_xent: {name} must {rule.rstrip(',')}, got {value} in row {first} ({int(bad.sum())} rows){remedy}"
        )


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the loss for inputs of that dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def problem_of(
    left: Tensor,
    right: Tensor,
    positive: Tensor | None,
    temperature: Tensor,
    negatives: str,
    valid: Tensor | None,
    right_valid: Tensor | None,
    ids: Tensor | None,
    right_ids: Tensor | None,
    places: Tensor | None,
    bias: Tensor | None,
    positive_bias: Tensor | None,
    *,
    normalize: bool,
) -> Problem:
    if positive is None:
        right_valid, right_ids = valid, ids
    elif places is None:
        places = torch.full((len(left),), -1, device=left.device)
    if valid is not None:  # rows that are not valid may have anything
        places = None if places is None else places.masked_fill(~valid, -1)
        positive_bias = None if positive_bias is None else positive_bias.masked_fill(~valid, 0)
    if right_valid is not None and bias is not None:
        bias = bias.masked_fill(~right_valid, 0)
    facts = (valid, right_valid, ids, right_ids, places, bias, positive_bias)
    return Problem(left, right, positive, temperature, negatives, *facts, normalize=normalize)


@torch.library.custom_op("ubp_fast::nt_xent", mutates_args=(), schema=f"({SCHEMA}) -> Tensor")
def _nt_xent(left, right, positive, temperature, negatives, *facts):
    *facts, weight, normalize, backend = facts
    deferred.poll(left.device)
    check_values(left, right, positive, temperature, *facts, weight)
    problem = problem_of(left, right, positive, temperature, negatives, *facts, normalize=normalize)
    return implementation(backend, problem).forward(problem).to(torch.float64)


@torch.library.custom_op(
    "ubp_fast::nt_xent_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor row_losses, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _nt_xent_backward(grad, row_losses, left, right, positive, temperature, negatives, *facts):
    *facts, _, normalize, backend = facts
    problem = problem_of(left, right, positive, temperature, negatives, *facts, normalize=normalize)
    found = backward_of(problem, backend, grad, row_losses)
    return tuple(left.new_empty(0) if part is None else part for part in found)


def backward_of(
    problem: Problem, backend: str, grad: Tensor, row_losses: Tensor, shares: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of left, right, positive and temperature from those of all row losses; all float64.

    Shares are those of `reference.backward`; None: right holds all candidates.
    """
    if not len(grad):
        nothing = [None if part is None else torch.zeros_like(part) for part in problem[:4]]
        return tuple(nothing)  # type: ignore[return-value]
    # Largest weight 1: kernels keep small numbers in 16 bits.
    peak = grad.abs().amax()
    factor = torch.where(peak > 0, peak, torch.ones_like(peak))
    found: tuple[Tensor, Tensor, Tensor | None, Tensor] = implementation(backend, problem).backward(
        problem, grad / factor, factor, row_losses, -torch.expm1(-row_losses) if shares is None else shares
    )
    return found


def implementation(backend: str, problem: Problem) -> ModuleType:
    return IMPLEMENTATIONS[backends.resolve("nt_xent", backend, IMPLEMENTATIONS, ORDER, problem)]


_direct, _direct_backward = transforms.direct(_nt_xent), transforms.direct(_nt_xent_backward)


@_nt_xent.register_fake
def _fake_forward(left, right, positive, temperature, negatives, *facts):
    return left.new_empty((left.shape[0] * (1 if negatives == "cross" else 2),), dtype=torch.float64)


@_nt_xent_backward.register_fake
def _fake_backward(grad, row_losses, left, right, positive, temperature, negatives, *facts):
    of_positive = left.new_empty(0) if positive is None else positive.new_empty(positive.shape)
    return left.new_empty(left.shape), right.new_empty(right.shape), of_positive, torch.empty_like(temperature)


def _setup_context(ctx, inputs, output):
    left, right, positive, temperature, ctx.negatives, *facts, _, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(output, left, right, positive, temperature, *facts)


def _backward(ctx, grad):
    row_losses, left, right, positive, temperature, *facts = ctx.saved_tensors
    rows = (left, right, positive, temperature)
    if torch.is_grad_enabled() or transforms.is_transforming():
        transforms.require_reference("nt_xent", ctx.backend)
        gradients = transforms.differentiable_gradients(
            lambda *inputs: reference.forward(
                problem_of(*inputs, ctx.negatives, *facts, normalize=ctx.normalize)
            ).double(),
            rows,
            ctx.needs_input_grad,
            grad,
        )
    else:
        more = (ctx.negatives, *facts, None, ctx.normalize, ctx.backend)
        gradients = _direct_backward(grad, row_losses.detach(), *rows, *more)
    wanted = [gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False)]
    return (*wanted, *[None] * (len(ctx.needs_input_grad) - len(wanted)))


_nt_xent.register_autograd(_backward, setup_context=_setup_context)
