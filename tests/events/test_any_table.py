"""Tables of random columns, types, separators, encodings, forms of time and bad rows against what was put into them.

UBP_EXAMPLES=10000 looks at more of them than the few of a usual run.
"""

from __future__ import annotations

import gzip
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError
from ubp_fast.events.sources.table import Table

FIRST_S, LAST_S = 1_577_836_800, 1_584_230_400  # 2020-01-01, 2020-03-15
EXAMPLES = int(os.environ.get("UBP_EXAMPLES", "60"))
# Format of text times -> what they leave of a time in seconds, and options that reading them needs.
TEXT_TIMES: dict[str, tuple[int, dict[str, str]]] = {
    "%Y-%m-%d %H:%M:%S": (1, {}),
    "%Y-%m-%dT%H:%M:%SZ": (1, {}),
    "%Y-%m-%d %H:%M": (60, {}),
    "%Y-%m-%d": (86_400, {}),
    "%Y/%m/%d %H:%M:%S": (1, {}),
    "%Y%m%dT%H%M%S": (1, {}),
    "%Y-%m-%d %H:%M:%S UTC": (1, {}),
    "%Y-%m-%d %H:%M:%S+00:00": (1, {}),
    "%d-%b-%Y %H:%M:%S": (1, {}),
    "%B %d, %Y": (86_400, {}),
    "%m/%d/%Y %H:%M": (60, {}),  # the fifteenth of March leaves one reading
    "%d.%m.%y": (86_400, {"timestamp_format": "%d.%m.%y"}),  # the year may stand first, too
    "%d/%m/%Y %H:%M:%S": (1, {"timestamp_format": "%d/%m/%Y %H:%M:%S"}),
    "%H:%M %d|%m|%Y": (60, {"timestamp_format": "%H:%M %d|%m|%Y"}),
}
NUMBER_TIMES = ("s", "ms", "us", "ns", "float", "%Y%m%d", "%Y%m%d%H%M%S")
LETTERS = "abcXYZ 0123456789,;|\t\"'é-_"
texts = st.text(LETTERS, min_size=1, max_size=8)


@dataclass
class Case:
    """A table, how it is written, and what reading it has to give."""

    rows: pl.DataFrame  # client, second, sku as text or numbers, quantity
    time: str
    kind: str
    separator: str
    eol: str
    encoding: str
    has_header: bool
    packed: bool
    noise: list[str]
    quantity: bool
    bad: dict[int, str]  # row -> what is wrong with it
    drop: bool
    options: dict[str, Any] = field(default_factory=dict)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(6, 14))
    ids = draw(
        st.sampled_from(
            [
                st.integers(-(2**62), 2**62).map(str),
                st.integers(0, 99).map(str),
                st.integers(0, 99).map(lambda number: f"{number:03d}"),
                texts,
            ]
        )
    )
    seconds = [FIRST_S, *draw(st.lists(st.integers(FIRST_S, LAST_S), min_size=count, max_size=count)), LAST_S]
    clients, skus = (draw(st.lists(ids, min_size=count + 2, max_size=count + 2)) for _ in range(2))
    quantities = [1, *draw(st.lists(st.integers(-2, 3), min_size=count, max_size=count)), 1]
    columns = {"client": clients, "second": seconds, "sku": skus, "quantity": quantities}
    kind = draw(st.sampled_from(["csv", "csv", "csv", "parquet", "arrow", "json"]))
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])) if kind == "csv" else "utf-8"
    problems = ["time", "client", "quantity"] + (["values"] if kind == "csv" else [])
    problem = draw(st.sampled_from(problems))
    bad = draw(st.dictionaries(st.integers(1, count), st.just(problem), max_size=2)) if draw(st.booleans()) else {}
    eol = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
    noise = texts | st.sampled_from(["", "two\nlines" if eol != "\r" else "one"])
    return Case(
        pl.DataFrame(columns),
        draw(st.sampled_from([*TEXT_TIMES, *NUMBER_TIMES])),
        kind,
        draw(st.sampled_from([",", ";", "\t", "|", "\x01"])),
        eol,
        encoding,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.lists(noise, min_size=count + 2, max_size=count + 2)),
        draw(st.booleans()) or problem == "quantity",
        bad,
        draw(st.booleans()),
    )


def times_of(case: Case) -> list[Any]:
    second = case.rows["second"]
    moment = (second * 1_000_000).cast(pl.Datetime("us"))
    if case.time in TEXT_TIMES:
        return moment.dt.strftime(case.time).to_list()
    if case.time.startswith("%"):
        return moment.dt.strftime(case.time).cast(pl.Int64).to_list()
    if case.time == "float":
        return (second + 0.25).to_list()
    return (second * 10 ** {"s": 0, "ms": 3, "us": 6, "ns": 9}[case.time]).to_list()


