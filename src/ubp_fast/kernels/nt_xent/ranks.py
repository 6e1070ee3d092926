"""nt_xent over the processes of a group: the rows of each are queries, the rows of all of them are candidates.

    gather   every process holds all candidates; their gradients go back to their owners, added up
    ring     every process holds its own candidates and those of one other; they and their gradients travel round

The loss is that of all rows in one process, and the same number everywhere. Gradients of the local rows are those of
that loss; what all processes share, a temperature or weights of a model, has the sum of all processes' gradients.
Every process makes the same calls in the same order, backward included, also one without rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ubp_fast.kernels.nt_xent import api
from ubp_fast.kernels.nt_xent.reference import Problem

EXCHANGES = ("gather", "ring")
Group = dist.ProcessGroup


class _Pairs(NamedTuple):
    """What the processes agree on, and the facts of the local rows.

    Attributes:
        sizes: pairs of each process.
        rank: this one among them.
    """

    sizes: list[int]
    rank: int
    group: Group
    valid: Tensor | None
    ids: Tensor | None
    bias: Tensor | None
    normalize: bool
    backend: str

    @property
    def first(self) -> int:
        """Number of the first local pair among those of all processes."""
        return sum(self.sizes[: self.rank])


class _Candidates(NamedTuple):
    """Rows of one or all processes, and what belongs to them."""

    rows: Tensor
    valid: Tensor | None
    ids: Tensor | None
    bias: Tensor | None


def row_losses(
    left: Tensor,
    right: Tensor,
    temperature: Tensor,
    negatives: str,
    weight: Tensor | None,
    valid: Tensor | None,
    ids: Tensor | None,
    bias: Tensor | None,
    normalize: bool,
    backend: str,
    group: Group,
    exchange: str,
) -> Tensor:
    """Row losses of the local rows, [N] or [2N], float64.

    Raises:
        ValueError: the processes do not agree on width, dtype or options.
    """
    pairs = _agree(left, negatives, weight, valid, ids, bias, normalize, backend, group, exchange)
    queries = _ring_losses if exchange == "ring" else _gathered_losses
    if negatives == "simclr":
        # The row itself has the id of its partner.
        count = pairs.sizes[pairs.rank]
        own = torch.arange(pairs.first, pairs.first + count, device=left.device) if ids is None else ids
        twice = pairs._replace(
            sizes=[2 * size for size in pairs.sizes],
            ids=own.repeat(2),
            valid=None if valid is None else valid.repeat(2),
        )
        both, partners = torch.cat((left, right)), torch.cat((right, left))
        return queries(both, partners, both, temperature, twice, None if weight is None else weight.repeat(2))
    losses = queries(left, right, right, temperature, pairs, weight)
    if negatives == "cross":
        return losses
    return torch.cat((losses, queries(right, left, left, temperature, pairs, weight)))


def total(values: Tensor, group: Group) -> Tensor:
    """The sum over all processes, without a gradient."""
    found = values.detach().clone()
    dist.all_reduce(found, group=group)
    return found


def _agree(
    left: Tensor,
    negatives: str,
    weight: Tensor | None,
    valid: Tensor | None,
    ids: Tensor | None,
    bias: Tensor | None,
    normalize: bool,
    backend: str,
    group: Group,
    exchange: str,
) -> _Pairs:
    facts = {
        "the width": left.shape[1],
        "the dtype": api.FLOATS.index(left.dtype),
        "negatives": api.NEGATIVES.index(negatives),
        "exchange": EXCHANGES.index(exchange),
        "normalize": int(normalize),
        "weight": int(weight is not None),
        "valid": int(valid is not None),
        "ids": int(ids is not None),
        "candidate_bias": int(bias is not None),
    }
    mine = torch.tensor([len(left), *facts.values()], device=left.device)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, mine, group=group)
    numbers = torch.stack(theirs).tolist()
    for at, name in enumerate(facts, start=1):
        if len({row[at] for row in numbers}) > 1:
            raise ValueError(
                f"nt_xent: {name} must be the same in all processes of the group, or None in all, got"
                f" {[row[at] for row in numbers]} by rank"
            )
    return _Pairs([row[0] for row in numbers], dist.get_rank(group), group, valid, ids, bias, normalize, backend)


def _gathered_losses(
    queries: Tensor, positives: Tensor, candidates: Tensor, temperature: Tensor, pairs: _Pairs, weight: Tensor | None
) -> Tensor:
    everybody = _Candidates(
        _GatherRows.apply(candidates, pairs.sizes, pairs.group),
        *(None if part is None else _gathered(part, pairs) for part in (pairs.valid, pairs.ids, pairs.bias)),
    )
    count = pairs.sizes[pairs.rank]
    places = torch.arange(pairs.first, pairs.first + count, device=queries.device)
    facts = (pairs.valid, everybody.valid, pairs.ids, everybody.ids, places, everybody.bias, pairs.bias, weight)
    more = (*facts, pairs.normalize, pairs.backend)
    return api.row_losses_of(queries, everybody.rows, positives, temperature, "cross", *more)


def _gathered(values: Tensor, pairs: _Pairs) -> Tensor:
    """Rows of all processes in the order of their ranks; padded on the way, so that all send as much."""
    most = max(pairs.sizes)
    kind = torch.uint8 if values.dtype == torch.bool else values.dtype
    padded = torch.zeros((most, *values.shape[1:]), dtype=kind, device=values.device)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in pairs.sizes]
    dist.all_gather(parts, padded, group=pairs.group)
    return torch.cat([part[:size] for part, size in zip(parts, pairs.sizes, strict=True)]).to(values.dtype)


class _GatherRows(torch.autograd.Function):
    """Rows of all processes; the gradient of each row is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx, rows, sizes, group):
        ctx.pairs = _Pairs(sizes, dist.get_rank(group), group, None, None, None, False, "")
        return _gathered(rows, ctx.pairs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        sizes, own = ctx.pairs.sizes, ctx.pairs.sizes[ctx.pairs.rank]
        # Sums of 16-bit numbers would lose digits with every process.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        parts = wide.new_empty((len(sizes) * own, *grad.shape[1:]))
        dist.all_to_all_single(parts, wide, [own] * len(sizes), sizes, group=ctx.pairs.group)
        return parts.view(len(sizes), own, *grad.shape[1:]).sum(dim=0).to(grad.dtype), None, None


def _ring_losses(
    queries: Tensor, positives: Tensor, candidates: Tensor, temperature: Tensor, pairs: _Pairs, weight: Tensor | None
) -> Tensor:
    api.check_values(
        queries,
        candidates,
        positives,
        temperature,
        pairs.valid,
        pairs.valid,
        None,
        None,
        None,
        pairs.bias,
        pairs.bias,
        weight,
    )
    found: Tensor = _Ring.apply(queries, positives, candidates, temperature, pairs)
    return found


class _Ring(torch.autograd.Function):
    """Row losses of local queries among candidates that come by, one process's at a time."""

    @staticmethod
    def forward(ctx, queries, positives, candidates, temperature, pairs):
        own = _Candidates(candidates.detach(), pairs.valid, pairs.ids, pairs.bias)
        losses: list[Tensor] = []

        def look(problem: Problem, owner: int, _: Tensor | None) -> None:
            losses.append(api.implementation(pairs.backend, problem).forward(problem).double())

        _go_round(queries, positives, own, temperature, pairs, look)
        found = _joined(torch.stack(losses))
        ctx.save_for_backward(queries, positives, candidates, temperature, torch.stack(losses), found)
        ctx.pairs = pairs
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        queries, positives, candidates, temperature, parts, losses = ctx.saved_tensors
        pairs, step = ctx.pairs, 0
        own = _Candidates(candidates, pairs.valid, pairs.ids, pairs.bias)
        wide = torch.promote_types(queries.dtype, torch.float32)
        to_queries, to_positives = (torch.zeros(side.shape, dtype=wide, device=side.device) for side in (queries,) * 2)
        to_temperature = torch.zeros((), dtype=torch.float64, device=queries.device)

        def look(problem: Problem, owner: int, to_candidates: Tensor | None) -> None:
            nonlocal step
            shares = torch.expm1(parts[step]) * torch.exp(-losses)
            found = api.backward_of(problem, pairs.backend, grad, losses, shares)
            to_queries.add_(found[0])
            assert to_candidates is not None and found[2] is not None
            to_candidates.add_(found[1])
            to_positives.add_(found[2])
            to_temperature.add_(found[3])
            step += 1

        travelling = torch.zeros(candidates.shape, dtype=wide, device=candidates.device)
        travelling = _go_round(queries, positives, own, temperature, pairs, look, travelling)
        rows = (part.to(queries.dtype) for part in (to_queries, to_positives, travelling))
        return (*rows, to_temperature.to(temperature), None)


def _go_round(
    queries: Tensor,
    positives: Tensor,
    own: _Candidates,
    temperature: Tensor,
    pairs: _Pairs,
    look: Callable[[Problem, int, Tensor | None], None],
    gradient: Tensor | None = None,
) -> Tensor | None:
    """Shows every process's candidates with the problem that they are part of; the gradient comes back to its owner."""
    world, count = len(pairs.sizes), len(queries)
    here = own
    for step in range(world):
        owner = (pairs.rank + step) % world
        places = torch.arange(count, device=queries.device) if step == 0 else None
        facts = (pairs.valid, here.valid, pairs.ids, here.ids, places, here.bias, pairs.bias)
        problem = api.problem_of(queries, here.rows, positives, temperature, "cross", *facts, normalize=pairs.normalize)
        look(problem, owner, gradient)
        is_last = step == world - 1
        if not is_last:
            size = pairs.sizes[(owner + 1) % world]
            facts_of = (None if part is None else _passed_on(part, size, pairs) for part in here[1:])
            here = _Candidates(_passed_on(here.rows, size, pairs), *facts_of)
        if gradient is not None:  # after its own last look it goes home
            gradient = _passed_on(gradient, pairs.sizes[(owner + 1) % world], pairs)
    return gradient


def _passed_on(values: Tensor, size: int, pairs: _Pairs) -> Tensor:
    """To the process before this one; from the one behind it come `size` rows."""
    world = len(pairs.sizes)
    if world == 1:
        return values
    kind = torch.uint8 if values.dtype == torch.bool else values.dtype
    received = torch.empty((size, *values.shape[1:]), dtype=kind, device=values.device)
    before, behind = (dist.get_global_rank(pairs.group, (pairs.rank + step) % world) for step in (-1, 1))
    operations = []
    if len(values):
        operations.append(dist.P2POp(dist.isend, values.to(kind).contiguous(), before, pairs.group))
    if size:
        operations.append(dist.P2POp(dist.irecv, received, behind, pairs.group))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received.to(values.dtype)


def _joined(parts: Tensor) -> Tensor:
    """log(1 + sum_k (exp(parts_k) - 1)) of parts [K, N]."""
    peak = parts.amax(dim=0)
    # Small losses keep their digits, large ones their range.
    terms = torch.where(parts < 30, torch.exp(-peak) * torch.expm1(parts.clamp_max(30)), torch.exp(parts - peak))
    return peak + torch.log1p(torch.expm1(-peak) + terms.sum(dim=0))
