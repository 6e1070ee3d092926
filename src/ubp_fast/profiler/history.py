"""The events that a run has seen, with the days that were appended to them: `history/` in the directory of a run.

    current.json       number of the folder that counts, digests of what was appended, whether the source names clients
    <number>/          client_ids.npy, <kind>.<column>.npy, products.parquet, own_ids.parquet (text ids), maps/

A day is merged into a new folder and `current.json` is replaced at the very end: a kill leaves the old one or the new
one. The run's own store is where it begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.read import EventDirectory, read_table
from ubp_fast.events.schema import DataError
from ubp_fast.files import (
    clear_directory,
    complete_directory,
    load_array,
    load_json,
    remove_at_once,
    save_array,
    save_table,
    why,
    write_json,
)
from ubp_fast.profiler.reading import ClientIds, NewEvents
from ubp_fast.store.event_store import AMOUNTS, EventStore
from ubp_fast.store.in_memory import Histories

FOLDER, CURRENT_FILE = "history", "current.json"
STORES = ("latest-store", "store")
COLUMNS = ("offsets", "timestamp_s", "item")
AMOUNTS_FILE = f"product_buy.{AMOUNTS}.npy"


@dataclass(frozen=True)
class History:
    """All events of a run's clients so far.

    Attributes:
        histories: by the clients' numbers.
        clients: text ids with their numbers; None where ids are integers.
        maps: numbers of text ids of items.
        appended: digest of every batch that was appended.
        names_clients: the source of the run says who needs a vector; new clients do not.
        number: of its folder, 0 for the run's own store.
        wanted: int64, clients that need a vector.
    """

    histories: Histories
    clients: ClientIds | None
    maps: Mapping[str, pl.DataFrame]
    appended: tuple[str, ...]
    names_clients: bool
    number: int
    wanted: np.ndarray

    @classmethod
    def of(cls, run: Path, cutoff_s: int, maps: Mapping[str, pl.DataFrame]) -> History:
        """What was appended last, else the run's own store of the model's cutoff.

        Raises:
            DataError: neither is there, as in a copy of the model alone.
        """
        if (run / FOLDER / CURRENT_FILE).exists():
            return cls._load(run / FOLDER)
        for name in STORES:
            path = run / "stages" / name
            if path.is_dir() and (store := EventStore.open(path)).cutoff_s == cutoff_s:
                events = EventDirectory.open(run / "stages" / "events")
                ids, clients = events.path / "maps" / "client_id.parquet", None
                if ids.exists():
                    table = read_table(ids, ["value", "id"]).sort("value")
                    clients = ClientIds(table["value"], table["id"].to_numpy())
                wanted = np.asarray(store.client_ids)[np.asarray(store.is_relevant)]
                names_clients = events.relevant_clients is not None
                return cls(Histories.of_store(store), clients, maps, (), names_clients, 0, wanted)
        raise DataError(
            f"{run}: a run must hold stages/{STORES[0]} or stages/{STORES[1]} of its model to append to, got neither;"
            " run it again here, or embed whole histories"
        )

    def with_events(self, new: NewEvents) -> History:
        """With a batch appended; one that is there already changes nothing."""
        digest = hashlib.blake2b(digest_size=16)
        new.histories.digest_into(digest.update)
        if digest.hexdigest() in self.appended:
            return self
        clients = self.clients
        if clients is not None:
            both = pl.DataFrame({"own": clients.own, "number": clients.numbers}).vstack(
                pl.DataFrame({"own": new.clients.own.alias("own"), "number": new.clients.numbers})
            )
            both = both.unique("own").sort("own")
            clients = ClientIds(both["own"], both["number"].to_numpy())
        wanted = self.wanted if self.names_clients else np.union1d(self.wanted, new.histories.client_ids)
        return replace(
            self,
            histories=self.histories.merged(new.histories),
            clients=clients,
            maps=new.maps or self.maps,
            appended=(*self.appended, digest.hexdigest()),
            number=self.number + 1,
            wanted=wanted,
        )

    def without(self, numbers: np.ndarray) -> History:
        """Without some clients, by their numbers."""
        clients = self.clients
        if clients is not None:
            kept = ~np.isin(clients.numbers, numbers)
            clients = ClientIds(clients.own.filter(pl.Series(kept)), clients.numbers[kept])
        return replace(
            self,
            histories=self.histories.without(numbers),
            clients=clients,
            number=self.number + 1,
            wanted=self.wanted[~np.isin(self.wanted, numbers)],
        )

    def population(self) -> tuple[np.ndarray, pl.Series]:
        """Numbers int64 and own ids of all that need a vector, by own id: in whatever order they came."""
        if self.clients is None:
            return self.wanted, pl.Series("client_id", self.wanted)
        inside = np.isin(self.clients.numbers, self.wanted)
        return self.clients.numbers[inside], self.clients.own.filter(pl.Series(inside))

    def save(self, run: Path) -> None:
        """Writes the folder, then makes it the one that counts, then removes the one before."""
        path = run / FOLDER / str(self.number)
        partial = path.with_name(f".{path.name}.partial")
        clear_directory(partial)
        save_array(partial / "client_ids.npy", self.histories.client_ids)
        save_array(partial / "wanted.npy", self.wanted)
        for kind, arrays in self.histories.kinds.items():
            for name, array in zip(COLUMNS, arrays[:-1], strict=True):
                assert array is not None
                save_array(partial / f"{kind}.{name}.npy", array)
        amounts = self.histories.amounts
        if amounts is not None:
            save_array(partial / AMOUNTS_FILE, amounts)
        if self.histories.products is not None:
            save_table(partial / "products.parquet", self.histories.products)
        if self.clients is not None:
            table = pl.DataFrame({"value": self.clients.own, "id": self.clients.numbers})
            save_table(partial / "own_ids.parquet", table)
        (partial / "maps").mkdir()
        for name, table in self.maps.items():
            save_table(partial / "maps" / f"{name}.parquet", table)
        complete_directory(partial, path)
        current = {"number": self.number, "appended": list(self.appended), "names_clients": self.names_clients}
        current |= {} if amounts is None else {AMOUNTS: True}
        write_json(run / FOLDER / CURRENT_FILE, current)
        for other in (run / FOLDER).iterdir():
            if other.is_dir() and other != path:
                remove_at_once(other)

    @classmethod
    def _load(cls, folder: Path) -> History:
        try:
            current = load_json(folder / CURRENT_FILE)
            path = folder / str(current["number"])
            kinds = {}
            for file in sorted(path.glob("*.offsets.npy")):
                kind = file.name.split(".")[0]
                arrays = [load_array(path / f"{kind}.{name}.npy", memory_map=True) for name in COLUMNS]
                kinds[kind] = (arrays[0], arrays[1], arrays[2], None)
            products = path / "products.parquet"
            histories = Histories(
                load_array(path / "client_ids.npy"),
                kinds,
                pl.read_parquet(products) if products.exists() else None,
                load_array(path / AMOUNTS_FILE, memory_map=True) if current.get(AMOUNTS) else None,
            )
            clients = None
            if (path / "own_ids.parquet").exists():
                table = pl.read_parquet(path / "own_ids.parquet")
                clients = ClientIds(table["value"], table["id"].to_numpy())
            maps = {file.stem: pl.read_parquet(file) for file in sorted((path / "maps").glob("*.parquet"))}
            wanted = load_array(path / "wanted.npy")
            appended = tuple(current["appended"])
            return cls(histories, clients, maps, appended, current["names_clients"], current["number"], wanted)
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{folder}: history must be complete, got '{why(error)}'; copy the run again") from error
