"""Windowed aggregation of event histories: for every client, what happened in each window that ends at the anchor.

For client u with events k (time t_k, item code c_k) and a window of length w, let

    E(u, w) = { k : anchor - w <= t_k < anchor }         (t_k <= anchor with include_anchor)

Everything known about an item is a table indexed by its code: `slots[code]` its places in top-N lists, `groups[code]`
what distinct counts tell apart, `values[code]` what sums add up.

    totals          |E(u, w)|
    counts          number of k in E(u, w) with slots[c_k, any column] = slot
    distinct        number of different groups[c_k, column] in E(u, w), exact
    distinct_times  number of different floor(t_k / period) in E(u, w)
    sums            sum of values[c_k, column] over E(u, w)
    decayed_totals  sum over all k before the anchor of 2^(-(anchor - t_k) / half_life); decayed_counts: per slot
    first_age_s     anchor - t of the oldest event before the anchor; last_age_s: of the newest
    num_events      |E(u, infinity)|: all events before the anchor
    entropy         - sum over different groups[c_k, column] of p ln p, p the group's share of the events in E(u, w)

Cost of the compiled backend: one pass over the events of the longest window, one more over all of them for half-lives.
Memory: the dense results; pass a part of `offsets` to work in blocks of clients, let `out` be a part of a larger matrix
such as a memory map, or count sparsely with `SparseCounter`.
Source: windows and distinct counts as in the organisers' aggregated features of the RecSys Challenge 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubp_fast.kernels import backends
from ubp_fast.kernels.checks import integer, number
from ubp_fast.kernels.transforms import require_constant
from ubp_fast.kernels.windowed_aggregate.reference import ALL_HISTORY, Problem

IMPLEMENTATIONS = backends.Lazy(__package__, numba="_numba", reference="reference")
ORDER = ("numba", "reference")
Array = np.ndarray | Tensor


class WindowedAggregate(NamedTuple):
    """Results per client (U), window (W), slot (L), group column (D), period (P), value column (V), half-life (H).

    Attributes:
        totals: [U, W] int32.
        counts: [U, W, L] int32.
        distinct: [U, W, D] int32.
        distinct_times: [U, W, P] int32.
        sums: [U, W, V] float64.
        decayed_totals: [U, H] float64.
        decayed_counts: [U, H, L] float64.
        first_age_s: [U] int64 seconds, -1 for a client without events before the anchor.
        last_age_s: [U] int64 seconds, likewise.
        num_events: [U] int64, all events before the anchor.
        entropy: [U, W, D] float64 nats, 0 where a window is empty.
    """

    totals: Any
    counts: Any
    distinct: Any
    distinct_times: Any
    sums: Any
    decayed_totals: Any
    decayed_counts: Any
    first_age_s: Any
    last_age_s: Any
    num_events: Any
    entropy: Any

    @property
    def ratios(self) -> Any:
        """[U, W - 1] share of each window's events that lie in the next shorter one, 0 where a window is empty."""
        return self.totals[:, :-1] / self.totals[:, 1:].clip(1)

    @property
    def means(self) -> Any:
        """[U, W, V] sums / totals, 0 where a window is empty."""
        return self.sums / self.totals.clip(1)[..., None]

    @property
    def span_s(self) -> Any:
        """[U] int64 seconds from the first to the last event, 0 for a client without events."""
        return self.first_age_s - self.last_age_s


