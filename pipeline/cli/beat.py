"""``rowmill beat``: the clock of the maintenance tick, which fires schedules, among other things."""

from __future__ import annotations

import logging
import sys

from pipeline.cli import errors
from pipeline.cli.command import Invocation, command
from pipeline.cli.interrupts import InterruptWatch, end_now


@command
def beat(invocation: Invocation) -> None:
    """Keep time: fire schedules, and have lost shards, expired jobs and garbage looked after. Runs until it is stopped.

    With a broker it wakes the workers, which do all this. Without one this process does it, and also runs the jobs of
    schedules, one after the other. Any number of them may run at once: each time fires once.
    """
    from pipeline import schedule_loop
    from pipeline.engines.base import Cancellation
    from pipeline.runtime import start

    settings = invocation.loaded.settings
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    interrupt = Cancellation()

    def first() -> None:
        interrupt.cancel("interrupted")
        invocation.notice("ending: what is finished is kept; press Ctrl-C again to end at once")

    def again() -> None:
        end_now("ended at once; everything flushed before is safe", errors.SIGNALLED)

    with InterruptWatch(first, again):
        every = f"every {settings.tick_seconds:g} s; Ctrl-C ends it"
        if settings.broker_url is not None:
            invocation.notice(f"waking the workers {every}")
            schedule_loop.wake_workers(settings, interrupt)
            return
        runtime = start(settings, invocation.notice)
        try:
            invocation.notice(f"looking for what is due {every}")
            schedule_loop.beat_and_run(runtime, interrupt)
        finally:
            runtime.close()
