"""One worker process, as ``rowmill worker start`` has it: a ``Worker``, and Celery's, which listens for wake-ups.

``python -m tasks.worker --queues onnx --engines onnx --slots 2 --control``; the settings come from the environment.
``rowmill worker start`` checks everything first and then turns into this; see there for what a user is told.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence

from storage import logs
from storage.broker import CONTROL_QUEUE
from storage.errors import RowmillError
from storage.log_actions import Action
from storage.redaction import redact_text
from tasks import app as celery_app
from tasks import control

log = logs.get_logger(__name__)


def run(queues: Sequence[str], engines: Sequence[str], slots: int, *, with_control: bool) -> int:
    """Work until a signal, or somebody by way of the database, asks for the end; returns the exit code.

    ``slots`` shards at once, 0 for control work only; ``with_control``: with a process of its own for control work.
    """
    celery_app.configure(engines=tuple(engines), queues=tuple(queues), slots=slots)
    celery_app.worker()  # registered before it takes anything; what is wrong is raised here
    other = control.ControlProcess() if with_control else None
    try:
        worker = celery_app.app.Worker(
            hostname=f"{'-'.join(queues)}-{os.getpid()}@{platform.node()}",
            queues=list(queues),
            concurrency=1,  # its tasks only pass wake-ups on
            pool="threads",
            loglevel=celery_app.settings.log_level.upper(),
            without_gossip=True,
            without_mingle=True,
            quiet=True,
        )
        worker.start()
        return int(worker.exitcode or 0)
    finally:
        celery_app.close()
        if other is not None:
            other.stop(celery_app.settings.drain_grace_seconds + control.STOP_SECONDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; one line on stderr for an error, and its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tasks.worker", description=__doc__)
    parser.add_argument("--queues", type=_names, required=True)
    parser.add_argument("--engines", type=_names, default=())
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--control", action="store_true")
    given = parser.parse_args(arguments)
    logs.set_up(celery_app.settings.log_level, celery_app.settings.log_format)
    try:
        return run(
            given.queues, given.engines, given.slots, with_control=given.control and CONTROL_QUEUE not in given.queues
        )
    except RowmillError as error:
        if celery_app.settings.log_format == "json":
            log.error("%s", error, action=Action.COMMAND_FAILED)  # noqa: TRY400 - the message says it all
        else:
            sys.stderr.write(f"error: {redact_text(str(error))}\n")
        return error.exit_code


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
