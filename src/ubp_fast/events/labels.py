"""Labels of a target window: which values a task asks for, and which of them each client bought.

A label list is (ids, popularity) of categories, skus or price buckets. Wherever profiles are evaluated, the lists that
came with the data win (`EventDirectory.label_lists`) and `make_label_lists` makes the missing ones. Models learn on
lists made from the newest window before the profiles' cutoff: those that came with the data were chosen from the target
window, which no profile may see. Two of them the challenge told to everybody: `windows.given_lists` takes these.

A client's labels come from the purchases of the window only. All clients and all lists of a window are labelled in one
vectorised pass: purchase -> row of its client, value -> columns of that label, then unique (row, column) pairs as CSR.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ubp_fast.events.schema import DataError, LabelLists
from ubp_fast.events.split import utc_text

if TYPE_CHECKING:
    import polars as pl

    from ubp_fast.events.read import EventDirectory

NUM_LABELS = 100


def label_lists(
    purchases: pl.DataFrame, before: pl.DataFrame | None = None, num_labels: int = NUM_LABELS
) -> LabelLists:
    """The values that tasks ask for, from the purchases of one window.

    - propensity_category, propensity_sku, propensity_price: the `num_labels` values with most purchase rows, ties by
      smaller id.
    - propensity_new_sku: in the same order, first the skus that are new: bought in the window more often than in all
      the time before it (never seen, or rare until now). When there are fewer than `num_labels`, the list is filled up
      with the most bought skus that stand neither in it nor in propensity_sku.
    - popularity of a label: its purchase rows / all purchase rows of the window.

    Args:
        purchases: rows of the window with columns sku, category, price.
        before: purchase rows before the window, or their column sku; None for a catalogue in which no sku is new, such
            as a fixed assortment: propensity_new_sku is then the skus that come next in rank.
        num_labels: length of each list; a list is shorter when there are fewer values.

    Returns:
        name -> (ids i64 [n], popularity f64 [n]); a list without values is left out, and that of a column with
        one value alone: whether it was bought says who bought anything.
    """
    import polars as pl

    values = {column: _ranked(purchases, column) for column in ("category", "sku", "price")}
    lists = {f"propensity_{column}": all_of.head(num_labels) for column, all_of in values.items()}
    ranked = values["sku"]
    is_new = pl.Series([False]).new_from_index(0, len(ranked))
    if before is not None:
        counts = before.group_by("sku").len("before")
        known = ranked.join(counts, on="sku", how="left", maintain_order="left")
        is_new = known["len"] > known["before"].fill_null(0)
    is_spare = ~is_new & ~ranked["sku"].is_in(lists["propensity_sku"]["sku"].implode())
    lists["propensity_new_sku"] = pl.concat([ranked.filter(is_new), ranked.filter(is_spare)]).head(num_labels)
    return {
        name: (chosen.to_series(0).to_numpy(), chosen["len"].to_numpy() / len(purchases))
        for name, chosen in lists.items()
        if len(chosen) and len(values[name.split("_")[-1]]) > 1
    }


def _ranked(purchases: pl.DataFrame, column: str) -> pl.DataFrame:
    return purchases.group_by(column).len().sort(["len", column], descending=[True, False])


def make_label_lists(directory: EventDirectory, start_s: int, end_s: int, num_labels: int = NUM_LABELS) -> LabelLists:
    """`label_lists` of the window [start_s, end_s) of a directory; only events before `end_s` are looked at.

    Raises:
        DataError: no purchase in the window.
        ValueError: num_labels < 1.
    """
    import polars as pl

    if num_labels < 1:
        raise ValueError(f"make_label_lists: num_labels must be >= 1, got {num_labels}")
    window = directory.purchases(start_s, end_s)
    if not len(window):
        raise DataError(
            f"product_buy: purchases must lie between {utc_text(start_s)} and {utc_text(end_s)}, the window that tells"
            " what tasks ask for, got 0 purchases in it; bring events of that time, or choose another data.end"
        )
    before = directory.scan("product_buy").filter(pl.col("timestamp_s") < start_s).select("sku").collect()
    return label_lists(window, before, num_labels)


def scored_skus(purchases: pl.DataFrame, lists: LabelLists, most_bought: int) -> tuple[np.ndarray, np.ndarray]:
    """The skus of all lists, and the most bought ones of a window: ids i64 [n] and popularity f64 [n] of each once.

    Args:
        purchases: rows of the window with a column sku.
        lists: those whose skus come first, in their order: propensity_sku, propensity_new_sku.
        most_bought: how many of the window's skus are there in any case, ties by smaller id.
    """
    import polars as pl

    ranked = _ranked(purchases, "sku")
    named = [lists[name][0] for name in ("propensity_sku", "propensity_new_sku") if name in lists]
    ids = np.concatenate([*named, ranked["sku"].head(most_bought).to_numpy()]).astype(np.int64)
    wanted = pl.DataFrame({"sku": ids}).unique(maintain_order=True)
    counts = wanted.join(ranked, on="sku", how="left", maintain_order="left")["len"].fill_null(0)
    return wanted["sku"].to_numpy(), counts.to_numpy() / max(len(purchases), 1)


def positions_in(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Position i64 [N] of each value in `ids` (of the first one, when it stands there twice), -1 where it does not."""
    different, first = np.unique(ids, return_index=True)
    if not len(different):
        return np.full(len(values), -1)
    near = np.minimum(np.searchsorted(different, values), len(different) - 1)
    return np.where(different[near] == values, first[near], -1)


