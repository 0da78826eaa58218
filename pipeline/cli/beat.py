"""``rowmill beat``: the clock of the maintenance tick, which fires schedules, among other things."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from pipeline.cli import errors
from pipeline.cli.command import Invocation, command
from pipeline.cli.interrupts import InterruptWatch, end_now

if TYPE_CHECKING:
    from pipeline.settings import LoadedSettings


@command
def beat(invocation: Invocation) -> None:
    """Keep time: fire schedules, and have lost shards, expired jobs and garbage looked after. Runs until it is stopped.

    With a broker it is Celery's beat, and the workers do the rest. Without one this process does it all, and also runs
    the jobs of schedules, one after the other. Any number of them may run at once: each time fires once.
    """
    loaded = invocation.loaded
    if loaded.settings.broker_url is not None:
        _become_celery_beat(loaded)
    _beat_here(invocation)


def _become_celery_beat(loaded: LoadedSettings) -> None:
    # Celery's plain scheduler: nothing here needs the file in which the default one remembers when it last sent what.
    arguments = ["-m", "celery", "-A", "tasks.app", "beat", "--scheduler", "celery.beat:Scheduler"]
    arguments += ["--loglevel", loaded.settings.log_level]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **_as_environment(loaded)})  # noqa: S606


def _as_environment(loaded: LoadedSettings) -> dict[str, str]:
    """The settings that came by flags, for the process that takes this one's place."""
    from pipeline.settings_sources import PREFIX

    found = {}
    for origin in loaded.origins:
        if origin.kind == "flag":
            value = origin.value if isinstance(origin.value, str) else json.dumps(origin.value, default=str)
            found[PREFIX + origin.name.replace(".", "__").upper()] = value
    return found


def _beat_here(invocation: Invocation) -> None:
    import logging

    from pipeline.engines.base import Cancellation
    from pipeline.runtime import start
    from pipeline.schedule_loop import beat_and_run

    settings = invocation.loaded.settings
    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr)
    interrupt = Cancellation()

    def first() -> None:
        interrupt.cancel("interrupted")
        invocation.notice("ending: flushing what is finished; press Ctrl-C again to end at once")

    def again() -> None:
        end_now("ended at once; everything flushed before is safe", errors.SIGNALLED)

    with InterruptWatch(first, again):
        runtime = start(settings, invocation.notice)
        try:
            invocation.notice(f"looking for schedules that are due every {settings.tick_seconds:g} s; Ctrl-C ends it")
            beat_and_run(runtime, interrupt)
        finally:
            runtime.close()
