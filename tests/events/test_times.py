from __future__ import annotations

from datetime import date, datetime, timedelta, timezone

import polars as pl
import pytest

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.times import TimeForm, Times, parse_timestamps, read_times

DAY = datetime(2022, 11, 9, 23, 59, 58)
DAY_S = int(DAY.replace(tzinfo=timezone.utc).timestamp())


@pytest.mark.parametrize(
    "text",
    [
        "2022-11-09 23:59:58",
        "2022-11-09T23:59:58",
        "2022-11-09 23:59:58.999",
        " 2022-11-09T23:59:58.250Z ",
        "2022-11-10 01:59:58+02:00",
    ],
)
def test_text_times(text: str) -> None:
    column = pl.Series("t", ["1970-01-01 00:00:01", text])  # formats may be mixed
    assert parse_timestamps("f", column).to_list() == [1, DAY_S]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_datetimes_round_down_also_before_1970(unit: str) -> None:
    column = pl.Series([DAY + timedelta(milliseconds=999), datetime(1969, 12, 31, 23, 59, 59, 500_000)])
    assert parse_timestamps("f", column.cast(pl.Datetime(unit))).to_list() == [DAY_S, -1]  # type: ignore[arg-type]


def test_time_zones_become_utc() -> None:
    column = pl.Series([DAY]).dt.replace_time_zone("Europe/Warsaw")
    assert parse_timestamps("f", column).to_list() == [DAY_S - 3600]


def test_dates_and_integers() -> None:
    assert parse_timestamps("f", pl.Series([date(1970, 1, 3)])).to_list() == [2 * 86_400]
    assert parse_timestamps("f", pl.Series([DAY_S], dtype=pl.UInt32)).to_list() == [DAY_S]
    assert parse_timestamps("f", pl.Series([DAY_S * 1000 + 999]), "ms").to_list() == [DAY_S]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["2022-11-09 00:00:00", "soon", "2022-02-30 00:00:00"],
            "hold a time, got 'soon' in row 1 \\(2 bad rows of 3\\)",
        ),
        (["2022-11-09 00:00:00", None], "hold a time, got None in row 1"),
        (["2022-11-09 00:00:00 tomorrow"], "hold a time"),
        ([DAY_S * 1000], "years 1900..2199, got .* in row 0 .* check the unit of the column \\(read as 's'\\)"),
        ([True], "text, datetime or numbers, got Boolean"),
        ([1.5e9, float("nan")], "hold a time, got nan in row 1"),
    ],
)
def test_bad_times(values: list, message: str) -> None:
    with pytest.raises(DataError, match=f"shop.parquet: column 'timestamp' must .*{message}"):
        parse_timestamps("shop.parquet", pl.Series("timestamp", values))


def test_unknown_unit() -> None:
    with pytest.raises(ValueError, match=r"unit must be one of .* got 'min'"):
        parse_timestamps("f", pl.Series([1]), "min")


def seconds(values: list, **form: str) -> Times:
    return read_times("log", pl.Series("when", values), TimeForm(**form))


HALF_PAST_S = 1_706_697_000  # 2024-01-31 10:30:00
MIDNIGHT_S = 1_706_659_200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-31", MIDNIGHT_S),
        ("2024/01/31", MIDNIGHT_S),
        ("2024.1.31", MIDNIGHT_S),
        ("2024-031", MIDNIGHT_S),
        ("2024-W05-3", MIDNIGHT_S),
        ("2024-01", MIDNIGHT_S - 30 * 86_400),
        ("2024-01-31 10:30", HALF_PAST_S),
        ("2024-01-31T10", HALF_PAST_S - 1800),
        ("2024-01-31T10:30:00,75", HALF_PAST_S),
        ("20240131T103000Z", HALF_PAST_S),
        ("2024-01-31T10:30Z", HALF_PAST_S),
        ("2024-01-31 10:30:00 UTC", HALF_PAST_S),
        ("2024-01-31 11:30:00+01", HALF_PAST_S),
        ("2024-01-31 11:30:00 +0100", HALF_PAST_S),
        ("2024-01-31 11:30:00 Europe/Warsaw", HALF_PAST_S),
        ("2024-01-31 05:30 America/New_York", HALF_PAST_S),
        ("31-Jan-2024 10:30", HALF_PAST_S),
        ("31-Jan-24", MIDNIGHT_S),
        ("January 31, 2024", MIDNIGHT_S),
        ("2024-01-31 10:30 AM", HALF_PAST_S),
        ("Wed, 31 Jan 2024 10:30:00 GMT", HALF_PAST_S),
        ("Wed Jan 31 10:30:00 +0000 2024", HALF_PAST_S),
        ("Wednesday, January 31, 2024 10:30 AM", HALF_PAST_S),
        ("Wed Jan 31 2024 11:30:00 GMT+0100 (CET)", HALF_PAST_S),
        ("31/Jan/2024:10:30:00 +0000", HALF_PAST_S),
        ("2024-01-31 10:30:00 +0000 UTC", HALF_PAST_S),
        ("2024-01-31T11:30:00+01:00[Europe/Warsaw]", HALF_PAST_S),
        ("2024-01-31T11:30[Europe/Warsaw]", HALF_PAST_S),
        ("24-01-31", MIDNIGHT_S),
        ("1706697000", HALF_PAST_S),
        ("1706697000.94", HALF_PAST_S),
        ("1706697000123", HALF_PAST_S),
        ("20240131", MIDNIGHT_S),
        ("20240131103000", HALF_PAST_S),
        ("31/1/2024 10:30", HALF_PAST_S),
        ("1/31/24", MIDNIGHT_S),
        ("31/1/2024 11:30 Europe/Warsaw", HALF_PAST_S),
        ("31.01.2024 11:30:00 +01:00", HALF_PAST_S),
        ("1/31/2024 10:30 AM UTC", HALF_PAST_S),
        ("31-01-24 10:30Z", HALF_PAST_S),
    ],
)
def test_forms_of_text(text: str, expected: int) -> None:
    assert seconds([text, None, f" {text} "]).seconds.to_list() == [expected, None, expected]


