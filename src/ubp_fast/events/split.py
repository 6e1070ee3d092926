"""Where the history ends and the two target windows lie: the organisers' rule.

    |---------------- input ----------------|-- train target, 14 d --|-- validation, 13 d and the last day --|
                                        input_end_s           validation_start_s                          end_s

The end is the last purchase; later events of the other kinds do not move it. The input ends at midnight 27 days before
the end, the validation window starts 14 days after that and includes the end itself. Other data may have windows of n
days: 2 n - 1 and n in the place of 27 and 14.
Source: Synerise/recsys2025, split_data. One deviation: there, the fraction of a second of the last purchase stays in
all boundaries (an end of 23:59:59.250 puts them at 00:00:00.250); here time is counted in whole seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone

from ubp_fast.events.schema import DataError

DAY_S = 86_400
# Of the challenge, and of other data by default.
TARGET_DAYS = 14
# Two target windows, one past window to learn from, and as long a history before it.
WINDOWS_OF_A_LOG = 4
LEAST_TARGET_DAYS = 5


@dataclass(frozen=True)
class Split:
    """Boundaries of a data set in seconds since 1970 UTC.

    Attributes:
        input_end_s: input events have `timestamp_s < input_end_s`; the train target starts here.
        validation_start_s: the train target ends before it, the validation target starts here.
        end_s: last second of the validation target (inclusive).
    """

    input_end_s: int
    validation_start_s: int
    end_s: int

    def __post_init__(self) -> None:
        if not self.input_end_s < self.validation_start_s <= self.end_s:
            raise ValueError(
                "Split: boundaries must satisfy input_end_s < validation_start_s <= end_s, got"
                f" {self.input_end_s}, {self.validation_start_s}, {self.end_s}"
            )

    @property
    def train_window_s(self) -> tuple[int, int]:
        """Train target as a half-open interval."""
        return self.input_end_s, self.validation_start_s

    @property
    def validation_window_s(self) -> tuple[int, int]:
        """Validation target as a half-open interval: its last second is `end_s`."""
        return self.validation_start_s, self.end_s + 1


def floor_day(timestamp_s: int) -> int:
    """Midnight (UTC) at or before a time in seconds."""
    return timestamp_s - timestamp_s % DAY_S


def utc_text(timestamp_s: int) -> str:
    """A time in seconds as 'YYYY-MM-DD HH:MM:SS' (UTC)."""
    return datetime.fromtimestamp(timestamp_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def split_at(last_purchase_s: int, target_days: int = TARGET_DAYS) -> Split:
    """Boundaries from the time of the last purchase.

    Args:
        last_purchase_s: seconds since 1970 UTC.
        target_days: length of each target window in days.
    """
    input_end_s = floor_day(last_purchase_s - (2 * target_days - 1) * DAY_S)
    return Split(input_end_s, input_end_s + target_days * DAY_S, last_purchase_s)


def fitting_days(first_s: int, last_purchase_s: int, wanted_days: int = TARGET_DAYS) -> int:
    """Length of the target windows in days: what is wanted, or fewer where the log is short.

    Raises:
        DataError: the log is shorter than three weeks, or than four of the wanted windows where these are short.
    """
    days = -(-(last_purchase_s - first_s) // DAY_S)
    target_days = min(wanted_days, days // WINDOWS_OF_A_LOG)
    least_days = min(wanted_days, LEAST_TARGET_DAYS)
    if target_days < least_days:
        least = WINDOWS_OF_A_LOG * least_days
        raise DataError(
            f"events: the history must span at least {least} days up to the last purchase, got {days} (from"
            f" {utc_text(first_s)} to {utc_text(last_purchase_s)}); two target windows, a past window to learn from and"
            " what lies before it have to fit into it: bring a longer history"
        )
    return target_days
