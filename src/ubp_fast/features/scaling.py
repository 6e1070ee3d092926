"""Scales of columns: `moments` and `standardised`, a few rows at a time; `MinMaxScaler`, fitted once for all.

What is computed of a row here never depends on the rows beside it, on their number, or on threads. What is learned from
all rows is a `Statistic`: it adds up over parts of the rows, wherever these are, with the bytes of one pass. NumPy's
BLAS takes all cores that it finds and orders sums by their number: hence `one_blas_thread` and `products`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from ubp_fast.compiled import njit
from ubp_fast.files import load_array, write_array

ROWS_AT_ONCE = 4_096
# Where nothing is summed over rows: what is computed of so few stays in a cache near the core.
CACHED_ROWS = 128
# Columns of a product that one thread makes at a time.
PANEL = 512
SMALLEST_DEVIATION = 1e-6
NUM_CLIENTS = "num_clients"
PartT = TypeVar("PartT")
ResultT = TypeVar("ResultT")


class Rows(Protocol):
    """A float matrix that gives some of its rows at a time: an array, or what makes them when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Any, /) -> np.ndarray: ...


class Statistic(ABC, Generic[PartT, ResultT]):
    """What is learned from all rows, from numbered parts 0, 1, 2, ... of them, with the same bytes whoever adds which.

    Parts 2k and 2k + 1 are joined first, then pairs of pairs, and so on: the order follows from the numbers alone. One
    pass over all rows and the merged statistics of several processes are the same, where the parts are. As many parts
    are held as the number of parts has binary digits.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], PartT] = {}  # of 2^level parts, from number * 2^level on

    def add(self, number: int, *rows: Any) -> None:
        """Takes part `number`, each once, in any order."""
        self._take(0, number, self._of(*rows))

    def merge(self, other: Statistic[PartT, ResultT]) -> None:
        """Takes the parts of another one, which has none of those that are here, and is not used again."""
        for (level, number), part in other._held.items():
            self._take(level, number, part)

    def packed(self) -> dict[str, np.ndarray]:
        """What was added so far by names that `unpack` of another process understands."""
        held = sorted(self._held.items())
        return {
            f"{level}/{number}/{place}": np.asarray(array)
            for (level, number), part in held
            for place, array in enumerate(self._arrays(part))
        }

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes the parts that another one has packed, like `merge`; reads them one after the other."""
        found: dict[tuple[int, int], int] = {}
        for name in arrays:
            level, number, _ = map(int, name.split("/"))
            found[level, number] = found.get((level, number), 0) + 1
        for (level, number), places in sorted(found.items()):
            part = self._part([arrays[f"{level}/{number}/{place}"] for place in range(places)])
            self._take(level, number, part)

    def finish(self) -> ResultT:
        """What all parts say.

        Raises:
            ValueError: no part, or one missing between others.
        """
        spans = sorted((number << level, level) for level, number in self._held)
        ends = [0, *(first + (1 << level) for first, level in spans)]
        if not spans or [first for first, _ in spans] != ends[:-1]:
            raise ValueError(f"{type(self).__name__}: parts must be numbered 0, 1, 2, ..., got {spans}")
        *before, found = (self._held[level, first >> level] for first, level in spans)
        for part in reversed(before):
            found = self._joined(part, found)
        return self._result(found)

    def _take(self, level: int, number: int, part: PartT) -> None:
        if (level, number) in self._held:
            raise ValueError(f"{type(self).__name__}: every part must be added once, got {number << level} again")
        while (other := self._held.pop((level, number ^ 1), None)) is not None:
            part = self._joined(other, part) if number & 1 else self._joined(part, other)
            level, number = level + 1, number >> 1
        self._held[level, number] = part

    @abstractmethod
    def _arrays(self, part: PartT) -> Sequence[np.ndarray | int]:
        """A part as arrays."""

    @abstractmethod
    def _part(self, arrays: list[np.ndarray]) -> PartT:
        """The part of its arrays."""

    @abstractmethod
    def _of(self, *rows: Any) -> PartT:
        """What one part of the rows says."""

    @abstractmethod
    def _joined(self, left: PartT, right: PartT) -> PartT:
        """What two neighbours say; may be either of them, changed."""

    @abstractmethod
    def _result(self, part: PartT) -> ResultT:
        """What is learned, when this is what all rows say."""


