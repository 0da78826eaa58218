"""When a cron expression comes due, in a time zone, and which of the times that have passed still get a fire. No clock.

The expression is read by ``cronsim``. Clocks that are put forward or back are handled by one rule (docs/adr/0011): an
hour field of ``*`` means every hour that passes; any other hour field names times on the wall clock, each of which
fires once a day. One that is skipped by the clock fires at the first minute after the gap (several of them together),
one that comes twice fires the first time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, takewhile
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

MOST_WAITING = 100
"""Most fires of one schedule that wait for a job; what comes due beyond that is passed over."""
LOOK_BACK = 31 * 86400.0
"""After a longer downtime only the times of this many last seconds are counted, if they are many."""
_ANCHOR = datetime(2000, 1, 1)


class CronTimes:
    """A five-field cron expression in a time zone. Raises ``ValueError`` saying what is wrong with it."""

    def __init__(self, cron: str, tz: str) -> None:
        self.zone = zone(tz)
        fields = cron.split()
        if len(fields) != 5:
            raise ValueError(
                f"{cron!r} has {len(fields)} fields; write five: minute hour day-of-month month day-of-week, "
                "as in '0 2 * * *'"
            )
        try:
            parsed = CronSim(" ".join(fields), _ANCHOR)
        except (CronSimError, AssertionError) as error:
            raise ValueError(f"{cron!r} is not a cron expression: {str(error).lower() or 'bad step'}") from None
        # cronsim takes a field that merely begins with * for elapsed time; here only the whole of the hours is that.
        if parsed.hours == set(range(24)):
            fields[1] = "*"
        else:
            fields[0] = ",".join(map(str, sorted(parsed.minutes)))
            fields[1] = ",".join(map(str, sorted(parsed.hours)))
        self._expression = " ".join(fields)

    def after(self, at: float) -> Iterator[float]:
        """The times (Unix seconds) later than ``at``, in order; it ends when none comes within 50 years."""
        last = at
        for moment in CronSim(self._expression, datetime.fromtimestamp(at, self.zone)):
            # In the hour that comes twice, cronsim starts over from the clock's first pass.
            if (found := moment.timestamp()) > last:
                last = found
                yield found

    def next_after(self, at: float) -> float:
        """The first time later than ``at``. Raises ``ValueError`` when there is none."""
        found = next(self.after(at), None)
        if found is None:
            raise ValueError("it never comes due: no such day exists")
        return found


def zone(name: str) -> ZoneInfo:
    """The time zone of this name. Raises ``ValueError`` when there is none."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{name!r} is not a time zone; write one as 'Europe/Berlin' or 'UTC'") from None


@dataclass(frozen=True, slots=True)
class Due:
    """``run`` are the times that get a fire, oldest first; ``late`` the newest of those that came too late, if nothing
    else is run; ``missed`` times were passed over in favour of the first of them. ``next_at`` is still to come."""

    run: tuple[float, ...]
    late: float | None
    missed: int
    next_at: float


def due(times: CronTimes, next_at: float, clock: float, *, every: bool, grace: float | None, most: int) -> Due:
    """What to do at ``clock`` about the times from ``next_at`` (≤ ``clock``) on: all Unix seconds.

    ``every``: each of them gets a fire, ``most`` at most (the newest); otherwise only the newest. One that is noticed
    more than ``grace`` seconds late gets none. Raises ``ValueError`` when no time is to come.
    """
    passed = _passed(times, next_at, clock)
    in_time = [at for at in passed if grace is None or clock - at <= grace]
    run = tuple(in_time[-max(most, 1) :] if every else in_time[-1:])
    late = None if run else passed[-1]
    return Due(run, late, len(passed) - max(len(run), 1), times.next_after(clock))


def _passed(times: CronTimes, next_at: float, clock: float) -> list[float]:
    # A minute's schedule has half a million times a year, and nobody reads that many.
    recent = list(takewhile(lambda at: at <= clock, times.after(max(next_at, clock - LOOK_BACK))))
    if len(recent) > MOST_WAITING and clock - LOOK_BACK > next_at:
        return recent
    return [next_at, *takewhile(lambda at: at <= clock, times.after(next_at))]


def upcoming(times: CronTimes, at: float, count: int) -> list[float]:
    """The next ``count`` times after ``at``, or as many as there are."""
    return list(islice(times.after(at), count))


def local(times: CronTimes, at: float) -> datetime:
    """A time as the schedule's zone shows it."""
    return datetime.fromtimestamp(at, times.zone)