def windowed_aggregate(
    offsets: Array,
    timestamp_s: Array,
    codes: Array | None = None,
    *,
    anchor_s: int,
    windows_s: Sequence[int | None] = (),
    slots: Array | None = None,
    num_slots: int = 0,
    groups: Array | None = None,
    values: Array | None = None,
    half_lives_s: Sequence[float] = (),
    periods_s: Sequence[int] = (),
    include_anchor: bool = False,
    out: np.ndarray | None = None,
    backend: str = "auto",
) -> WindowedAggregate:
    """Counts, totals, distinct counts, sums, recency, entropy and decayed counts per client, all windows in one pass.

    Args:
        offsets: [U + 1] int64, ascending: events of client u are rows offsets[u]..offsets[u + 1]. It need not start
            at 0: a part of the offsets is a block of clients.
        timestamp_s: [N] int64 or int32 seconds, ascending inside every client (not checked beyond the given clients).
        codes: [N] integer item codes in [0, M); needed for slots, groups and values.
        anchor_s: where every window ends.
        windows_s: lengths in seconds, > 0 and ascending; None as the last one is all history before the anchor.
        slots: [M] or [M, K] integer: the item's slot in each of K top lists, -1 for none; below `num_slots`.
        num_slots: number of slots of all lists together.
        groups: [M] or [M, D] integer >= 0, dense (memory follows the largest); -1: the item is not counted.
        values: [M] or [M, V], finite.
        half_lives_s: > 0, seconds.
        periods_s: > 0, seconds: 1 counts distinct timestamps, 86,400 active days (UTC).
        include_anchor: events at the anchor itself count.
        out: zeros int32 or float32 [U, W, num_slots] of any strides, for NumPy input only; becomes `counts`. float32
            is exact up to 2^24 events.
        backend: "auto", "numba" or "reference".

    Returns:
        NumPy arrays for NumPy input, CPU tensors for tensors. Integers are exact and, like the floats, do not depend on
        the number of threads; floats of different backends differ in rounding only. No gradients.

    Raises:
        ValueError: an argument breaks the rules above; the message names the first bad row.
        TypeError: an argument has a wrong dtype.
        BackendUnavailable: the named backend does not exist.
    """
    arrays = (offsets, timestamp_s, codes, slots, groups, values)
    are_tensors = {isinstance(array, Tensor) for array in arrays if array is not None}
    if len(are_tensors) > 1:
        raise TypeError("windowed_aggregate: arrays must be all NumPy or all tensors, got both")
    scalars = (*_scalars(anchor_s, windows_s, num_slots, half_lives_s, periods_s), bool(include_anchor), backend)
    if are_tensors == {True}:
        if out is not None:
            raise TypeError("windowed_aggregate: out must come with NumPy arrays, got tensors")
        if isinstance(values, Tensor):
            require_constant("windowed_aggregate", "values", values, "use .detach()")
        return WindowedAggregate(*_windowed_aggregate(*arrays, *scalars))
    return WindowedAggregate(*_run(*arrays, *scalars, out))


def _scalars(
    anchor_s: Any, windows_s: Any, num_slots: Any, half_lives_s: Any, periods_s: Any
) -> tuple[int, list[int], int, list[float], list[int]]:
    """As numbers of Python, whose values are checked later."""
    op = "windowed_aggregate"
    windows = [None if window is None else integer(op, "windows_s", window) for window in windows_s]
    if None in windows[:-1]:
        raise ValueError(f"{op}: windows_s must have None only as the last one, got {windows}")
    half_lives = [number(op, "half_lives_s", value) for value in half_lives_s]
    periods = [integer(op, "periods_s", value) for value in periods_s]
    lengths = [ALL_HISTORY if window is None else window for window in windows]
    return integer(op, "anchor_s", anchor_s), lengths, integer(op, "num_slots", num_slots), half_lives, periods


class WindowedAggregator:
    """A windowed aggregation for many blocks of clients: checks and tables are made once. See `window_aggregator`."""

    def __init__(self, problem: Problem, backend: str) -> None:
        name = backends.resolve("windowed_aggregate", backend, IMPLEMENTATIONS, ORDER, problem)
        self._problem, self._implementation = problem, IMPLEMENTATIONS[name]
        self._prepared = self._implementation.prepare(problem)
        self._backend = name

    def on(self, offsets: np.ndarray, timestamp_s: np.ndarray, codes: np.ndarray | None = None) -> WindowedAggregator:
        """The same aggregation of other events, which are checked; the tables are not looked at again."""
        tables = (self._problem.slots, self._problem.groups, self._problem.values)
        num_codes = max((len(table) for table in tables if table.shape[1]), default=-1)
        events = _checked_events(offsets, timestamp_s, codes, num_codes)
        return WindowedAggregator(self._problem._replace(**events), self._backend)

    def __call__(
        self, first: int = 0, last: int | None = None, out: np.ndarray | None = None, threads: int | None = None
    ) -> WindowedAggregate:
        """The result of clients first..last, all by default; NumPy arrays.

        Args:
            first: first client.
            last: one after the last client.
            out: see `windowed_aggregate`.
            threads: at most so many, torch's number when None; 1 lets several threads call for different blocks.
        """
        offsets = self._problem.offsets[first : None if last is None else last + 1]
        _check_out(out, (len(offsets) - 1, len(self._problem.windows_s), self._problem.num_slots))
        block = self._problem._replace(offsets=offsets)
        return WindowedAggregate(*self._implementation.forward(block, self._prepared, out, threads))


def window_aggregator(
    offsets: np.ndarray,
    timestamp_s: np.ndarray,
    codes: np.ndarray | None = None,
    *,
    anchor_s: int,
    windows_s: Sequence[int | None] = (),
    slots: np.ndarray | None = None,
    num_slots: int = 0,
    groups: np.ndarray | None = None,
    values: np.ndarray | None = None,
    half_lives_s: Sequence[float] = (),
    periods_s: Sequence[int] = (),
    include_anchor: bool = False,
    backend: str = "auto",
) -> WindowedAggregator:
    """`windowed_aggregate` of NumPy arrays, checked and ready to be called for any block of clients."""
    scalars = _scalars(anchor_s, windows_s, num_slots, half_lives_s, periods_s)
    problem = checked_problem(offsets, timestamp_s, codes, slots, groups, values, *scalars, bool(include_anchor))
    return WindowedAggregator(problem, backend)