def test_a_column_of_zones_behind_dates_that_one_row_decides() -> None:
    times = seconds(["1/2/2024 10:30 Europe/Warsaw", "31/1/2024 11:30 +01:00", "31/1/2024 10:30", "soon", None])
    assert times.seconds.to_list() == [HALF_PAST_S + 86_400 - 3600, HALF_PAST_S, HALF_PAST_S, None, None]
    assert times.are_instants and "day first, as '31/1/2024 11:30' leaves no other way" in times.note


def test_dates_are_read_as_in_the_log_that_they_belong_to() -> None:
    assert seconds(["31/1/2024", "1/2/2024"]).order == "day first"
    assert seconds(["2024-01-31"]).order == ""
    for order, days in (("day first", 1), ("month first", -29)):
        times = seconds(["1/2/2024"], order=order)
        assert times.seconds.to_list() == [MIDNIGHT_S + days * 86_400] and times.order == order and not times.note
    with pytest.raises(
        DataError, match="must hold dates written month first as in the log of the run, got '31/1/2024'"
    ):
        seconds(["1/2/2024", "31/1/2024"], order="month first")
    with pytest.raises(DataError, match="must hold dates written year first as in the log of the run, got '1/2/2024'"):
        seconds(["1/2/2024"], order="year first")


def test_dates_of_two_readings_with_a_zone_say_what_can_be_done() -> None:
    with pytest.raises(
        DataError, match=r"got '1/2/2024 10:30 \+01:00'.* set .*'%d/%m/%Y %H:%M %#z' \(day first\)"
    ) as no:
        seconds(["1/2/2024 10:30 +01:00"])
    pattern = str(no.value).split("data.timestamp_format='")[1].split("'")[0]
    assert seconds(["1/2/2024 10:30 +01:00"], format=pattern).seconds.to_list() == [HALF_PAST_S + 86_400 - 3600]
    with pytest.raises(DataError, match="no format holds the name of a zone: write the year first"):
        seconds(["1/2/2024 10:30 Europe/Warsaw"])


