"""Times in the forms that logs have them -> whole seconds.

    text       ISO 8601 in all its lengths, named months, zone names and offsets; `12/1/2010` where the column decides
               which number is the day; any other form by its format
    numbers    since 1970 (or an origin of the log's own) in s, ms, us, ns or days; 20240131, 20240131103000
    typed      datetimes and dates

Seconds count from 1970-01-01 00:00 on the clock of `timezone`, UTC without one: a time that names no zone keeps its
clock, an instant (a zone, an offset, a number since 1970) is put on that clock. So days and weeks begin at midnight of
the shop.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

import polars as pl

from ubp_fast.events.checks import bad_rows
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.split import DAY_S, utc_text

# Dates outside these years come from a wrong unit (milliseconds read as seconds), not from a shop.
EARLIEST_S, LATEST_S = -2_208_988_800, 7_258_118_400  # 1900-01-01, 2200-01-01
# A unit that is guessed has to give times in these years: 1990 to the next one.
FIRST_YEAR = 1990
UNITS = ("s", "ms", "us", "ns", "d")
NS_PER_UNIT = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "d": DAY_S * 1_000_000_000}
NS_PER_SECOND = NS_PER_UNIT["s"]
# Numbers that spell a date: digits -> format.
SPELLED = {6: "%y%m%d", 8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
# Of at least this many numbers, one or one in a hundred may lie outside of the years of a unit: outliers, to be named.
LEAST_FOR_OUTLIERS = 10
# Texts that decide whether a column of text holds numbers.
LOOKED_AT = 1000
# Texts of other forms than those read so far that are looked at for the next one.
FORMS_LOOKED_FOR = 100

_ISO_DATES = ("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y%m%d")
_OTHER_DATES = ("%Y-%j", "%G-W%V-%u", "%d-%B-%Y", "%d-%B-%y", "%d %B %Y", "%B %d, %Y", "%B %d %Y")
_CLOCKS = ("%H:%M:%S%.f", "%H:%M", "%H%M%S", "%H%M")
_CLOCKS_12 = ("%I:%M:%S %p", "%I:%M %p", "%I:%M:%S%p", "%I:%M%p")
_ZONES = ("%#z", " %#z")
_OFFSETS = ("%z", "%#z", "%:z")
_WEEKDAYS = ("%A, ", "%A ")
_NAMED_ZONE = re.compile(r"^(.*\d(?::\d\d)*(?:\.\d+)?(?: ?[AaPp][Mm]\b)?) ?([A-Za-z][A-Za-z_/+\-0-9]*)$")
_TWO_WAYS = r"^(\d{1,2})([/.\-])(\d{1,2})[/.\-](\d{4}|\d{2})(?:$|[ T,])"
# Spellings that are brought to usual ones: an hour alone, an offset with a name behind it, a zone in brackets.
_UNUSUAL = (
    (r"^(\d{4}-?\d\d-?\d\d[T ]\d\d)(Z|[+\-]\d.*)?$", "${1}:00${2}"),
    (r"([+\-]\d\d:?\d\d)(?: [A-Z]{2,5}| \(.*\)|\[.*\])$", "${1}"),
    (r"\[([\w/+\-]+)\]$", " ${1}"),
)
_NUMBER = r"^[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?$"
# A zone behind a clock: an offset, or a name.
_OFFSET = r"Z|[+\-]\d\d(?::?\d\d)?"
_ZONE_BEHIND = rf"(:\d\d(?:[.,]\d+)?(?: ?[AaPp][Mm])?)( ?(?:{_OFFSET}|[A-Za-z][A-Za-z_/+\-0-9]*))$"


@dataclass(frozen=True)
class TimeForm:
    """How the times of a column are written.

    Attributes:
        unit: of numbers: "s", "ms", "us", "ns" or "d" (days); None: the one that gives times from 1990 to next year.
        format: of text, with the codes of strftime, such as "%d/%m/%Y %H:%M"; None: see the module's text.
        timezone: name of the zone whose clock times are kept on, such as "Europe/Warsaw"; None: UTC.
        origin: ISO date-time from which numbers count instead of 1970; needs a unit.
        order: how dates such as 12/1/2010 were read in the log that these belong to, see `Times`; None: the column
            has to decide.

    Raises:
        UserError: an unknown unit or zone, or an origin that is no date-time or comes without a unit.
    """

    unit: str | None = None
    format: str | None = None
    timezone: str | None = None
    origin: str | None = None
    order: str | None = None

    def __post_init__(self) -> None:
        if self.unit is not None and self.unit not in UNITS:
            raise UserError(f"source: timestamp unit must be one of {list(UNITS)}, got '{self.unit}'")
        if self.timezone is not None:
            try:
                ZoneInfo(self.timezone)
            except (ZoneInfoNotFoundError, ValueError, OSError) as error:
                raise UserError(
                    f"source: timezone must be a name like 'Europe/Warsaw' or 'UTC', got '{self.timezone}'"
                ) from error
        if self.origin is not None:
            if self.unit is None:
                raise UserError("source: timestamp_origin must come with the unit it counts in, set timestamp_unit=d")
            iso_seconds("timestamp_origin", self.origin)


@dataclass(frozen=True)
class Times:
    """A column of times as read.

    Attributes:
        seconds: i64, name `timestamp_s`; null where the row holds no time.
        rule, remedy, detail: what every row must do, what to do about those that do not, and why (or ""), for messages.
        note: what was guessed, or "".
        are_instants: they are moments, which clocks of other zones show otherwise; False: what a clock showed.
        order: of dates such as 12/1/2010: "day first", "month first", "year first"; "" where there are none.
    """

    seconds: pl.Series
    rule: str = "hold a time"
    remedy: str = "write times like 2024-01-31 10:30:00, or give their format in data.timestamp_format"
    detail: str = ""
    note: str = ""
    are_instants: bool = False
    order: str = ""


def iso_seconds(name: str, text: str) -> int:
    """An ISO date-time of the configuration (a bare date is its midnight, a zone is turned into UTC) in seconds.

    Raises:
        UserError: not an ISO date-time.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"source: {name} must be a date-time like '2022-11-09 23:59:59', got '{text}'") from error
    moment = moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment
    return int(moment.timestamp() // 1)


def parse_timestamps(file: str, column: pl.Series, unit: str = "s") -> pl.Series:
    """Seconds since 1970 UTC, fractions rounded down.

    Args:
        file: name for messages.
        column: text, datetimes of any unit (without a time zone they are taken as UTC), dates, or numbers.
        unit: unit of numbers: "s", "ms", "us", "ns" or "d".

    Returns:
        i64 series, name `timestamp_s`.

    Raises:
        DataError: wrong dtype, null, unparsable, or outside the years 1900..2199.
    """
    times = read_times(file, column, TimeForm(unit))
    if times.seconds.null_count():
        raise bad_rows(file, column.name, times.rule, times.seconds.is_null(), column, times.remedy, times.detail)
    outside = outside_years(times.seconds)
    if outside.any():
        remedy = f"check the unit of the column (read as '{unit}')" if column.dtype.is_numeric() else "correct the rows"
        raise bad_rows(file, column.name, "lie in the years 1900..2199", outside, column, remedy)
    return times.seconds


def outside_years(seconds: pl.Series) -> pl.Series:
    """True where a time lies outside of 1900..2199; nulls do not."""
    return ((seconds < EARLIEST_S) | (seconds >= LATEST_S)).fill_null(False)


def read_times(file: str, column: pl.Series, form: TimeForm) -> Times:
    """Reads a column of any of the forms; rows that hold no time are null.

    Raises:
        DataError: a dtype that holds no times, numbers of no or of more than one unit, or dates that can be read in
            two ways.
        UserError: `form.format` is no format.
    """
    dtype = column.dtype
    if isinstance(dtype, pl.Datetime):
        clock = column if dtype.time_zone is None else _on_clock(column, form.timezone)
        seconds = _floor(clock.to_physical(), NS_PER_SECOND // NS_PER_UNIT[dtype.time_unit])
        return Times(seconds, are_instants=dtype.time_zone is not None)
    if dtype == pl.Date:
        return Times(_named(column.to_physical().cast(pl.Int64) * DAY_S))
    if isinstance(dtype, pl.Categorical | pl.Enum):
        column, dtype = column.cast(pl.String), pl.String()
    if form.format is not None and (dtype == pl.String or dtype.is_integer()):
        return _by_format(column.cast(pl.String).str.strip_chars(), form)
    if dtype == pl.String:
        text = column.str.strip_chars()
        first = text.drop_nulls().head(LOOKED_AT)
        if not len(first) or int(first.str.contains(_NUMBER).sum()) * 2 <= len(first):
            return _of_text(file, text, form)
        is_number = text.str.contains(_NUMBER)
        numbers = pl.select(pl.when(is_number).then(text)).to_series().alias(column.name)
        whole = numbers.cast(pl.Int64, strict=False)
        column = whole if whole.null_count() == numbers.null_count() else numbers.cast(pl.Float64)
    if column.dtype.is_numeric():
        return _of_numbers(file, column, form)
    if column.dtype == pl.Null:
        return Times(_named(column.cast(pl.Int64)))
    raise DataError(
        f"{file}: column '{column.name}' must be text, datetime or numbers, got {dtype};"
        " write times like 2024-01-31 10:30:00 or as seconds since 1970"
    )


def _named(seconds: pl.Series) -> pl.Series:
    return seconds.cast(pl.Int64).alias("timestamp_s")


def _floor(numbers: pl.Series, per_second: int) -> pl.Series:
    return _named(numbers // per_second)


def _on_clock(instants: pl.Series, zone: str | None) -> pl.Series:
    """Aware datetimes as naive ones on the clock of a zone."""
    return instants.dt.convert_time_zone(zone or "UTC").dt.replace_time_zone(None)


def _zoned(seconds: pl.Series, zone: str | None) -> pl.Series:
    """Instants in seconds since 1970 UTC on the clock of a zone."""
    if zone is None:
        return _named(seconds)
    inside = pl.select(pl.when(~outside_years(seconds)).then(seconds)).to_series()
    clock = _on_clock((inside * 1_000_000).cast(pl.Datetime("us", "UTC")), zone)
    return _named(pl.select(pl.coalesce(clock.to_physical() // 1_000_000, seconds)).to_series())


def _of_numbers(file: str, column: pl.Series, form: TimeForm) -> Times:
    numbers = column
    if column.dtype.is_float() or column.dtype.is_decimal():
        floats = column.cast(pl.Float64)
        numbers = pl.select(pl.when(floats.is_finite()).then(floats)).to_series()
        whole = numbers.drop_nulls()
        if len(whole) and (whole == whole.floor()).all() and (whole.abs() < 2**53).all():
            numbers = numbers.cast(pl.Int64)
    else:
        numbers = column.cast(pl.Int64, strict=False)
    note, unit = "", form.unit
    if unit is None:
        unit, spelled = _guess(file, column.name, numbers)
        if spelled is not None:
            times = _by_format(numbers.cast(pl.String), TimeForm(format=spelled, timezone=form.timezone))
            return Times(times.seconds, times.rule, times.remedy, note=f"read as dates written {spelled}")
        note = "" if unit == "s" else f"read as {_UNIT_NAMES[unit]} since 1970"
    seconds = _seconds_of(numbers, unit)
    if form.origin is not None:
        return Times(_named(seconds + iso_seconds("timestamp_origin", form.origin)), note=note)
    if unit == "d":
        return Times(seconds.alias("timestamp_s"), note=note)
    return Times(_zoned(seconds, form.timezone), note=note, are_instants=True)


_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds", "d": "days"}


def _seconds_of(numbers: pl.Series, unit: str) -> pl.Series:
    if numbers.dtype.is_float():
        seconds = (numbers * (NS_PER_UNIT[unit] / NS_PER_SECOND)).floor()
        return seconds.clip(-(2.0**62), 2.0**62).cast(pl.Int64)
    if unit == "d":
        return numbers.clip(-(2**40), 2**40) * DAY_S
    return numbers // (NS_PER_SECOND // NS_PER_UNIT[unit])


def _guess(file: str, name: str, numbers: pl.Series) -> tuple[str, str | None]:
    """The unit, or the format, in which nearly all numbers are times from 1990 to next year.

    Raises:
        DataError: there is none.
    """
    known = numbers.drop_nulls()
    if not len(known):
        return "s", None
    first_s, end_s = _plausible_s()
    least = len(known) - (max(1, len(known) // 100) if len(known) >= LEAST_FOR_OUTLIERS else 0)

    def fits(seconds: pl.Series) -> bool:
        return int(((seconds >= first_s) & (seconds < end_s)).sum()) >= least

    units = [unit for unit in UNITS if fits(_seconds_of(known, unit))]
    spelled = []
    if known.dtype.is_integer() and not units:
        text = known.cast(pl.String)
        for length, pattern in SPELLED.items():
            if int((text.str.len_bytes() == length).sum()) >= least and fits(_strptime(text, pattern).fill_null(0)):
                spelled.append(pattern)
    if len(units) == 1 and not spelled:
        return units[0], None
    if len(spelled) == 1 and not units:
        return "s", spelled[0]
    low, high = (str(known[int(place)]) for place in (known.arg_min() or 0, known.arg_max() or 0))
    raise DataError(
        f"{file}: column '{name}' must hold numbers that are times from {FIRST_YEAR} to next year in one unit, got"
        f" {low} to {high}, which are none in s, ms, us, ns or days since 1970, nor dates like 20240131; set"
        " data.timestamp_unit, or for days counted from a day of your own data.timestamp_unit=d"
        " data.timestamp_origin=2024-01-01"
    )


def _strptime(text: pl.Series, pattern: str) -> pl.Series:
    """Seconds on the clock that the text shows (UTC where the format holds an offset); null where it does not fit."""
    zone = "UTC" if any(code in pattern for code in _OFFSETS) else None
    times = text.str.strptime(pl.Datetime("us", zone), pattern, strict=False, exact=True)
    return times.to_physical() // 1_000_000


def _by_format(text: pl.Series, form: TimeForm) -> Times:
    assert form.format is not None
    try:
        seconds = _strptime(text, form.format)
    except pl.exceptions.PolarsError as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"source: timestamp_format must be made of codes like '%d/%m/%Y %H:%M', got '{form.format}': {reason}"
        ) from error
    are_instants = _has_offset(form.format)
    if are_instants:
        seconds = _zoned(seconds, form.timezone)
    rule, remedy = f"hold a time written {form.format}", "correct those rows or data.timestamp_format"
    return Times(_named(seconds), rule, remedy, are_instants=are_instants)


def _has_offset(pattern: str) -> bool:
    return "UTC" in pattern or any(code in pattern for code in _OFFSETS)


@cache
def _formats() -> tuple[str, ...]:
    """Formats that can be read in one way only, the usual ones first."""
    clocks = [(" ", clock) for clock in _CLOCKS] + [("T", clock) for clock in _CLOCKS]
    plain = list(_ISO_DATES) + ["".join((day, *clock)) for day, clock in itertools.product(_ISO_DATES, clocks)]
    timed = [form for form in plain if "%H" in form]
    zoned = [form + zone for form, zone in itertools.product(timed, _ZONES)]
    noon = [f"{day} {clock}" for day, clock in itertools.product(_ISO_DATES + _OTHER_DATES, _CLOCKS_12)]
    other = list(_OTHER_DATES) + [f"{day} {clock}" for day, clock in itertools.product(_OTHER_DATES, _CLOCKS[:2])]
    weekday = [start + form for start, form in itertools.product(_WEEKDAYS, other + timed + noon)]
    weekday += [f"%A %B %d %H:%M:%S{zone} %Y" for zone in ("", " %#z", " UTC")]
    weekday += ["%A %B %d %Y %H:%M:%S GMT%#z", "%d/%B/%Y:%H:%M:%S %#z"]
    late = [form + zone for form, zone in itertools.product(other + weekday, _ZONES) if "%H" in form]
    usual = ["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S"]
    return tuple(dict.fromkeys([*usual, *plain, *zoned, *noon, *other, *weekday, *late, "%Y-%m", "%Y/%m"]))


def _of_text(file: str, text: pl.Series, form: TimeForm) -> Times:
    """Each form in turn on what the forms before it left."""
    seconds = _strptime(text, _formats()[0])
    if seconds.null_count() == text.null_count():
        return Times(_named(seconds))
    note, order, tried = "", "", set[tuple[str, str | None]]()
    while len(left := (seconds.is_null() & text.is_not_null()).arg_true()):
        rest = text.gather(left)
        for pattern, usual in _UNUSUAL:
            rest = rest.str.replace(pattern, usual)
        some = rest.gather_every(max(len(rest) // FORMS_LOOKED_FOR, 1))
        found = next((found for value in some if (found := _form_of(value)) not in (None, *tried)), None)
        if found is None:
            break
        tried.add(found)
        seconds = seconds.scatter(left, _read_as(rest, *found, form.timezone))
    left = (seconds.is_null() & text.is_not_null()).arg_true()
    rest = text.gather(left)
    two_ways = rest.str.contains(_TWO_WAYS)
    are_instants = any(zone is not None or _has_offset(pattern) for pattern, zone in tried)
    if two_ways.any():
        bare, zones = _without_zones(rest)
        read, order, note = _two_ways(file, bare, two_ways, zones, form.order)
        if zones.null_count() < len(zones):
            # Whatever zones there may be behind a date in the usual order are read there.
            clocks = (read * 1_000_000).cast(pl.Datetime("us")).dt.strftime("%Y-%m-%d %H:%M:%S")
            zoned = _of_text(file, pl.select(clocks + zones.fill_null("")).to_series().alias(text.name), form)
            read, are_instants = zoned.seconds, are_instants or zoned.are_instants
        seconds = seconds.scatter(left, read)
    return Times(_named(seconds), note=note, are_instants=are_instants, order=order)


def _without_zones(text: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Texts without the zone behind the clock, and that zone, null where there is none."""
    zones = text.str.extract(_ZONE_BEHIND, 2)
    known = {zone: is_zone(zone.strip()) for zone in zones.drop_nulls().unique().to_list()}
    zones = zones.replace_strict(
        {zone: zone if names_one else None for zone, names_one in known.items()}, default=None, return_dtype=pl.String
    )
    bare = pl.select(pl.when(zones.is_null()).then(text).otherwise(text.str.replace(_ZONE_BEHIND, "${1}")))
    return bare.to_series().alias(text.name), zones


def _form_of(value: str) -> tuple[str, str | None] | None:
    """Format of a text, and the name of a zone that stands behind it."""
    named = _NAMED_ZONE.match(value)
    if named is not None and named[2] in _zone_names():
        found = _form_of(named[1])
        return None if found is None or found[1] is not None or _has_offset(found[0]) else (found[0], named[2])
    if re.match(_TWO_WAYS, value):
        return None
    one = pl.Series([value.replace(",", ".") if re.search(r":\d\d,\d", value) else value])
    for pattern in _formats():
        if _could_fit(value, pattern):
            seconds = _strptime(one, pattern)
            if not seconds.null_count() and not outside_years(seconds).any():
                return pattern, None
    return None


def _could_fit(value: str, pattern: str) -> bool:
    """False for formats that the first characters rule out: there are many."""
    is_digits = value[:4].isdigit()
    return is_digits == pattern.startswith(("%Y", "%G")) if value else False


@cache
def _zone_names() -> frozenset[str]:
    return frozenset(available_timezones())


def is_zone(text: str) -> bool:
    """True for an offset such as +01:00 and for the name of a zone such as Europe/Warsaw."""
    return bool(re.fullmatch(_OFFSET, text)) or text in _zone_names()


def _read_as(text: pl.Series, pattern: str, zone: str | None, clock: str | None) -> pl.Series:
    """Seconds of the texts of one form; those that name another zone stay null."""
    if zone is not None:
        is_zone = text.str.ends_with(zone)
        bare = text.str.strip_suffix(zone).str.strip_chars_end()
        naive = (_strptime(bare, pattern) * 1_000_000).cast(pl.Datetime("us"))
        # At the end of summer time a clock shows an hour twice: the earlier one; in spring it skips one: no time.
        aware = naive.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null")
        read = _on_clock(aware, clock).to_physical() // 1_000_000
        return pl.select(pl.when(is_zone).then(read)).to_series()
    if pattern.find("%.f") >= 0:
        text = text.str.replace(r"(:\d\d),(\d)", "${1}.${2}")
    read = _strptime(text, pattern)
    return _zoned(read, clock) if _has_offset(pattern) else read


def _two_ways(
    file: str, text: pl.Series, two_ways: pl.Series, zones: pl.Series, known: str | None
) -> tuple[pl.Series, str, str]:
    """Dates such as 12/1/2010: the column must leave one reading, or that of the log it belongs to.

    Args:
        file: for messages.
        text: without zones.
        two_ways: rows that hold such a date.
        zones: what stood behind the clock, or null.
        known: order of the log that these dates belong to, None where they are the log.

    Returns:
        Seconds of every row, null where it is no such date; the order, and what decided.

    Raises:
        DataError: several readings fit, or another than that of the log; names them.
    """
    shown = text.filter(two_ways)
    first = re.match(_TWO_WAYS, shown[0])
    assert first is not None
    mark, year = first[2], "%Y" if len(first[4]) == 4 else "%y"
    clock = next((form for form in ("", *_tails()) if _fits_tail(shown[0][first.end(4) :], form)), "")
    orders = {"day first": ("%d", "%m", year), "month first": ("%m", "%d", year)}
    if year == "%y":
        orders["year first"] = (year, "%m", "%d")
    forms = {order: mark.join(codes) + clock for order, codes in orders.items()}
    read = {order: _in_years(_strptime(text, form), year) for order, form in forms.items()}
    fitting = {order: len(text) - seconds.null_count() for order, seconds in read.items()}
    best = [order for order in read if fitting[order] == max(fitting.values())]
    if known in best:
        return read[known], known, ""
    if known is not None and max(fitting.values()):
        row = int((read[best[0]].is_not_null() & read[known].is_null() if known in read else two_ways).arg_true()[0])
        raise DataError(
            f"{file}: column '{text.name}' must hold dates written {known} as in the log of the run, got '{text[row]}';"
            " write them like that, or with the year first, such as 2024-01-31"
        )
    if len(best) == 1 or not max(fitting.values()):
        others = [read[order] for order in read if order != best[0]]
        row = next(
            (row for row in read[best[0]].is_not_null().arg_true() if any(one[row] is None for one in others)), 0
        )
        note = f"read as {forms[best[0]]}, {best[0]}, as '{text[row]}' leaves no other way"
        return read[best[0]], *((best[0], note) if max(fitting.values()) else ("", ""))
    row = int(read[best[0]].is_not_null().arg_true()[0])
    example, zone = text[row], zones[row] or ""
    seconds = [_strptime(pl.Series([example]), forms[order])[0] for order in best]
    readings = ["no date" if second is None else utc_text(second) for second in seconds]
    offset = re.sub(_OFFSET, "%#z", zone)
    settings = [f"data.timestamp_format='{forms[order]}{offset}' ({order})" for order in best]
    remedy = f"set {' or '.join(settings)}"
    if zone.strip() in _zone_names():
        remedy = "no format holds the name of a zone: write the year first, such as 2024-01-31"
    raise DataError(
        f"{file}: column '{text.name}' must hold times that can be read in one way, got '{example}{zone}', which is"
        f" {' or '.join(readings)}; {remedy}"
    )


def _in_years(seconds: pl.Series, year: str) -> pl.Series:
    """Times whose year has two digits lie from 1990 to next year, or are null."""
    if year == "%Y":
        return seconds
    first_s, end_s = _plausible_s()
    return pl.select(pl.when((seconds >= first_s) & (seconds < end_s)).then(seconds)).to_series()


def _plausible_s() -> tuple[int, int]:
    """From the beginning of 1990 to the end of next year."""
    next_year = datetime.now(timezone.utc).year + 1
    first, end = (datetime(year, 1, 1, tzinfo=timezone.utc).timestamp() for year in (FIRST_YEAR, next_year + 1))
    return int(first), int(end)


def _tails() -> tuple[str, ...]:
    return tuple(
        mark + clock for mark, clock in itertools.product((" ", "T", ", "), ("%H:%M:%S", *_CLOCKS[:2], *_CLOCKS_12))
    )


def _fits_tail(tail: str, form: str) -> bool:
    if not form:
        return not tail
    return not _strptime(pl.Series([f"2000-01-01{tail}"]), f"%Y-%m-%d{form}").null_count()