def _run(
    offsets, timestamp_s, codes, slots, groups, values,
    anchor_s, windows_s, num_slots, half_lives_s, periods_s, include_anchor, backend, out=None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """The call on NumPy arrays: checks, then the chosen backend."""
    problem = checked_problem(
        offsets, timestamp_s, codes, slots, groups, values,
        anchor_s, windows_s, num_slots, half_lives_s, periods_s, include_anchor,
    )  # fmt: skip
    return tuple(WindowedAggregator(problem, backend)(out=out))


def checked_problem(
    offsets, timestamp_s, codes, slots, groups, values,
    anchor_s, windows_s, num_slots, half_lives_s, periods_s, include_anchor,
) -> Problem:  # fmt: skip
    """Raises what `windowed_aggregate` documents; backends never check again."""
    _check_scalars(anchor_s, windows_s, half_lives_s, periods_s)
    if codes is None and (slots is not None or groups is not None or values is not None):
        raise ValueError("windowed_aggregate: codes must be given with slots, groups or values, got None")
    slots, groups = (_integers(name, table, 2, np.int32) for name, table in (("slots", slots), ("groups", groups)))
    values = _table(values).astype(np.float64, copy=False)
    num_codes = _check_tables(slots, num_slots, groups, values)
    tables = (
        table if table.shape[1] else np.zeros((max(num_codes, 0), 0), table.dtype) for table in (slots, groups, values)
    )
    slots, groups, values = tables
    return Problem(
        **_checked_events(offsets, timestamp_s, codes, num_codes), slots=slots, num_slots=num_slots, groups=groups,
        values=values, anchor_s=anchor_s, windows_s=np.array(windows_s, np.int64),
        half_lives_s=np.array(half_lives_s, np.float64), periods_s=np.array(periods_s, np.int64),
        include_anchor=include_anchor,
    )  # fmt: skip


def _checked_events(offsets, timestamp_s, codes, num_codes) -> dict[str, Any]:
    offsets = _integers("offsets", offsets, 1, np.int64)
    timestamp_s = _integers("timestamp_s", timestamp_s, 1, np.int64, np.int32)
    _check_offsets(offsets, len(timestamp_s))
    codes = np.zeros(len(timestamp_s), np.int32) if codes is None else _integers("codes", codes, 1, np.int32)
    _check_events(offsets, timestamp_s, codes, num_codes)
    return {"offsets": offsets, "timestamp_s": timestamp_s, "codes": codes}


def _check_out(out: np.ndarray | None, shape: tuple[int, ...]) -> None:
    if out is None:
        return
    if out.shape != shape or out.dtype not in (np.int32, np.float32) or not out.flags.writeable:
        raise ValueError(
            f"windowed_aggregate: out must be writeable int32 or float32 {list(shape)}, got {out.dtype}"
            f" {list(out.shape)}"
        )


def _table(table: np.ndarray | None) -> np.ndarray:
    """[M, K]; a single column may come without its second dimension."""
    if table is None:
        return np.zeros((0, 0))
    table = np.asarray(table)
    return table[:, None] if table.ndim == 1 else table


def _integers(
    name: str, array: np.ndarray | None, dimensions: int, dtype: type, also: type | None = None
) -> np.ndarray:
    """As `dtype`; arrays of the dtype `also` stay what they are."""
    if array is None:
        return np.zeros((0,) * dimensions, dtype)
    array = np.asarray(array) if dimensions == 1 else _table(array)
    if array.ndim != dimensions:
        raise ValueError(f"windowed_aggregate: {name} must have {dimensions} dimensions, got shape {list(array.shape)}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"windowed_aggregate: {name} must be integers, got {array.dtype}")
    if array.dtype == also:
        return array
    if array.dtype != dtype and array.size:
        limits = np.iinfo(dtype)
        if int(array.max()) > limits.max or int(array.min()) < limits.min:
            raise ValueError(f"windowed_aggregate: {name} must fit {limits.dtype}, got {array.min()}..{array.max()}")
    return array.astype(dtype, copy=False)


def _check_scalars(anchor_s: int, windows_s: list[int], half_lives_s: list[float], periods_s: list[int]) -> None:
    if abs(anchor_s) > ALL_HISTORY:
        raise ValueError(f"windowed_aggregate: anchor_s must be a time in seconds, got {anchor_s}")
    if any(window < 1 for window in windows_s) or sorted(set(windows_s)) != windows_s:
        raise ValueError(f"windowed_aggregate: windows_s must be > 0 and ascending, got {windows_s}")
    if any(window > ALL_HISTORY for window in windows_s):
        raise ValueError(f"windowed_aggregate: windows_s must be at most 2**62, got {windows_s}; use None")
    if not all(0 < half_life < np.inf for half_life in half_lives_s):
        raise ValueError(f"windowed_aggregate: half_lives_s must be finite and > 0, got {half_lives_s}")
    if any(period < 1 for period in periods_s):
        raise ValueError(f"windowed_aggregate: periods_s must be > 0, got {periods_s}")


def _check_offsets(offsets: np.ndarray, num_events: int) -> None:
    if not len(offsets):
        raise ValueError("windowed_aggregate: offsets must have at least one entry, got none")
    if offsets[0] < 0 or offsets[-1] > num_events:
        raise ValueError(
            f"windowed_aggregate: offsets must lie in 0..{num_events} (rows of timestamp_s),"
            f" got {offsets[0]}..{offsets[-1]}"
        )
    falls = np.diff(offsets) < 0
    if falls.any():
        row = int(falls.argmax()) + 1
        raise ValueError(
            f"windowed_aggregate: offsets must ascend, got {offsets[row]} after {offsets[row - 1]} at entry {row}"
        )


def _check_tables(slots: np.ndarray, num_slots: int, groups: np.ndarray, values: np.ndarray) -> int:
    """Number of codes the tables know; one if there is no table (all codes are then 0)."""
    lengths = {len(table) for table in (slots, groups, values) if table.shape[1]}
    if len(lengths) > 1:
        raise ValueError(f"windowed_aggregate: slots, groups and values must have one length, got {sorted(lengths)}")
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError("windowed_aggregate: values must be a finite [M, V] table, got other entries")
    if num_slots < 0 or (slots.size and not -1 <= slots.min() <= slots.max() < num_slots):
        found = f"{slots.min()}..{slots.max()}" if slots.size else "none"
        raise ValueError(f"windowed_aggregate: slots must lie in -1..num_slots - 1 = {num_slots - 1}, got {found}")
    if groups.size and groups.min() < -1:
        raise ValueError(f"windowed_aggregate: groups must be >= -1, got {groups.min()}")
    return lengths.pop() if lengths else -1


def _check_events(offsets: np.ndarray, timestamp_s: np.ndarray, codes: np.ndarray, num_codes: int) -> None:
    if len(codes) != len(timestamp_s):
        raise ValueError(f"windowed_aggregate: codes must have length {len(timestamp_s)}, got {len(codes)}")
    from ubp_fast.kernels.windowed_aggregate import _numba  # Numba compiles the check, whatever the backend

    bad_code, falls = _numba.first_fault(offsets, timestamp_s, codes, num_codes)
    if bad_code >= 0:
        raise ValueError(
            f"windowed_aggregate: codes must lie in 0..{num_codes - 1}, got {codes[bad_code]} in row {bad_code}"
        )
    if falls >= 0:
        raise ValueError(
            f"windowed_aggregate: timestamp_s must ascend inside every client, got {timestamp_s[falls]} after"
            f" {timestamp_s[falls - 1]} in row {falls}; sort the events by client and time"
        )


@torch.library.custom_op(
    "ubp_fast::windowed_aggregate",
    mutates_args=(),
    schema=(
        "(Tensor offsets, Tensor timestamp_s, Tensor? codes, Tensor? slots, Tensor? groups, Tensor? values,"
        " int anchor_s, int[] windows_s, int num_slots, float[] half_lives_s, int[] periods_s, bool include_anchor,"
        " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    device_types="cpu",
)
def _windowed_aggregate(offsets, timestamp_s, codes, slots, groups, values, *scalars):
    arrays = (None if x is None else x.detach().numpy() for x in (offsets, timestamp_s, codes, slots, groups, values))
    return tuple(torch.from_numpy(result) for result in _run(*arrays, *scalars))


@_windowed_aggregate.register_fake
def _fake(
    offsets, timestamp_s, codes, slots, groups, values,
    anchor_s, windows_s, num_slots, half_lives_s, periods_s, include_anchor, backend,
):  # fmt: skip
    clients, windows, half_lives = offsets.shape[0] - 1, len(windows_s), len(half_lives_s)
    columns_of_groups, columns_of_values = (
        0 if table is None else 1 if table.ndim == 1 else table.shape[1] for table in (groups, values)
    )
    shapes = [
        ((clients, windows), torch.int32),
        ((clients, windows, num_slots), torch.int32),
        ((clients, windows, columns_of_groups), torch.int32),
        ((clients, windows, len(periods_s)), torch.int32),
        ((clients, windows, columns_of_values), torch.float64),
        ((clients, half_lives), torch.float64),
        ((clients, half_lives, num_slots), torch.float64),
        ((clients,), torch.int64),
        ((clients,), torch.int64),
        ((clients,), torch.int64),
        ((clients, windows, columns_of_groups), torch.float64),
    ]
    return tuple(offsets.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