@pytest.mark.parametrize(
    ("values", "expected", "note"),
    [
        ([HALF_PAST_S], HALF_PAST_S, ""),
        ([HALF_PAST_S + 0.94], HALF_PAST_S, ""),
        ([HALF_PAST_S * 1000 + 1], HALF_PAST_S, "milliseconds"),
        ([HALF_PAST_S * 10**6 + 1], HALF_PAST_S, "microseconds"),
        ([HALF_PAST_S * 10**9 + 1], HALF_PAST_S, "nanoseconds"),
        ([MIDNIGHT_S // 86_400], MIDNIGHT_S, "days"),
        ([20240131], MIDNIGHT_S, "%Y%m%d"),
        ([240131], MIDNIGHT_S, "%y%m%d"),
    ],
)
def test_units_of_numbers_are_guessed_and_told(values: list, expected: int, note: str) -> None:
    times = seconds(values)
    assert times.seconds.to_list() == [expected]
    assert note in times.note and bool(note) == bool(times.note)


def test_an_outlier_does_not_change_the_unit() -> None:
    """One row of a thousand: it is named later, by what comes out of it."""
    times = seconds([HALF_PAST_S] * 999 + [4_102_358_400])
    assert times.seconds[-1] == 4_102_358_400 and times.seconds[0] == HALF_PAST_S


def test_days_of_a_log_that_begins_at_zero() -> None:
    with pytest.raises(DataError, match=r"got 0 to 729, .* set data.timestamp_unit.*timestamp_origin="):
        seconds([0, 729])
    assert seconds([0, 30], unit="d", origin="2024-01-01").seconds[1] == MIDNIGHT_S
    assert seconds([0.5], unit="d", origin="2024-01-01").seconds[0] == MIDNIGHT_S - 30 * 86_400 + 43_200


def test_an_hour_that_the_clock_skips_is_no_time() -> None:
    """In spring; in autumn an hour shown twice is the first one. Such a text fits a form and gives nothing."""
    skipped, twice = "2024-03-31 02:30 Europe/Warsaw", "2024-10-27 02:30 Europe/Warsaw"
    times = seconds([skipped, twice, "2024-01-31 11:30 Europe/Warsaw"])
    assert times.seconds.to_list() == [None, 1_729_989_000, HALF_PAST_S]


def test_forms_may_be_mixed_among_rows_without_any() -> None:
    texts = ["soon"] * 500 + [
        "2024-01-31 10:30:00",
        "2024-01-31T10:30Z",
        "31-Jan-2024 10:30",
        "Jan 31, 2024 10:30:00",
    ] * 500
    found = seconds(texts).seconds
    assert found.null_count() == 500 and set(found[500:]) == {HALF_PAST_S}


def test_two_readings_are_refused_with_both() -> None:
    with pytest.raises(DataError, match=r"got '12/1/2010 8:26', which is 2010-01-12 08:26:00 or 2010-12-01 08:26:00;"):
        seconds(["12/1/2010 8:26", "11/1/2010 8:26"])
    times = seconds(["12/1/2010 8:26", "13/1/2010 8:26"])
    assert times.seconds[0] == int(datetime(2010, 1, 12, 8, 26, tzinfo=timezone.utc).timestamp())
    assert "day first, as '13/1/2010 8:26' leaves no other way" in times.note
    with pytest.raises(DataError, match=r"got '12-01-10', which is 2010-01-12 .* or 2010-12-01 .* or 2012-01-10 "):
        seconds(["12-01-10"])
    assert seconds(["13/13/2010", "31/1/2010", "13/1/2010"]).seconds.is_null().to_list() == [True, False, False]
    assert seconds(["13/13/2010"]).seconds.to_list() == [None]
    given = seconds(["12/1/2010 8:26", "x"], format="%m/%d/%Y %H:%M")
    assert given.seconds.to_list() == [int(datetime(2010, 12, 1, 8, 26, tzinfo=timezone.utc).timestamp()), None]
    assert given.rule == "hold a time written %m/%d/%Y %H:%M"


def test_a_time_zone_puts_days_on_the_shops_clock() -> None:
    """What names no zone keeps its clock; instants move to it."""
    zone = {"timezone": "Europe/Warsaw"}
    assert seconds(["2024-01-31 10:30"], **zone).seconds[0] == HALF_PAST_S
    assert seconds(["2024-01-31T10:30Z"], **zone).seconds[0] == HALF_PAST_S + 3600
    assert seconds(["2024-01-31 10:30:00 UTC"], **zone).seconds[0] == HALF_PAST_S + 3600
    assert seconds([HALF_PAST_S], **zone).seconds[0] == HALF_PAST_S + 3600
    aware = pl.Series("when", [datetime(2024, 1, 31, 10, 30)]).dt.replace_time_zone("UTC")
    assert read_times("log", aware, TimeForm(**zone)).seconds[0] == HALF_PAST_S + 3600


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"unit": "h"}, "timestamp unit must be one of .* got 'h'"),
        ({"timezone": "Mars/Base"}, "timezone must be a name like 'Europe/Warsaw' or 'UTC', got 'Mars/Base'"),
        ({"origin": "2024-01-01"}, "timestamp_origin must come with the unit"),
        ({"unit": "d", "origin": "soon"}, "timestamp_origin must be a date-time like"),
    ],
)
def test_forms_that_make_no_sense(form: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TimeForm(**form)


def test_a_format_that_is_none() -> None:
    with pytest.raises(UserError, match=r"timestamp_format must be made of codes like .* got '%Y-%m-%d %H'"):
        seconds(["2024-01-31 10"], format="%Y-%m-%d %H")