def step_of(case: Case) -> int:
    """To how many seconds a form of time rounds."""
    if case.time in TEXT_TIMES:
        return TEXT_TIMES[case.time][0]
    return 86_400 if case.time == "%Y%m%d" else 1


def frame_of(case: Case) -> pl.DataFrame:
    """The table as a user would have it, bad rows included."""
    columns: dict[str, list[Any]] = {
        "note": list(case.noise),
        "who": case.rows["client"].to_list(),
        "when": times_of(case),
        "what": case.rows["sku"].to_list(),
        "pieces": case.rows["quantity"].to_list(),
    }
    broken = {"time": ("when", "soon" if case.kind in ("csv", "json") else None), "client": ("who", None)}
    broken["quantity"] = ("pieces", None)
    for row, problem in case.bad.items():
        if problem != "values":
            name, value = broken[problem]
            columns[name][row] = value
    if case.kind == "csv" or any(isinstance(value, str) for value in columns["when"]):
        columns["when"] = [None if value is None else str(value) for value in columns["when"]]
    return pl.DataFrame(columns, strict=False)


def written(case: Case, folder: Path) -> Path:
    path, frame = folder / "log.data", frame_of(case)
    if case.kind == "parquet":
        frame.write_parquet(path)
    elif case.kind == "arrow":
        frame.write_ipc(path)
    elif case.kind == "json":
        frame.write_ndjson(path)
    else:
        lines = [csv_line(row, case.separator) for row in frame.rows()]
        for row, problem in case.bad.items():
            if problem == "values":
                lines[row] += f"{case.separator}more"
        header = [csv_line(tuple(frame.columns), case.separator)] if case.has_header else []
        content = "".join(line + case.eol for line in header + lines).encode(case.encoding)
        path.write_bytes(gzip.compress(content) if case.packed else content)
    return path


def csv_line(values: tuple[Any, ...], separator: str) -> str:
    cells = ["" if value is None else str(value) for value in values]
    quoted = ['"' + cell.replace('"', '""') + '"' if re.search(r'[",;|\t\x01\n\r]', cell) else cell for cell in cells]
    return separator.join(quoted)


def options_of(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {"client_column": "who", "timestamp_column": "when", "sku_column": "what"}
    options |= TEXT_TIMES.get(case.time, (1, {}))[1]
    if case.quantity:
        options["quantity_column"] = "pieces"
    if case.kind == "csv" and not case.has_header:
        options["columns"] = ["note", "who", "when", "what", "pieces"]
    if case.encoding == "latin-1":
        options["encoding"] = "latin-1"
    return options | {"on_bad_rows": "drop" if case.drop else "refuse"}


def names_of(events: EventDirectory, name: str, ids: pl.Series) -> list[str]:
    path = events.path / "maps" / f"{name}.parquet"
    if not path.exists():
        return ids.cast(pl.String).to_list()
    table = pl.read_parquet(path)
    joined = ids.to_frame("id").join(table, on="id", how="left", maintain_order="left")
    return joined["value"].to_list()


@given(case=cases())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
def test_any_table_is_read_rightly_or_refused_with_place_and_remedy(case: Case) -> None:
    counts = ~pl.int_range(pl.len()).is_in(list(case.bad))
    if case.quantity:
        counts &= pl.col("quantity") > 0
    expected = case.rows.filter(counts).with_columns(pl.col("second") // step_of(case) * step_of(case))
    with tempfile.TemporaryDirectory() as name:
        path = written(case, Path(name))
        table = Table(str(path), **options_of(case))
        if case.bad and not case.drop:
            with pytest.raises(DataError) as caught:
                table.prepare(Path(name) / "events")
            message = str(caught.value)
            first = min(case.bad)
            assert str(path) in message and "data.on_bad_rows=drop" in message and "\n" not in message
            assert f"in row {first} ({len(case.bad)} bad" in message or case.bad[first] == "values", message
            return
        table.prepare(Path(name) / "events")
        events = EventDirectory.open(Path(name) / "events")
        buys = events.frame("product_buy")
        assert buys["timestamp_s"].to_list() == expected["second"].to_list()
        assert names_of(events, "client_id", buys["client_id"]) == expected["client"].to_list()
        assert names_of(events, "sku", buys["sku"]) == expected["sku"].to_list()
        assert (events.path / "bad_rows.csv").exists() == bool(case.bad)
