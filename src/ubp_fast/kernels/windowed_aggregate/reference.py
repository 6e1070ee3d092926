"""The plain windowed aggregation in Polars: one filter and one group-by per window and result, nothing shared."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import polars as pl

ALL_HISTORY = 2**62


class Problem(NamedTuple):
    """Checked arguments of one call, the same for every backend; tables that were not given have width 0.

    Attributes:
        offsets: [U + 1] int64.
        timestamp_s: [N] int64, ascending inside every client.
        codes: [N] int32, rows of the three tables below.
        slots: [M, K] int32 in [-1, num_slots).
        num_slots: columns of the counts.
        groups: [M, D] int32, >= -1.
        values: [M, V] float64, finite.
        anchor_s: end of every window.
        windows_s: [W] int64 lengths, ascending; `ALL_HISTORY` for a window without a start.
        half_lives_s: [H] float64.
        periods_s: [P] int64.
        include_anchor: events at the anchor itself count.
    """

    offsets: np.ndarray
    timestamp_s: np.ndarray
    codes: np.ndarray
    slots: np.ndarray
    num_slots: int
    groups: np.ndarray
    values: np.ndarray
    anchor_s: int
    windows_s: np.ndarray
    half_lives_s: np.ndarray
    periods_s: np.ndarray
    include_anchor: bool

    @property
    def limit_s(self) -> int:
        """Events count if `timestamp_s < limit_s`."""
        return self.anchor_s + int(self.include_anchor)

    def start_s(self, window: int) -> int:
        """First second of that window."""
        length = int(self.windows_s[window])
        return -(2**63) if length == ALL_HISTORY else self.anchor_s - length

    def empty_results(self, counts: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """Results for clients without events, in the order of `WindowedAggregate`; zeros for counts may be given."""
        clients, windows, half_lives = len(self.offsets) - 1, len(self.windows_s), len(self.half_lives_s)
        if counts is None:
            counts = np.zeros((clients, windows, self.num_slots), np.int32)
        return (
            np.zeros((clients, windows), np.int32),
            counts,
            *(np.zeros((clients, windows, width), np.int32) for width in (self.groups.shape[1], len(self.periods_s))),
            np.zeros((clients, windows, self.values.shape[1])),
            np.zeros((clients, half_lives)),
            np.zeros((clients, half_lives, self.num_slots)),
            np.full(clients, -1, np.int64),
            np.full(clients, -1, np.int64),
            np.zeros(clients, np.int64),
            np.zeros((clients, windows, self.groups.shape[1])),
        )


def unsupported(problem: Problem) -> str | None:
    """Everything is supported where Polars is installed."""
    try:
        import polars  # noqa: F401
    except ImportError as error:
        return f"it computes with Polars, which cannot be imported ({error})"
    return None


def prepare(problem: Problem) -> None:
    """Nothing is shared by blocks of clients."""


def forward(problem: Problem, prepared: None, out: np.ndarray | None, threads: int | None) -> tuple[np.ndarray, ...]:
    """The arrays of `WindowedAggregate`; counts are written to `out` where it is given."""
    import polars as pl

    results = problem.empty_results(out)
    totals, counts, distinct, distinct_times, sums, decayed_totals, decayed_counts = results[:7]
    first_age_s, last_age_s, num_events, entropy = results[7:]
    events = _events(problem)
    age = pl.col("age_s")
    lives = events.group_by("client").agg(age.max().alias("first"), age.min().alias("last"), pl.len())
    first_age_s[lives["client"]], last_age_s[lives["client"]] = lives["first"], lives["last"]
    num_events[lives["client"]] = lives["len"]

    for window in range(len(problem.windows_s)):
        inside = events.filter(pl.col("timestamp_s") >= problem.start_s(window))
        _scatter(totals[:, window], inside.group_by("client").len("result"))
        _scatter(counts[:, window], _per_slot(inside, problem, pl.len().cast(pl.Int32).alias("result")), "slot")
        for column in range(problem.groups.shape[1]):
            group = pl.Series("group", problem.groups[inside["code"], column], dtype=pl.Int32)
            known = inside.with_columns(group).filter(pl.col("group") >= 0)
            _scatter(distinct[:, window, column], known.group_by("client").agg(pl.n_unique("group").alias("result")))
            share = pl.col("len") / pl.col("len").sum()
            sizes = known.group_by("client", "group").len()
            _scatter(
                entropy[:, window, column], sizes.group_by("client").agg((-share * share.log()).sum().alias("result"))
            )
        for column, period_s in enumerate(problem.periods_s.tolist()):
            period = (pl.col("timestamp_s") // period_s).n_unique().alias("result")
            _scatter(distinct_times[:, window, column], inside.group_by("client").agg(period))
        for column in range(problem.values.shape[1]):
            value = pl.Series("value", problem.values[inside["code"], column], dtype=pl.Float64)
            added = inside.with_columns(value).group_by("client").agg(pl.col("value").sum().alias("result"))
            _scatter(sums[:, window, column], added)

    for index, half_life_s in enumerate(problem.half_lives_s.tolist()):
        weighted = events.with_columns((0.5 ** (pl.col("age_s") / half_life_s)).alias("weight"))
        total = pl.col("weight").sum().alias("result")
        _scatter(decayed_totals[:, index], weighted.group_by("client").agg(total))
        _scatter(decayed_counts[:, index], _per_slot(weighted, problem, total), "slot")
    return results


def _events(problem: Problem) -> pl.DataFrame:
    """One row per event before the limit: client row, timestamp, age, code."""
    import polars as pl

    offsets = problem.offsets
    here = slice(int(offsets[0]), int(offsets[-1]))
    frame = pl.DataFrame(
        {
            "client": np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)),
            "timestamp_s": problem.timestamp_s[here].astype(np.int64),
            "code": problem.codes[here],
        }
    )
    age = (pl.lit(problem.anchor_s) - pl.col("timestamp_s")).alias("age_s")
    return frame.filter(pl.col("timestamp_s") < problem.limit_s).with_columns(age)


def _per_slot(events: pl.DataFrame, problem: Problem, result: pl.Expr) -> pl.DataFrame:
    """`result` per client and slot; an event with several slots counts in each of them."""
    import polars as pl

    slots = [
        events.with_columns(pl.Series("slot", problem.slots[events["code"], column], dtype=pl.Int32))
        for column in range(problem.slots.shape[1])
    ]
    if not slots:
        return pl.DataFrame(schema={"client": pl.Int64, "slot": pl.Int32, "result": pl.Int32})
    return pl.concat(slots).filter(pl.col("slot") >= 0).group_by("client", "slot").agg(result)


def _scatter(target: np.ndarray, frame: pl.DataFrame, column: str | None = None) -> None:
    where = (frame["client"],) if column is None else (frame["client"], frame[column])
    target[tuple(index.to_numpy() for index in where)] = frame["result"].to_numpy()
