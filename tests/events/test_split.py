from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS, DataError
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.events.split import DAY_S, Split, fitting_days, floor_day, split_at

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp())


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((GOLDEN / "d_split.json").read_text())


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("split") / "events"
    Challenge(str(GOLDEN / "small"), layout="raw").prepare(directory)
    return EventDirectory.open(directory)


def test_boundaries_equal_the_organisers(events: EventDirectory, expected: dict) -> None:
    assert events.split == Split(
        seconds(expected["train_target_start"]),
        seconds(expected["validation_target_start"]),
        seconds(expected["end_date"]),
    )


def test_row_numbers_of_every_part_equal_the_organisers(events: EventDirectory, expected: dict) -> None:
    rows = np.load(GOLDEN / "d_split_rows.npz", allow_pickle=False)
    split = events.split
    windows = {"input": (0, split.input_end_s), "train": split.train_window_s, "valid": split.validation_window_s}
    compared = 0
    for kind in EVENT_KINDS:
        times = events.frame(kind)["timestamp_s"].to_numpy()
        assert len(times) == expected["rows"][kind]["all"]
        for part, (start_s, end_s) in windows.items():
            if f"{kind}_{part}" in rows:
                found = np.flatnonzero((times >= start_s) & (times < end_s))
                np.testing.assert_array_equal(found, rows[f"{kind}_{part}"])
                compared += 1
    assert compared == len(rows.files) == 7


def test_last_second_of_the_validation_window_is_inside(events: EventDirectory, expected: dict) -> None:
    purchases = events.purchases(*events.split.validation_window_s)
    assert len(purchases) == expected["target_rows"]["validation_target"]
    assert purchases["timestamp_s"].max() == events.split.end_s


@pytest.mark.parametrize("end", ["2022-11-09 23:59:59", "2022-11-09 00:00:00", "1969-12-31 23:00:00"])
def test_windows_are_fourteen_days_from_midnight(end: str) -> None:
    split = split_at(seconds(end))
    assert split.input_end_s % DAY_S == 0
    assert split.validation_start_s - split.input_end_s == 14 * DAY_S
    assert split.validation_start_s + 13 * DAY_S <= split.end_s < split.validation_start_s + 14 * DAY_S


@pytest.mark.parametrize(
    ("days", "wanted", "found"), [(100, 14, 14), (100, 30, 25), (120, 30, 30), (9, 2, 2), (21, 7, 5)]
)
def test_windows_fit_into_the_log(days: int, wanted: int, found: int) -> None:
    assert fitting_days(0, days * DAY_S, wanted) == found


@pytest.mark.parametrize(("days", "wanted", "least"), [(19, 14, 20), (19, 30, 20), (7, 2, 8)])
def test_a_log_of_fewer_than_four_windows_is_refused(days: int, wanted: int, least: int) -> None:
    with pytest.raises(DataError, match=f"must span at least {least} days up to the last purchase, got {days} "):
        fitting_days(0, days * DAY_S, wanted)


def test_challenge_dates() -> None:
    split = split_at(seconds("2022-11-09 23:59:59"))
    assert (split.input_end_s, split.validation_start_s) == (seconds("2022-10-13"), seconds("2022-10-27"))


def test_floor_day_before_1970() -> None:
    assert floor_day(-1) == -DAY_S


def test_boundaries_in_another_order() -> None:
    with pytest.raises(ValueError, match="input_end_s < validation_start_s <= end_s, got 5, 4, 9"):
        Split(5, 4, 9)