@dataclass(frozen=True)
class LabelMatrix:
    """A 0/1 matrix of clients x labels as CSR; the columns of a row are ascending and unique.

    Attributes:
        indptr: i64 [U + 1], where the labels of each row begin.
        indices: i32 [nnz], columns that are 1.
        num_labels: number of columns.
    """

    indptr: np.ndarray
    indices: np.ndarray
    num_labels: int

    @property
    def num_rows(self) -> int:
        """Number of clients."""
        return len(self.indptr) - 1

    def dense(self, rows: np.ndarray | slice | None = None) -> np.ndarray:
        """Some rows (i64 positions [B], a slice, or None for all) as float32 [B, num_labels]."""
        part = self if rows is None else self.take(rows)
        matrix = np.zeros((part.num_rows, self.num_labels), np.float32)
        row_of_entry = np.repeat(np.arange(part.num_rows), np.diff(part.indptr))
        matrix[row_of_entry, part.indices] = 1.0
        return matrix

    @classmethod
    def from_pairs(cls, rows: np.ndarray, columns: np.ndarray, num_rows: int, num_labels: int) -> LabelMatrix:
        """The matrix with ones at (row, column), i64 [N] each, in any order, repeated or not."""
        width = max(num_labels, 1)
        pairs = np.sort(rows * width + columns)
        if len(pairs):
            # Sorting and comparing neighbours: np.unique hashes first, which takes ten times as long here.
            pairs = pairs[np.concatenate([[True], pairs[1:] != pairs[:-1]])]
        counts = np.bincount(pairs // width, minlength=num_rows)
        return cls(_offsets(counts), (pairs % width).astype(np.int32), num_labels)

    def take(self, rows: np.ndarray | slice) -> LabelMatrix:
        """Rows in another order, some left out or repeated: i64 positions [B] or a slice."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.num_rows)
            if step == 1:
                stop = max(start, stop)
                first, last = self.indptr[start], self.indptr[stop]
                return LabelMatrix(self.indptr[start : stop + 1] - first, self.indices[first:last], self.num_labels)
            rows = np.arange(start, stop, step)
        begin, counts = self.indptr[rows], self.indptr[np.asarray(rows) + 1] - self.indptr[rows]
        indptr = _offsets(counts)
        entries = np.arange(indptr[-1]) + np.repeat(begin - indptr[:-1], counts)
        return LabelMatrix(indptr, self.indices[entries], self.num_labels)

    def columns(self, chosen: np.ndarray) -> LabelMatrix:
        """Some labels: different i64 positions [K], which become columns 0..K - 1."""
        place = np.full(self.num_labels, -1, np.int64)
        place[chosen] = np.arange(len(chosen))
        rows, found = np.repeat(np.arange(self.num_rows), np.diff(self.indptr)), place[self.indices]
        return LabelMatrix.from_pairs(rows[found >= 0], found[found >= 0], self.num_rows, len(chosen))

    def column_counts(self) -> np.ndarray:
        """Number of clients per label, i64 [num_labels]."""
        return np.bincount(self.indices, minlength=self.num_labels)


class ClientRows:
    """Finds the rows of clients: built once per list of clients, asked for every window and label list."""

    def __init__(self, client_ids: np.ndarray) -> None:
        """Sorts the clients: i64 [U] in any order; one that occurs twice has two rows with the same labels."""
        self.num_rows = len(client_ids)
        self._unique, self._inverse = np.unique(np.asarray(client_ids, np.int64), return_inverse=True)
        self.is_sorted = self.num_rows == len(self._unique) and bool((self._unique == client_ids).all())

    def find(self, client_ids: np.ndarray) -> np.ndarray:
        """Positions i64 [N] among the distinct clients, -1 for others; `expand` turns labels of these into rows."""
        if not len(self._unique):
            return np.full(len(client_ids), -1)
        # Ascending queries walk the sorted clients in order: several times faster than jumping about in 1 M of them.
        order = np.argsort(client_ids, kind="stable")
        ascending = client_ids[order]
        at = np.minimum(np.searchsorted(self._unique, ascending), len(self._unique) - 1)
        at[self._unique[at] != ascending] = -1
        found = np.empty_like(at)
        found[order] = at
        return found

    def expand(self, positions: np.ndarray, columns: np.ndarray, num_labels: int) -> LabelMatrix:
        """Labels as (position, column) pairs in any order, repeated or not, to a matrix with one row per client."""
        matrix = LabelMatrix.from_pairs(positions, columns, len(self._unique), num_labels)
        return matrix if self.is_sorted else matrix.take(self._inverse)

    def mark(self, positions: np.ndarray) -> np.ndarray:
        """Bool [U]: rows of the clients at these positions (-1 is left out)."""
        marked = np.zeros(len(self._unique), bool)
        marked[positions[positions >= 0]] = True
        return marked if self.is_sorted else marked[self._inverse]


def label_matrices(
    clients: ClientRows, purchases: pl.DataFrame, lists: Mapping[str, tuple[str, np.ndarray]]
) -> tuple[np.ndarray, dict[str, LabelMatrix]]:
    """Labels of one window for several lists, sharing the search for the clients.

    Args:
        clients: the clients that get rows.
        purchases: client_id and the columns named in `lists`; purchases of other clients are ignored.
        lists: name -> (column of `purchases`, label ids [L]).

    Returns:
        Who bought anything, bool [U], and name -> matrix [U, L].

    Raises:
        DataError: a column has nulls.
        ValueError: label ids are not integers.
    """
    positions = clients.find(_integers(purchases, "client_id"))
    known = positions >= 0
    all_known = bool(known.all())
    matrices = {}
    for name, (column, label_ids) in lists.items():
        values = _integers(purchases, column)
        matrices[name] = clients.expand(
            *_label_columns(
                positions if all_known else positions[known], values if all_known else values[known], label_ids
            ),
            num_labels=len(label_ids),
        )
    return clients.mark(positions), matrices


def _label_columns(positions: np.ndarray, values: np.ndarray, label_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position, column) of every purchase whose value is a label; once per column of a repeated label."""
    label_ids = np.asarray(label_ids)
    if len(label_ids) == 0:
        return positions[:0], positions[:0]
    try:
        label_ids = label_ids.astype(np.int64, casting="unsafe" if label_ids.dtype == object else "same_kind")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"label_matrices: label_ids must be integers, got dtype {label_ids.dtype};"
            " text never equals a number, so every label would be 0"
        ) from error
    order = np.argsort(label_ids, kind="stable")
    ordered = label_ids[order]
    distinct, first, repeats = np.unique(ordered, return_index=True, return_counts=True)
    at = np.minimum(np.searchsorted(distinct, values), len(distinct) - 1)
    hits = np.flatnonzero(distinct[at] == values)
    at, positions = at[hits], positions[hits]
    copies = repeats[at]
    if len(distinct) == len(ordered):
        return positions, order[at]
    within = np.arange(copies.sum()) - np.repeat(_offsets(copies)[:-1], copies)
    return np.repeat(positions, copies), order[np.repeat(first[at], copies) + within]


def _integers(frame: pl.DataFrame, column: str) -> np.ndarray:
    values = frame[column]
    nulls = values.null_count()
    if nulls:
        row = values.is_null().arg_max()
        raise DataError(
            f"purchases: column '{column}' must not be null, got {nulls} nulls, the first in row {row};"
            " every sku needs its properties"
        )
    return values.to_numpy().astype(np.int64, copy=False)


def _offsets(counts: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
