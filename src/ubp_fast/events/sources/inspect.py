"""What is in a file: its columns, what each may be, and the command that would read it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from ubp_fast.events.formats import FileForm, RawTable, find_files, natural, read_files
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.sources.table_rows import numbers
from ubp_fast.events.times import TimeForm, is_zone, read_times

SAMPLE_ROWS = 100_000
# What text that is not UTF-8 is taken for.
OTHER_ENCODING = "cp1252"
MOST_KINDS = 30
NO_TIME = "no time"
# The beginning of 1990, spelled: times in numbers from here on are taken for nothing else.
_FIRST_SPELLED = 19_900_101
# Role -> names of columns that speak for it, the strongest first. Roles that come first choose first.
_ID = r"(?:[_ ]?(?:unique[_ ]?)?(?:id|no|nr|num|number|key|code))?"
ROLES: dict[str, tuple[str, ...]] = {
    "timestamp": (
        r"time[_ ]?stamp|event[_ ]?time|date[_ ]?time",
        r"time|date|when|ts|created|purchased|_at$|datum|zeit|fecha",
        r"day|tag",
    ),
    "client": (
        rf"^(?:client|customer|user|visitor|member|household|shopper|buyer|cust|who){_ID}$",
        r"client|customer|user|visitor|member|household|buyer|person|reviewer|kunde|käufer|usuario",
        r"account|card|session|author",
    ),
    "quantity": (r"^(?:quantity|qty|pieces|units|quantities|menge)$", r"quantity|qty"),
    "price": (
        r"^(?:unit[_ ]?)?price$",
        r"price|amount|revenue|sales|spend|monetary|money|total|payment|preis|prix|precio|umsatz",
        r"value|cost",
    ),
    "kind": (r"^(?:event|action|behaviou?r|activity)(?:[_ ]?(?:type|name|kind))?$", r"event|action|behaviou?r|type"),
    "category": (r"categor|kategorie", r"department|section|genre|class|segment|brand|aisle"),
    "name": (r"description|title|product[_ ]?name|item[_ ]?name",),
    "sku": (
        rf"^(?:sku|product|item|article|stock|asin|isbn|upc){_ID}$",
        r"sku|product|item|article|stock[_ ]?code|asin|isbn|upc|artikel|produkt",
        r"movie|book|song|track|content|course|recipe|game",
    ),
    "url": (r"^(?:url|page|path|link)$", r"url|page"),
    "query": (r"^(?:query|search(?:[_ ]?(?:term|text|query))?|keyword)$", r"query|search"),
}
OF_COMMAND = ("client", "timestamp", "sku", "kind", "category", "price", "name", "quantity", "spend", "url", "query")
# Names of prices; others of that role are of a whole row where the table counts pieces.
_OF_A_PIECE = r"price|preis|prix|precio|cost|unit"
_KINDS = (
    (r"remove", "remove_from_cart"),
    (r"cart|basket|bag", "add_to_cart"),
    (r"buy|bought|purchas|order|transaction|sale|sold|paid|pay|checkout", "product_buy"),
    (r"search|quer", "search_query"),
    (r"view|visit|click|page|seen|saw|detail|pv|impression", "page_visit"),
)


@dataclass
class Finding:
    """What is known of a table.

    Attributes:
        columns: role, such as "client" -> name of the column.
        options: further settings that reading needs, by name.
        remarks: what to decide.
    """

    columns: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def inspect(path: str | Sequence[str], form: FileForm | None = None) -> str:
    """Looks at the first rows of a table and says what they are.

    Args:
        path: a file, a pattern, a directory of parts, or a list of those.
        form: what is known of the files.

    Returns:
        Lines of text: each column with its type and examples, candidates for what is needed, and the command that
        would read the table.

    Raises:
        DataError: no such file, or one that cannot be read.
    """
    files = [str(file) for file, _ in find_files(path)]
    raw, form = _sample(path, form or FileForm())
    finding = guess(raw, form)
    roles: dict[str, str] = {}
    for role, column in finding.columns.items():
        roles[column] = f"{roles[column]}, {role}" if column in roles else role
    lines = [f"{files[0]}" + (f" and {len(files) - 1} more files" if len(files) > 1 else "")]
    lines.append(f"{len(raw.frame)} rows looked at, {raw.frame.width} columns" + (", text" if raw.is_text else ""))
    table = [("column", "type", "missing", "different", "examples", "looks like")]
    for series in raw.frame:
        typed = natural(series) if raw.is_text else series
        examples = ", ".join(map(str, series.drop_nulls().unique(maintain_order=True).head(3).to_list()))
        missing = f"{series.null_count() / max(len(series), 1):.0%}"
        row = (
            series.name,
            str(typed.dtype),
            missing,
            str(series.n_unique()),
            examples[:48],
            roles.get(series.name, ""),
        )
        table.append(row)
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines += [
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table),
    ]
    lacking = [role for role in ("client", "timestamp") if role not in finding.columns]
    lines += ["", *finding.remarks]
    lines += [f"no column looks like a {role}; name it with data.{role}_column" for role in lacking]
    lines += ["", "command:", f"  {command(path, finding)} directory=runs/shop profiles.at=end"]
    return "\n".join(lines)


def _sample(path: str | Sequence[str], form: FileForm) -> tuple[RawTable, FileForm]:
    """The first rows; a text file whose first line holds values gets names for its columns."""
    try:
        raw = _first_rows(path, form)
    except DataError as error:
        if form.encoding is not None or "UTF-8" not in str(error):
            raise
        form = replace(form, encoding=OTHER_ENCODING)
        raw = _first_rows(path, form)
    if any("quote" in line.reason for line in raw.bad_lines):
        bare = replace(form, quote="")
        without = _first_rows(path, bare)
        if len(without.bad_lines) < len(raw.bad_lines):
            raw, form = without, bare
    if not raw.is_text or form.columns is not None:
        return raw, form
    header = raw.frame.columns
    # The first of the names is missing where a table was written with its index.
    if not any(re.match(r"^-?\d+(?:[.,:/\- ]\d+)*$", name) for name in header) and "" not in header[1:]:
        return raw, form
    names = [f"column_{place}" for place in range(1, len(header) + 1)]
    form = replace(form, columns=names)
    return _first_rows(path, form), form


def _first_rows(path: str | Sequence[str], form: FileForm) -> RawTable:
    return read_files(path, form, lambda names: names, True, SAMPLE_ROWS)


def guess(raw: RawTable, form: FileForm) -> Finding:
    """Columns and options for a table, from the names and the first rows."""
    finding = Finding()
    free = list(raw.frame.columns)
    for role, patterns in ROLES.items():
        found = _best(role, patterns, free, raw)
        if found is not None:
            finding.columns[role] = found
            free.remove(found)
    if form.columns is not None:
        _by_place(raw, finding)
        finding.options["columns"] = list(form.columns)
    for name in ("separator", "encoding", "quote"):
        if getattr(form, name) != getattr(FileForm(), name):
            finding.options[name] = getattr(form, name)
    _times(raw, finding)
    _kinds(raw, finding)
    quantity, price = finding.columns.get("quantity"), finding.columns.get("price")
    if quantity is not None:
        pieces = _typed(raw, quantity)
        none = int((pieces <= 0).sum())
        if none:
            finding.remarks.append(f"{none} rows have a '{quantity}' of 0 or less: no purchases")
        elif pieces.null_count():
            quantity = finding.columns.pop("quantity")
            finding.remarks.append(f"column '{quantity}' lacks values: pieces are not counted")
    if "quantity" in finding.columns and price is not None and not re.search(_OF_A_PIECE, price, re.IGNORECASE):
        finding.columns["spend"] = price
        finding.remarks.append(
            f"column '{price}' looks like the money of a whole row; if it is that of one piece, leave out"
            " data.spend_column"
        )
    if price is not None and raw.is_text:
        unread = {decimal: numbers(raw.frame[price], decimal).null_count() for decimal in (".", ",")}
        if unread[","] < unread["."]:
            finding.options["decimal"] = ","
    client = finding.columns.get("client")
    bad = len(raw.bad_lines) + (0 if client is None else raw.frame[client].null_count())
    if bad:
        finding.options["on_bad_rows"] = "drop"
        finding.remarks.append(f"{bad} rows have no client, or are lines without a row: they would be left out")
    if "sku" not in finding.columns:
        finding.options["sku_column"] = None
        finding.remarks.append("no column looks like a product; without one all purchases are of one product")
    return finding


def _best(role: str, patterns: Sequence[str], free: Sequence[str], raw: RawTable) -> str | None:
    named = [name for pattern in patterns for name in free if re.search(pattern, name, re.IGNORECASE)]
    if role == "timestamp":
        problems = {name: _time_problem(_typed(raw, name)) for name in (*named, *free)}
        clear = (name for name in named if not problems[name])
        asking = [name for name in named if problems[name] not in ("", NO_TIME)]
        days = (name for name in asking if re.search("day|date", name, re.IGNORECASE))
        others = (name for name in free if not problems[name] and _cannot_be_ids(_typed(raw, name)))
        return next(itertools.chain(clear, days, asking, others), None)
    return next((name for name in named if _suits(role, _typed(raw, name))), None)


def _typed(raw: RawTable, name: str) -> pl.Series:
    return natural(raw.frame[name]) if raw.is_text else raw.frame[name]


def _suits(role: str, column: pl.Series) -> bool:
    """False where the values cannot be what the name says."""
    dtype = column.dtype
    if role in ("price", "quantity"):
        return dtype.is_numeric() or (role == "price" and dtype == pl.String)
    if role == "kind":
        return (dtype in (pl.String, pl.Categorical) or dtype.is_integer()) and column.n_unique() <= MOST_KINDS
    return not dtype.is_nested() and dtype not in (pl.Date, pl.Datetime)


def _cannot_be_ids(times: pl.Series) -> bool:
    """False for numbers that may be days since 1970 or dates of six digits: ids and amounts look like them."""
    return not times.dtype.is_numeric() or bool((times.drop_nulls() >= _FIRST_SPELLED).all())


def _time_problem(column: pl.Series, looked_at: int = 1000) -> str:
    """NO_TIME where a column holds no times, "" where it does, or the question that it leaves."""
    some = column.drop_nulls().head(looked_at)
    try:
        times = read_times("", some, TimeForm())
    except DataError as error:
        has_two_readings = "one way" in str(error)
        if has_two_readings and looked_at < len(column):
            return _time_problem(column, len(column))  # a log begins with one day: a later row may decide
        return str(error) if has_two_readings or some.dtype.is_numeric() else NO_TIME
    return "" if len(some) and times.seconds.null_count() * 2 <= len(some) else NO_TIME


def _by_place(raw: RawTable, finding: Finding) -> None:
    """Roles of columns without names: the first that holds times, then client and product in their order."""
    names = list(raw.frame.columns)
    times = [name for name in names if _time_problem(_typed(raw, name)) == ""]
    time = next((name for name in times if _cannot_be_ids(_typed(raw, name))), next(iter(times), None))
    kind = next((name for name in names if "product_buy" in map(_kind_of, _values(raw, name))), None)
    others = [name for name in names if name not in (time, kind)]
    finding.columns = {role: name for role, name in (("timestamp", time), ("kind", kind)) if name is not None}
    finding.columns |= dict(zip(("client", "sku"), others, strict=False))
    finding.remarks.append("the file has no header: check which column is what")


def _times(raw: RawTable, finding: Finding) -> None:
    name = finding.columns.get("timestamp")
    if name is None:
        return
    problem = _time_problem(_typed(raw, name))
    formats = re.findall(r"data\.timestamp_format='([^']+)'", problem)
    if formats:
        finding.options["timestamp_format"] = formats[0]
        finding.remarks.append(
            f"column '{name}' can be read in two ways, as {formats[0]} or as {formats[1]}: choose data.timestamp_format"
        )
    elif problem:
        finding.options |= {"timestamp_unit": "d", "timestamp_origin": "2024-01-01"}
        finding.remarks.append(
            f"column '{name}' holds numbers that are no times since 1970: set their unit (s, ms, us, ns, d) and the day"
            " they count from"
        )
    others = ((other, _values(raw, other)) for other in raw.frame.columns if other != name)
    zones = next((other for other, values in others if values and all(map(is_zone, values))), None)
    if zones is not None:
        columns = f"data.timestamp_column=[{quoted(name)}, {quoted(zones)}]"
        finding.remarks.append(f"column '{zones}' holds zones: \"{columns}\" reads each time by its own")


def _kinds(raw: RawTable, finding: Finding) -> None:
    name = finding.columns.get("kind")
    if name is None:
        return
    values = _values(raw, name)
    kinds = {
        value: next((ours for pattern, ours in _KINDS if re.search(pattern, value, re.I)), "ignore") for value in values
    }
    if "product_buy" not in kinds.values():
        del finding.columns["kind"]
        finding.remarks.append(f"column '{name}' may be the kind of event, none of {values[:8]} looks like a purchase")
        return
    finding.options["kinds"] = kinds
    if "page_visit" in kinds.values() and "url" not in finding.columns:
        finding.columns["url"] = finding.columns.get("sku", "")
    for ours, role in (("search_query", "query"), ("page_visit", "url")):
        if not finding.columns.get(role):
            finding.options["kinds"] = kinds = {v: "ignore" if kind == ours else kind for v, kind in kinds.items()}
            finding.columns.pop(role, None)
        elif ours not in kinds.values():
            del finding.columns[role]


def _values(raw: RawTable, name: str) -> list[str]:
    """The different values of a column that has few."""
    values = raw.frame[name].drop_nulls().unique(maintain_order=True)
    return [str(value) for value in values.to_list()] if len(values) <= MOST_KINDS else []


def _kind_of(value: str) -> str:
    """Our kind of an event that a shop calls so."""
    return next((ours for pattern, ours in _KINDS if re.search(pattern, value, re.IGNORECASE)), "ignore")


def command(path: str | Sequence[str], finding: Finding) -> str:
    """The command that reads a table so, with everything quoted that a shell or the configuration would take apart."""
    settings: dict[str, Any] = {"path": path if isinstance(path, str) else list(path)}
    settings |= {f"{role}_column": finding.columns[role] for role in OF_COMMAND if role in finding.columns}
    settings |= finding.options
    return " ".join(["ubp-fast run data=table", *(setting(f"data.{k}", v) for k, v in settings.items())])


def setting(name: str, value: Any) -> str:
    """`name=value` as it can be typed on a command line."""
    text = f"{name}={quoted(value)}"
    if re.fullmatch(r"[\w./=:,@%+\-]+", text, re.ASCII):
        return text
    if not re.search(r'["$`!\\]', text):
        return f'"{text}"'
    return "'" + text.replace("'", "'\"'\"'") + "'"


def quoted(value: Any) -> str:
    """A value in the grammar of the configuration; text is quoted where it could be taken for something else."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{quoted(key)}: {quoted(one)}" for key, one in value.items()) + "}"
    if not isinstance(value, str):
        return "[" + ", ".join(map(quoted, value)) + "]"
    if re.fullmatch(r"[A-Za-z_./][\w./\-@%+]*", value, re.ASCII) and value not in ("null", "true", "false"):
        return value
    # Backslashes count only in front of a quote, and are doubled there.
    inside = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
    return f"'{inside}'"


def suggestion(path: str | Sequence[str], form: FileForm, given: Mapping[str, str | None]) -> str:
    """Remarks and the command for a table that was named wrongly; "" where the file says too little, or nothing new.

    Args:
        path: see `inspect`.
        form: as it was given.
        given: role -> column that the user named; those that exist are kept.
    """
    try:
        raw, form = _sample(path, form)
        finding = guess(raw, form)
    except UserError:
        return ""
    for role, column in given.items():
        if column in raw.frame.columns:
            finding.columns = {r: c for r, c in finding.columns.items() if c != column or r == role}
            finding.columns[role] = column
            finding.options.pop(f"{role}_column", None)
    if not {"client", "timestamp"} <= finding.columns.keys():
        return ""
    if not finding.options and all(column in raw.frame.columns for column in given.values() if column is not None):
        return ""
    remarks = f" ({'; '.join(finding.remarks)})" if finding.remarks else ""
    return f"perhaps{remarks}: {command(path, finding)}"
