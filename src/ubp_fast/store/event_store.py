"""Client-sorted columns of everything before a cutoff, memory-mapped.

    clients   0         1   2            (ascending client ids; a client without events keeps an empty row)
    offsets   0         4   4       7
    time      t0 t1 t2 t3 | | t4 t5 t6   (ascending inside a client, ties in file order)

All files are plain npy plus `store.json`; a cutoff view is a binary search per client, no copy. Times and rows take
four bytes where all of a store fit, which is nearly always: its columns are read more often than anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ubp_fast.events.labels import positions_in
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, DataError
from ubp_fast.files import load_array, load_json, why
from ubp_fast.store.vocabulary import FIRST_ID

HEADER_FILE = "store.json"
FORMAT = 3
TIMELINE = "timeline"
# In the header of a shard, where the ids of all lie; in that of a sharded store, the rows at which its shards begin.
VOCABULARY, FIRST_ROWS = "vocabulary", "first_rows"
# In the header where purchases have any.
AMOUNTS = "amounts"


class KindColumns(NamedTuple):
    """The events of one kind, sorted by client and time.

    Attributes:
        offsets: i64 [U + 1], rows of client u are offsets[u]:offsets[u + 1].
        timestamp_s: i32 [N], i64 when a time of the store lies outside of 1902..2038; ascending per client.
        item: i32 [N] dense sku or url id; None for searches.
        codes: u8 [N, 16] query codes; None for the other kinds.
        amounts: f32 [N, A] of purchases in the order of `EventStore.amounts`; None for other kinds, and without any.
    """

    offsets: np.ndarray
    timestamp_s: np.ndarray
    item: np.ndarray | None
    codes: np.ndarray | None
    amounts: np.ndarray | None = None


class Timeline(NamedTuple):
    """All kinds merged by time per client; ties in the order of EVENT_KINDS, then of rows.

    Attributes:
        offsets: i64 [U + 1].
        timestamp_s: [M], as that of the kinds.
        kind: u8 [M], 1 + index in EVENT_KINDS.
        row: i32 [M], row inside the columns of that kind; i64 when there are more than 2^31.
    """

    offsets: np.ndarray
    timestamp_s: np.ndarray
    kind: np.ndarray
    row: np.ndarray


class ProductColumns(NamedTuple):
    """Properties by dense sku id; rows 0 (padding) and 1 (unknown) have category and price 0 and 1, name 0.

    Attributes:
        sku_id: i64 [S] original ids, -1 in rows 0 and 1.
        category: i32 [S] dense ids.
        price: i32 [S], price bucket + 2.
        name: u8 [S, 16] codes.
    """

    sku_id: np.ndarray
    category: np.ndarray
    price: np.ndarray
    name: np.ndarray


def _number(name: str) -> Any:
    """A property of the store: a number of its header."""
    return property(lambda store: int(store.header[name]))


@dataclass(frozen=True)
class EventStore:
    """The store of one cutoff; open it with `EventStore.open`, make it with `ubp_fast.store.build.build_store`.

    Attributes:
        path: its directory.
        header: the content of store.json.
        num_clients: clients U, with or without events.
        cutoff_s: every event in the store has `timestamp_s < cutoff_s`.
        first_timestamp_s: time of the earliest event in the store.
        target_days: length of a target window in days.
        num_skus: rows of a sku embedding table; num_urls, num_categories and num_prices likewise.
    """

    path: Path
    header: dict[str, Any]
    num_clients, cutoff_s, first_timestamp_s = _number("num_clients"), _number("cutoff_s"), _number("first_timestamp_s")
    num_skus, num_urls = _number("num_skus"), _number("num_urls")
    num_categories, num_prices = _number("num_categories"), _number("num_prices")
    target_days = _number("target_days")

    @classmethod
    def open(cls, path: Path | str) -> EventStore:
        """Opens a complete store; columns are mapped when they are asked for.

        Raises:
            DataError: no store there, or one of another format.
        """
        path = Path(path)
        try:
            header = load_json(path / HEADER_FILE)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: a store must hold {HEADER_FILE}, got '{why(error)}'; build the store first"
            ) from error
        if header.get("format") != FORMAT:
            raise DataError(f"{path}: store must have format {FORMAT}, got {header.get('format')}; build it again")
        return cls(path, header)

    @property
    def num_events(self) -> int:
        """Events of all kinds and clients."""
        return int(self.header["num_events"]) if FIRST_ROWS in self.header else len(self.timeline.timestamp_s)

    @property
    def num_empty(self) -> int:
        """Clients that need a profile and have no event."""
        if FIRST_ROWS in self.header:
            return int(self.header["num_empty"])
        return int((np.diff(self.timeline.offsets)[np.asarray(self.is_relevant)] == 0).sum())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that have rows, in the order of EVENT_KINDS."""
        return tuple(self.header["kinds"])

    @property
    def amounts(self) -> tuple[str, ...]:
        """What purchases say of themselves beside the product: "quantity" (pieces), "spend" (money), or nothing."""
        return tuple(self.header.get(AMOUNTS, ()))

    @cached_property
    def client_ids(self) -> np.ndarray:
        """i64 [U], ascending."""
        return self._column("client_ids")

    @cached_property
    def is_relevant(self) -> np.ndarray:
        """Bool [U], clients that need a profile; others are there for models that learn from everybody."""
        return self._column("is_relevant")

    def kind(self, name: str) -> KindColumns:
        """Columns of one kind, without rows when the kind is absent.

        Raises:
            ValueError: not one of EVENT_KINDS.
        """
        if name not in EVENT_KINDS:
            raise ValueError(f"EventStore: kind must be one of {list(EVENT_KINDS)}, got '{name}'")
        return self._kinds[name]

    @cached_property
    def _kinds(self) -> dict[str, KindColumns]:
        columns = {}
        for name in EVENT_KINDS:
            offsets, timestamp_s = self._column(f"{name}.offsets"), self._column(f"{name}.timestamp_s")
            if name == "search_query":
                columns[name] = KindColumns(offsets, timestamp_s, None, self._column(f"{name}.codes"))
            else:
                amounts = self._column(f"{name}.amounts") if name == "product_buy" and self.amounts else None
                columns[name] = KindColumns(offsets, timestamp_s, self._column(f"{name}.item"), None, amounts)
        return columns

    def item_counts(self, kind: str) -> np.ndarray:
        """How often each dense id of a kind with items occurs in the store, i64 [num_skus or num_urls].

        2^31 - 1 visits of one url stand for that and more.
        """
        return self._column(f"{kind}.item_counts")

    @cached_property
    def timeline(self) -> Timeline:
        """All kinds merged by time per client."""
        return Timeline(*(self._column(f"{TIMELINE}.{name}") for name in Timeline._fields))

    @cached_property
    def products(self) -> ProductColumns:
        """Product properties by dense sku id."""
        return ProductColumns(*(self._column(f"products.{name}") for name in ProductColumns._fields))

    @property
    def sku_ids(self) -> np.ndarray:
        """Original sku of every dense id, i64 [num_skus]."""
        return self.products.sku_id

    @cached_property
    def url_ids(self) -> np.ndarray:
        """Original url of every dense id, i64 [num_urls]."""
        return self._column("url_ids")

    @cached_property
    def category_ids(self) -> np.ndarray:
        """Original category of every dense id, i64 [num_categories]."""
        return self._column("category_ids")

    def embedding_rows(self, column: str, ids: np.ndarray) -> np.ndarray:
        """Rows of an embedding table, int64 or int32 like `ids`, of dense ids of the column "sku" or "url"."""
        return ids

    def label_of_sku(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Position in a label list of every dense sku's value, i64 [num_skus]; -1 for those without a label.

        Args:
            name: of the list; its last word says what the ids are: sku, category or price.
            ids: i64 [n].

        Raises:
            ValueError: another last word.
        """
        field, products = name.rsplit("_", 1)[-1], self.products
        if field == "sku":
            values = np.asarray(products.sku_id)
        elif field == "category":
            values = np.asarray(self.category_ids)[products.category]
        elif field == "price":
            values = products.price.astype(np.int64) - FIRST_ID
        else:
            raise ValueError(f"label list: name must end in _category, _sku or _price, got '{name}'")
        positions = positions_in(ids, values)
        positions[:FIRST_ID] = -1
        return positions

    def rows_before(self, kind: str, cutoff_s: int) -> np.ndarray:
        """First row per client that is not before a cutoff.

        Args:
            kind: one of EVENT_KINDS, or "timeline".
            cutoff_s: seconds since 1970 UTC.

        Returns:
            i64 [U]: the events of client u before the cutoff are the rows offsets[u]:result[u].
        """
        columns: KindColumns | Timeline = self.timeline if kind == TIMELINE else self.kind(kind)
        return rows_before(columns.offsets, columns.timestamp_s, cutoff_s)

    def _column(self, name: str) -> np.ndarray:
        path = self.path / f"{name}.npy"
        if VOCABULARY in self.header and not path.exists():
            path = self.path / self.header[VOCABULARY] / path.name
        try:
            return load_array(path, memory_map=True)
        except OSError as error:
            if FIRST_ROWS in self.header:
                raise DataError(
                    f"{self.path}: events must lie in one store for this, got them in shards; make the run again with"
                    " compute.shards=1"
                ) from error
            raise DataError(f"{path}: column must exist, got '{why(error)}'; build the store again") from error


def columns_of(kind: str, amounts: Sequence[str]) -> list[str]:
    """Names of the columns of a kind after `offsets`, in a store whose purchases have some amounts or none."""
    names = ["timestamp_s", "codes" if ITEM_COLUMN[kind] == "query" else "item"]
    return [*names, AMOUNTS] if amounts and kind == "product_buy" else names


class ColumnWriter:
    """Columns of one kind, or of the timeline, written block of clients by block of clients.

    Args:
        directory: of the store.
        name: a kind, or "timeline".
        columns: names of the columns after `offsets`.
        num_clients: clients of all blocks together.
        num_events: events of all blocks together.

    Attributes:
        num_rows: events written so far.
    """

    def __init__(self, directory: Path, name: str, columns: Sequence[str], num_clients: int, num_events: int) -> None:
        self.num_rows = 0
        self._paths = [directory / f"{name}.{column}.npy" for column in ("offsets", *columns)]
        self._lengths = [num_clients + 1] + [num_events] * len(columns)
        self._files: list[BinaryIO] = []

    def append(self, offsets: np.ndarray, *columns: np.ndarray) -> None:
        """Writes the next block: offsets i64 [clients + 1] from 0, and one array [N, ...] per column."""
        arrays = (offsets[int(bool(self._files)) :] + self.num_rows, *columns)
        if not self._files:
            for path, length, array in zip(self._paths, self._lengths, arrays, strict=True):
                self._files.append(path.open("wb"))
                header = np.lib.format.header_data_from_array_1_0(array) | {"shape": (length, *array.shape[1:])}
                np.lib.format.write_array_header_1_0(self._files[-1], header)
        for file, array in zip(self._files, arrays, strict=True):
            file.write(np.ascontiguousarray(array).data)
        self.num_rows += len(columns[0])

    def close(self) -> None:
        """Ends the files."""
        for file in self._files:
            file.close()


def rows_before(offsets: np.ndarray, timestamp_s: np.ndarray, cutoff_s: int) -> np.ndarray:
    """Per client, the first row with `timestamp_s >= cutoff_s`: one binary search for all clients in step.

    Args:
        offsets: i64 [U + 1].
        timestamp_s: integers [N], ascending between offsets.
        cutoff_s: the cutoff.

    Returns:
        i64 [U].
    """
    low, high = offsets[:-1].astype(np.int64), offsets[1:].astype(np.int64)
    open_rows = np.flatnonzero(low < high)
    while len(open_rows):
        middle = (low[open_rows] + high[open_rows]) // 2
        before = timestamp_s[middle] < cutoff_s
        low[open_rows[before]] = middle[before] + 1
        high[open_rows[~before]] = middle[~before]
        open_rows = open_rows[low[open_rows] < high[open_rows]]
    return low


def end_to_end(start: np.ndarray, end: np.ndarray) -> tuple[slice | np.ndarray, np.ndarray]:
    """Rows start[i]..end[i] of all i, a slice where these are neighbours, and where each i begins, i64 [N + 1]."""
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(end - start)))
    if not offsets[-1]:
        return slice(0, 0), offsets
    if end[-1] - start[0] == offsets[-1] and (start[1:] == end[:-1]).all():
        return slice(start[0], end[-1]), offsets
    return np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], end - start), offsets
