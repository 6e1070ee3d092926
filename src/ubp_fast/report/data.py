"""The data of a run as it was read: events per kind and week, and what was left out."""

from __future__ import annotations

from typing import Any

import polars as pl

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.split import DAY_S

WEEK_S = 7 * DAY_S


def data_read(events: EventDirectory) -> dict[str, Any]:
    """Rows per kind and week, the windows, and the notes of whoever read the tables, as plain data for JSON.

    Returns:
        `rows`: kind -> rows in all; `weeks`: seconds at which the weeks begin, the last one cut off at the end of the
        data; `events`: kind -> rows of each week; `cutoff_s`, `validation_start_s`, `end_s`; `notes`.
    """
    split, first_s = events.split, int(events.info["first_s"])
    # Weeks are counted back from the cutoff, so that it lies between two of them.
    start_s = split.input_end_s - -(-(split.input_end_s - first_s) // WEEK_S) * WEEK_S
    number = max(-(-(max(events.last_s, split.end_s) + 1 - start_s) // WEEK_S), 1)
    counts = {}
    for kind in events.kinds:
        week = ((pl.col("timestamp_s") - start_s) // WEEK_S).alias("week")
        rows = events.scan(kind).select(week).group_by("week").len().collect()
        inside = dict(rows.iter_rows())
        counts[kind] = [int(inside.get(position, 0)) for position in range(number)]
    return {
        "rows": {kind: sum(values) for kind, values in counts.items()},
        "weeks": [start_s + position * WEEK_S for position in range(number)],
        "events": counts,
        "cutoff_s": split.input_end_s,
        "validation_start_s": split.validation_start_s,
        "end_s": split.end_s,
        "notes": list(events.info["notes"]),
    }
