"""When cron comes due: across the changes of the clock, and after a time in which nobody looked."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.schedules.cron import LOOK_BACK, CronTimes, due, local, upcoming

BERLIN = "Europe/Berlin"
SPRING = datetime(2026, 3, 28, 23, 0, tzinfo=ZoneInfo(BERLIN))  # on the 29th, 02:00 to 03:00 does not exist
AUTUMN = datetime(2026, 10, 24, 23, 0, tzinfo=ZoneInfo(BERLIN))  # on the 25th, 02:00 to 03:00 comes twice


def fires(cron: str, begin: datetime, hours: float) -> list[str]:
    times = CronTimes(cron, BERLIN)
    end = begin.timestamp() + hours * 3600
    return [local(times, at).strftime("%d %H:%M%z") for at in upcoming(times, begin.timestamp(), 1000) if at <= end]


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("30 2 * * *", ["29 03:00+0200", "30 02:30+0200"]),
        ("0,30 2 * * *", ["29 03:00+0200", "30 02:00+0200", "30 02:30+0200"]),
        ("*/30 2 * * *", ["29 03:00+0200", "30 02:00+0200", "30 02:30+0200"]),
        ("0 3 * * *", ["29 03:00+0200", "30 03:00+0200"]),
        ("0 */2 * * *", [f"29 {h:02d}:00+0{1 if h < 2 else 2}00" for h in (0, 3, *range(4, 24, 2))]
         + [f"30 {h:02d}:00+0200" for h in (0, 2)]),
    ],
)  # fmt: skip
def test_a_time_that_does_not_exist_fires_once_after_the_gap(cron: str, expected: list[str]) -> None:
    assert fires(cron, SPRING, 27) == expected


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("30 2 * * *", ["25 02:30+0200", "26 02:30+0100"]),
        ("*/30 2 * * *", ["25 02:00+0200", "25 02:30+0200", "26 02:00+0100", "26 02:30+0100"]),
        ("0 */2 * * *", [f"25 {h:02d}:00+0{2 if h < 3 else 1}00" for h in range(0, 24, 2)]
         + [f"26 {h:02d}:00+0100" for h in (0, 2)]),
    ],
)  # fmt: skip
def test_a_time_that_comes_twice_fires_the_first_time(cron: str, expected: list[str]) -> None:
    assert fires(cron, AUTUMN, 28.5) == expected


@pytest.mark.parametrize("cron", ["0 * * * *", "0 0-23 * * *", "0 */1 * * *"])
def test_every_hour_is_every_hour_that_passes(cron: str) -> None:
    assert fires(cron, SPRING, 5) == [
        "29 00:00+0100", "29 01:00+0100", "29 03:00+0200", "29 04:00+0200", "29 05:00+0200"
    ]  # fmt: skip
    assert fires(cron, AUTUMN, 5) == [
        "25 00:00+0200", "25 01:00+0200", "25 02:00+0200", "25 02:00+0100", "25 03:00+0100"
    ]  # fmt: skip


@given(
    cron=st.sampled_from(["30 2 * * *", "0 * * * *", "*/20 1-3 * * *", "15 */2 * * *", "0 2 * * 0", "*/7 * * * *"]),
    tz=st.sampled_from([BERLIN, "America/New_York", "Australia/Lord_Howe", "UTC", "America/Santiago"]),
    begin=st.sampled_from([SPRING, AUTUMN, datetime(2026, 4, 4, tzinfo=ZoneInfo("UTC"))]),
    minutes=st.integers(0, 3 * 1440),
)
def test_it_does_not_matter_from_where_one_looks(cron: str, tz: str, begin: datetime, minutes: int) -> None:
    """A tick knows the last time only: the next one from there is the one that looking ahead had shown."""
    times = CronTimes(cron, tz)
    start = begin.timestamp()
    ahead = upcoming(times, start, 60)
    assert ahead == sorted(set(ahead))
    at = start + minutes * 60
    later = [moment for moment in ahead if moment > at]
    if later:
        assert times.next_after(at) == later[0]


@settings(max_examples=20)
@given(hour=st.integers(0, 23), minute=st.integers(0, 59), tz=st.sampled_from([BERLIN, "America/New_York"]))
def test_a_named_time_fires_once_a_day_all_year(hour: int, minute: int, tz: str) -> None:
    times = CronTimes(f"{minute} {hour} * * *", tz)
    begin = datetime(2026, 1, 1, tzinfo=ZoneInfo(tz)) - timedelta(seconds=1)
    days = Counter(local(times, at).date() for at in upcoming(times, begin.timestamp(), 365))
    assert len(days) == 365
    assert set(days.values()) == {1}


@pytest.mark.parametrize(
    ("cron", "what"),
    [
        ("0 2 * *", "4 fields"),
        ("0 0 2 * * *", "6 fields"),
        ("@daily", "1 fields"),
        ("61 * * * *", "bad minute"),
        ("0 25 * * *", "bad hour"),
        ("0 0 30 2 *", "bad day-of-month"),
        ("*/0 * * * *", "bad minute"),
        ("a b c d e", "bad minute"),
    ],
)
def test_a_bad_expression_is_explained(cron: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        CronTimes(cron, "UTC")


@pytest.mark.parametrize("tz", ["Nowhere/Land", "", "../etc/passwd", "/etc/passwd", "a\0b", "Europe"])
def test_a_bad_zone_is_explained(tz: str) -> None:
    with pytest.raises(ValueError, match="is not a time zone"):
        CronTimes("* * * * *", tz)


HOURLY = CronTimes("0 * * * *", "UTC")
T0 = 1_800_000_000.0 - 1_800_000_000 % 3600


def test_what_is_due_on_time() -> None:
    found = due(HOURLY, T0, T0 + 3, every=False, grace=None, most=100)
    assert (found.run, found.late, found.missed, found.next_at) == ((T0,), None, 0, T0 + 3600)


def test_after_a_downtime_the_latest_or_all() -> None:
    clock = T0 + 5 * 3600 + 10
    latest = due(HOURLY, T0, clock, every=False, grace=None, most=100)
    assert (latest.run, latest.missed, latest.next_at) == ((T0 + 5 * 3600,), 5, T0 + 6 * 3600)
    every = due(HOURLY, T0, clock, every=True, grace=None, most=100)
    assert (every.run, every.missed) == (tuple(T0 + n * 3600 for n in range(6)), 0)
    some = due(HOURLY, T0, clock, every=True, grace=None, most=2)
    assert (some.run, some.missed) == ((T0 + 4 * 3600, T0 + 5 * 3600), 4)


def test_too_late_for_the_grace() -> None:
    clock = T0 + 5 * 3600 + 601
    found = due(HOURLY, T0, clock, every=False, grace=600, most=100)
    assert (found.run, found.late, found.missed) == ((), T0 + 5 * 3600, 5)
    found = due(HOURLY, T0, clock, every=True, grace=3600 + 601, most=100)
    assert (found.run, found.late, found.missed) == ((T0 + 4 * 3600, T0 + 5 * 3600), None, 4)


def test_years_of_downtime_are_not_counted_minute_by_minute() -> None:
    minutely = CronTimes("* * * * *", "UTC")
    clock = T0 + 3 * 365 * 86400
    found = due(minutely, T0, clock, every=False, grace=None, most=100)
    assert found.run == (clock,)
    assert found.missed == LOOK_BACK / 60 - 1
    yearly = CronTimes("0 0 1 1 *", "UTC")
    assert len(due(yearly, yearly.next_after(T0), clock, every=True, grace=None, most=100).run) == 3


@given(
    downtime=st.integers(0, 40 * 3600),
    every=st.booleans(),
    grace=st.one_of(st.none(), st.integers(60, 20 * 3600)),
    most=st.integers(1, 5),
)
def test_no_time_is_lost_from_the_count(downtime: int, every: bool, grace: int | None, most: int) -> None:
    found = due(HOURLY, T0, T0 + downtime, every=every, grace=grace, most=most)
    assert len(found.run) + (found.late is not None) + found.missed == downtime // 3600 + 1
    assert (found.late is None) == bool(found.run)
    assert all(grace is None or T0 + downtime - at <= grace for at in found.run)
    assert len(found.run) <= (most if every else 1)
    assert found.next_at > T0 + downtime