class _Spread(NamedTuple):
    """Rows, their mean and the sums of squared differences from it, float64 [F]."""

    rows: int
    mean: np.ndarray
    squares: np.ndarray


class ColumnMoments(Statistic[_Spread, tuple[np.ndarray, np.ndarray]]):
    """Mean and standard deviation of every column, float64 [F] each; not finite where a value is not.

    Source: Chan et al. 1979 (updating formulae of variances).
    """

    def _of(self, *rows: Any) -> _Spread:
        (values,) = rows
        mean = values.sum(axis=0, dtype=np.float64) / len(values)
        with np.errstate(invalid="ignore"):
            difference = values - mean
        difference *= difference
        return _Spread(len(values), mean, difference.sum(axis=0))

    def _joined(self, left: _Spread, right: _Spread) -> _Spread:
        rows = left.rows + right.rows
        with np.errstate(invalid="ignore"):
            step = right.mean - left.mean
            mean = left.mean + step * (right.rows / rows)
            squares = left.squares + right.squares + step * step * (left.rows * right.rows / rows)
        return _Spread(rows, mean, squares)

    def _arrays(self, part: _Spread) -> Sequence[np.ndarray | int]:
        return part

    def _part(self, arrays: list[np.ndarray]) -> _Spread:
        return _Spread(int(arrays[0].item()), *arrays[1:])

    def _result(self, part: _Spread) -> tuple[np.ndarray, np.ndarray]:
        return part.mean, np.sqrt(part.squares / part.rows)


