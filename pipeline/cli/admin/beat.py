"""``rowmill beat``: the clock of the maintenance tick, which fires schedules, among other things."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import errors, output
from pipeline.cli.command import Invocation, command
from pipeline.cli.interrupts import service_interrupts

if TYPE_CHECKING:
    from pipeline.config.settings import Settings


@command
def beat(
    invocation: Invocation,
    health: Annotated[
        bool,
        typer.Option("--health", help="Only check whether a beat of this machine keeps time: exit code 0, else 1."),
    ] = False,
) -> int:
    """Keep time: fire schedules, recover lost shards, expire jobs and collect garbage. Runs until it is stopped.

    With a broker it wakes the workers, which do all this. Without one this process does it, and also runs the jobs of
    schedules, one after the other. Any number of them may run at once: each time fires once.
    """
    from pipeline.engines.base import Cancellation
    from pipeline.process.runtime import start
    from pipeline.worker import beat as schedule_loop

    settings = invocation.loaded.settings
    if health:
        return _health(invocation, settings)
    invocation.set_up_logging(service=True)
    interrupt = Cancellation()
    with service_interrupts(invocation, lambda: interrupt.cancel("interrupted")):
        every = f"every {settings.tick_seconds:g} s; Ctrl-C ends it"
        if settings.broker_url is not None:
            invocation.notice(f"waking the workers {every}")
            schedule_loop.wake_workers(settings, interrupt)
            return errors.OK
        runtime = start(settings, invocation.notice)
        try:
            invocation.notice(f"looking for what is due {every}")
            schedule_loop.beat_and_run(runtime, interrupt)
        finally:
            runtime.close()
    return errors.OK


def _health(invocation: Invocation, settings: Settings) -> int:
    from pipeline.worker import beat_health

    silent = beat_health.silent_seconds(settings)
    late = beat_health.is_late(settings, silent)
    if invocation.as_json:
        output.emit_json({"healthy": not late, "silent_seconds": silent})
    elif silent is None:
        output.emit(f"no beat has run on this machine with the cache folder {settings.cache_dir}")
    else:
        output.emit(f"last round {output.duration(silent)} ago, one every {settings.tick_seconds:g} s")
    return errors.ERROR if late else errors.OK
