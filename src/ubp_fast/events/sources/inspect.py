"""What is in a file: its columns, what each may be, and the command that would read it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from ubp_fast.events.formats import FileForm, RawTable, find_files, natural, read_files
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.sources.table_rows import numbers
from ubp_fast.events.times import TimeForm, read_times

SAMPLE_ROWS = 100_000
MOST_KINDS = 30
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
OF_COMMAND = ("client", "timestamp", "sku", "kind", "category", "price", "name", "quantity", "url", "query")
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
    lines += ["", "command:", f"  {command(path, finding)}"]
    return "\n".join(lines)


def _sample(path: str | Sequence[str], form: FileForm) -> tuple[RawTable, FileForm]:
    """The first rows; a text file whose first line holds values gets names for its columns."""
    raw = read_files(path, form, lambda names: names, rows=SAMPLE_ROWS)
    if not raw.is_text or form.columns is not None:
        return raw, form
    header = raw.frame.columns
    if not any(re.match(r"^-?\d+(?:[.,:/\- ]\d+)*$", name) for name in header) and "" not in header:
        return raw, form
    names = [f"column_{place}" for place in range(1, len(header) + 1)]
    form = FileForm(form.format, form.separator, names, form.encoding, form.quote, form.null_values)
    return read_files(path, form, lambda names: names, rows=SAMPLE_ROWS), form


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
    if form.separator is not None:
        finding.options["separator"] = form.separator
    if form.encoding is not None:
        finding.options["encoding"] = form.encoding
    _times(raw, finding)
    _kinds(raw, finding)
    quantity = finding.columns.get("quantity")
    if quantity is not None:
        pieces = natural(raw.frame[quantity]) if raw.is_text else raw.frame[quantity]
        if not pieces.dtype.is_numeric() or not (pieces <= 0).any():
            del finding.columns["quantity"]
        else:
            finding.remarks.append(f"{int((pieces <= 0).sum())} rows have a '{quantity}' of 0 or less: no purchases")
    price = finding.columns.get("price")
    if price is not None and raw.is_text:
        unread = {decimal: numbers(raw.frame[price], decimal).null_count() for decimal in (".", ",")}
        if unread[","] < unread["."]:
            finding.options["decimal"] = ","
    if "sku" not in finding.columns:
        finding.options["sku_column"] = None
        finding.remarks.append("no column looks like a product; without one all purchases are of one product")
    return finding


def _best(role: str, patterns: Sequence[str], free: Sequence[str], raw: RawTable) -> str | None:
    for pattern in patterns:
        for name in free:
            if re.search(pattern, name, re.IGNORECASE) and _suits(role, raw.frame[name], raw.is_text):
                return name
    return next((name for name in free if _time_problem(raw.frame[name]) == ""), None) if role == "timestamp" else None


def _suits(role: str, column: pl.Series, is_text: bool) -> bool:
    """False where the values cannot be what the name says."""
    typed = natural(column) if is_text else column
    if role in ("price", "quantity"):
        return typed.dtype.is_numeric() or (role == "price" and typed.dtype == pl.String)
    if role == "kind":
        return column.n_unique() <= MOST_KINDS and (
            typed.dtype in (pl.String, pl.Categorical) or typed.dtype.is_integer()
        )
    if role == "timestamp":
        return _time_problem(column) != "none"
    return not typed.dtype.is_nested() and typed.dtype not in (pl.Date, pl.Datetime)


def _time_problem(column: pl.Series) -> str:
    """ "" for a column of times, "none" where it holds none, or the question that it leaves."""
    try:
        times = read_times("", column.head(1000), TimeForm())
    except DataError as error:
        text = str(error)
        return text if "one way" in text or column.dtype.is_numeric() else "none"
    known = column.head(1000).null_count()
    return "none" if times.seconds.null_count() > known + len(column.head(1000)) // 2 else ""


def _by_place(raw: RawTable, finding: Finding) -> None:
    """Roles of columns without names: the first that holds times, then client and product in their order."""
    names = list(raw.frame.columns)
    time = next((name for name in names if _time_problem(raw.frame[name]) == ""), None)
    others = [name for name in names if name != time]
    finding.columns = {} if time is None else {"timestamp": time}
    finding.columns |= dict(zip(("client", "sku"), others, strict=False))
    finding.remarks.append("the file has no header: check which column is what")


def _times(raw: RawTable, finding: Finding) -> None:
    name = finding.columns.get("timestamp")
    if name is None:
        return
    problem = _time_problem(raw.frame[name])
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


def _kinds(raw: RawTable, finding: Finding) -> None:
    name = finding.columns.get("kind")
    if name is None:
        return
    values = [str(value) for value in raw.frame[name].drop_nulls().unique(maintain_order=True).to_list()]
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


def _kind_of(value: str) -> str:
    """Our kind of an event that a shop calls so."""
    return next((ours for pattern, ours in _KINDS if re.search(pattern, value, re.IGNORECASE)), "ignore")


def command(path: str | Sequence[str], finding: Finding) -> str:
    """The command that reads a table so, with everything quoted that a shell or the configuration would take apart."""
    settings: dict[str, Any] = {"path": path if isinstance(path, str) else list(path)}
    settings |= {f"{role}_column": finding.columns[role] for role in OF_COMMAND if role in finding.columns}
    settings |= finding.options
    return " ".join(["python -m ubp_fast.run data=table", *(setting(f"data.{k}", v) for k, v in settings.items())])


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
    """The command for a table whose columns were named wrongly; "" where the file says too little.

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
    return command(path, finding) if {"client", "timestamp"} <= finding.columns.keys() else ""
