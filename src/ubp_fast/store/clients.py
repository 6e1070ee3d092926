"""Which clients a store holds."""

from __future__ import annotations

import numpy as np
import polars as pl

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError
from ubp_fast.events.split import utc_text
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.spill import MAX_CLIENTS


def clients_of(
    events: EventDirectory, cutoff_s: int, all_clients: bool, base: EventStore | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all clients, i64 ascending, and which of them need a profile, bool; arguments as of `build_store`.

    Raises:
        DataError: more clients than the keys of their events can tell apart.
    """
    clients, is_relevant = _present_clients(events, cutoff_s, all_clients, base)
    require_few(events, len(clients))
    return clients, is_relevant


def require_few(events: EventDirectory, clients: int) -> None:
    """Refuses more clients than the keys of their events can tell apart.

    Raises:
        DataError: there are more.
    """
    if clients > MAX_CLIENTS:
        raise DataError(
            f"{events.path}: clients must be at most {MAX_CLIENTS}, got {clients}; split them into two directories"
        )


def _present_clients(
    events: EventDirectory, cutoff_s: int, all_clients: bool, base: EventStore | None
) -> tuple[np.ndarray, np.ndarray]:
    relevant = events.relevant_clients
    if relevant is not None and not all_clients:
        clients = np.sort(relevant)
        if base is not None and not np.array_equal(clients, base.client_ids):
            raise ValueError("build_store: base must hold the relevant clients, got others; build without a base")
        return clients, np.ones(len(clients), bool)
    wanted = pl.col("timestamp_s") < cutoff_s
    if base is not None:
        wanted &= pl.col("timestamp_s") >= base.cutoff_s
    parts = [events.scan(kind).filter(wanted).select(pl.col("client_id").unique()) for kind in events.kinds]
    present = pl.concat(parts).collect(engine="streaming")["client_id"].unique().sort().to_numpy()
    if base is not None:
        present = np.union1d(present, base.client_ids)
    if relevant is None:
        return present, np.ones(len(present), bool)
    clients = np.union1d(present, relevant)
    return clients, np.isin(clients, relevant)


def no_history(events: EventDirectory, cutoff_s: int) -> DataError:
    """The error for a cutoff before which no client has an event."""
    return DataError(
        f"{events.path}: the cutoff must lie after the first event of a client, got {utc_text(cutoff_s)} with no event"
        " before it; choose a later cutoff or check the relevant clients"
    )