class Sums(Statistic[list[np.ndarray], ResultT]):
    """A statistic whose parts are arrays that add up."""

    def _joined(self, left: list[np.ndarray], right: list[np.ndarray]) -> list[np.ndarray]:
        for total, more in zip(left, right, strict=True):
            total += more
        return left

    def _arrays(self, part: list[np.ndarray]) -> Sequence[np.ndarray | int]:
        return part

    def _part(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return arrays


class KnownMeans(Sums[tuple[np.ndarray]]):
    """Mean of what is not NaN in every column, 0 without any, float64 [F]."""

    def _of(self, *rows: Any) -> list[np.ndarray]:
        (values,) = rows
        known = ~np.isnan(values)
        return [np.where(known, values, 0).sum(axis=0, dtype=np.float64), known.sum(axis=0)]

    def _result(self, part: list[np.ndarray]) -> tuple[np.ndarray]:
        total, number = part
        return (total / np.maximum(number, 1),)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """What NumPy multiplies and solves meanwhile has the same bytes whatever the number of cores; also a decorator."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


def products(values: np.ndarray, others: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
    """Columns float64 [N, F] times each other, [F, F], and times those of every other matrix [N, L], [F, L].

    As many threads as torch has make a panel of columns each: the bytes do not depend on their number.
    """
    width = values.shape[1]
    own = np.empty((width, width))
    found = [np.empty((width, other.shape[1])) for other in others]

    def of_own(first: int) -> None:
        here, below = slice(first, first + PANEL), slice(first + PANEL, None)
        columns = values[:, here]
        own[here, here] = columns.T @ columns
        own[below, here] = values[:, below].T @ columns
        own[here, below] = own[below, here].T

    def of_other(product: np.ndarray, other: np.ndarray, first: int) -> None:
        here = slice(first, first + PANEL)
        product[:, here] = values.T @ other[:, here]

    work = [partial(of_own, first) for first in range(0, width, PANEL)]
    for product, other in zip(found, others, strict=True):
        work += [partial(of_other, product, other, first) for first in range(0, other.shape[1], PANEL)]
    with one_blas_thread(), ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for done in [threads.submit(one) for one in work]:
            done.result()
    return [own, *found]


def parts_of_rows(number: int) -> Iterator[tuple[int, slice]]:
    """Numbers and rows of the parts in which so many rows are read."""
    for part, start in enumerate(range(0, number, ROWS_AT_ONCE)):
        yield part, slice(start, start + ROWS_AT_ONCE)


def in_parts(values: Rows) -> Iterator[tuple[int, slice]]:
    """Numbers and rows of the parts in which a matrix is read."""
    return parts_of_rows(len(values))


StatisticT = TypeVar("StatisticT", bound=Statistic[Any, Any])


def gathered(statistic: StatisticT, values: Rows, first_part: int = 0) -> StatisticT:
    """The statistic with all rows of a matrix added, whose first ones are part `first_part`."""
    for number, part in in_parts(values):
        statistic.add(first_part + number, values[part])
    return statistic


def moments(values: Rows) -> tuple[np.ndarray, np.ndarray]:
    """`ColumnMoments` of the rows of one matrix."""
    return gathered(ColumnMoments(), values).finish()


def standardised(
    values: Rows,
    mean: np.ndarray,
    deviation: np.ndarray,
    rows_at_once: int = CACHED_ROWS,
    factor: float | np.ndarray = 1.0,
    dtype: type = np.float64,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of `values` and, rounded from float64, their columns with mean 0 and deviation `factor`.

    What hardly varies becomes 0.

    Args:
        values: float [N, F].
        mean, deviation: float64 [F].
        rows_at_once: of a part.
        factor: one for all columns, or [F].
        dtype: of the result.
    """
    scale = np.where(deviation > SMALLEST_DEVIATION, 1.0 / np.maximum(deviation, SMALLEST_DEVIATION), 0.0)
    factors = np.broadcast_to(np.asarray(factor, np.float64), scale.shape).copy()
    for start in range(0, len(values), rows_at_once):
        part = slice(start, start + rows_at_once)
        rows = np.ascontiguousarray(values[part])
        inputs: np.ndarray = np.empty(rows.shape, dtype)
        _standardise(rows, mean, scale, factors, inputs)
        yield part, inputs


@njit
def _standardise(values, mean, scale, factors, out):  # pragma: no cover - compiled
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            out[row, column] = (values[row, column] - mean[column]) * scale[column] * factors[column]


@njit
def log_counts(values):  # pragma: no cover - compiled
    """log1p in place of a float matrix that is mostly zeros."""
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            if values[row, column] != 0:
                values[row, column] = np.log1p(values[row, column])


class DayStatistics:
    """What is compared among all clients of one day: means and deviations of columns, what stands for missing values.

    Those of a known day are given; without, they are measured when they are asked for first, and kept.

    Args:
        known: the arrays of a known day.
        num_clients: of a day that is measured, to be kept beside.

    Attributes:
        arrays: what is known, by name.
        first_part: number of the first part of the rows at hand, see `Statistic`.
    """

    first_part = 0

    def __init__(self, known: Mapping[str, np.ndarray] | None = None, num_clients: int | None = None) -> None:
        self._is_measuring = known is None
        self.arrays: dict[str, np.ndarray] = dict(known or {})
        if num_clients is not None:
            self.arrays[NUM_CLIENTS] = np.array([num_clients])

    @property
    def num_clients(self) -> int | None:
        """How many clients the day had, where that is known."""
        return int(self.arrays[NUM_CLIENTS][0]) if NUM_CLIENTS in self.arrays else None

    def once(self, names: tuple[str, ...], measure: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """The arrays of these names; `measure` gives them when the day is not known and nobody has asked before.

        Raises:
            KeyError: a known day does not have them.
        """
        if self._is_measuring and names[0] not in self.arrays:
            self.arrays.update(zip(names, measure(), strict=True))
        return tuple(self.arrays[name] for name in names)

    def moments(self, name: str, values: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation float64 [F] of the columns of a matrix float [N, F]."""
        names = (f"{name}.mean", f"{name}.deviation")
        mean, deviation = self.statistic(names, lambda: gathered(ColumnMoments(), values, self.first_part))
        return mean, deviation

    def statistic(self, names: tuple[str, ...], measure: Callable[[], Statistic[Any, Any]]) -> tuple[np.ndarray, ...]:
        """`once` of what a statistic of all clients says; `measure` adds the rows at hand."""
        return self.once(names, lambda: measure().finish())


class NotYetKnown(Exception):
    """Something of all clients is asked for that other processes must measure, too."""


class PartialStatistics(DayStatistics):
    """The day of some of the clients: what of all is not known yet is measured among these, and kept to be merged.

    Args:
        known: arrays that are known.
        first_part: see `DayStatistics`.

    Attributes:
        measured: names that a statistic gives -> it, of these clients.
    """

    def __init__(self, known: Mapping[str, np.ndarray], first_part: int) -> None:
        super().__init__(known)
        self.first_part = first_part
        self.measured: dict[tuple[str, ...], Statistic[Any, Any]] = {}

    def statistic(self, names: tuple[str, ...], measure: Callable[[], Statistic[Any, Any]]) -> tuple[np.ndarray, ...]:
        """What is known of all.

        Raises:
            NotYetKnown: nothing is; it has been measured among these clients.
        """
        if names[0] not in self.arrays:
            if names not in self.measured:
                self.measured[names] = measure()
            raise NotYetKnown(names[0])
        return super().statistic(names, measure)


@dataclass(frozen=True)
class MinMaxScaler:
    """(x - min) / (max - min) of every column; values beyond the fitted range leave [0, 1], constants become 0.

    Attributes:
        shift, scale: float64 [F]; the result is (x - shift) * scale.
    """

    shift: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, values: Rows) -> MinMaxScaler:
        """Learns from the columns of `values` float [N, F].

        Raises:
            ValueError: no rows, or values that are not finite.
        """
        if len(values.shape) != 2 or not len(values):
            raise ValueError(f"MinMaxScaler: values must have shape [N >= 1, F], got {list(values.shape)}")
        extremes = ColumnExtremes()
        for number, part in in_parts(values):
            rows = values[part]
            if not np.isfinite(rows).all():
                row, column = np.argwhere(~np.isfinite(rows))[0]
                found = f"got {rows[row, column]} in row {part.start + row}, column {column}"
                raise ValueError(f"MinMaxScaler: values must be finite, {found}")
            extremes.add(number, rows)
        return extremes.finish()

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Scaled values, float32 [N, F].

        Raises:
            ValueError: another number of columns.
        """
        if values.ndim != 2 or values.shape[1] != len(self.shift):
            raise ValueError(f"MinMaxScaler: values must have shape [N, {len(self.shift)}], got {list(values.shape)}")
        return ((values - self.shift) * self.scale).astype(np.float32)

    def save(self, directory: Path) -> None:
        """Writes shift.npy and scale.npy."""
        directory.mkdir(parents=True, exist_ok=True)
        write_array(directory / "shift.npy", self.shift)
        write_array(directory / "scale.npy", self.scale)

    @classmethod
    def load(cls, directory: Path) -> MinMaxScaler:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
        """
        return cls(*(load_array(directory / f"{name}.npy", False) for name in ("shift", "scale")))


class ColumnExtremes(Statistic[tuple[np.ndarray, np.ndarray], MinMaxScaler]):
    """The scaler that the smallest and largest values of all columns make."""

    def _of(self, *rows: Any) -> tuple[np.ndarray, np.ndarray]:
        (values,) = rows
        return values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)

    def _joined(
        self, left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        return np.minimum(left[0], right[0]), np.maximum(left[1], right[1])

    def _arrays(self, part: tuple[np.ndarray, np.ndarray]) -> Sequence[np.ndarray | int]:
        return part

    def _part(self, arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return arrays[0], arrays[1]

    def _result(self, part: tuple[np.ndarray, np.ndarray]) -> MinMaxScaler:
        smallest, largest = part
        spread = largest - smallest
        return MinMaxScaler(smallest, 1 / np.where(spread > 0, spread, 1))


@dataclass(frozen=True)
class ScaledRows:
    """Rows [N, F] that are scaled when they are asked for."""

    values: Rows
    scaler: MinMaxScaler

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, chosen: Any) -> np.ndarray:
        return self.scaler.transform(self.values[chosen])
