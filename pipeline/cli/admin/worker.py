"""``rowmill worker``: the processes of a fleet that run shards, plan and publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import errors, output
from pipeline.cli.command import Invocation, command
from pipeline.cli.exec_module import become
from pipeline.client import documents
from storage.errors import EngineMissing, InvalidJob, InvalidSettings, NotFound, Unreachable, WaitTimeout

if TYPE_CHECKING:
    from storage.fleet.workers import WorkerStatus
    from storage.sql.database import Database

app = typer.Typer(help="Workers of a fleet: start, list, drain, health.", no_args_is_help=True)

_SLOTS = 2
"""Shards at once where nobody says: the tail of one is filled by the head of the next (docs/adr/0003)."""
_POLL_SECONDS = 0.5
NO_ENGINE = "none"


@app.command()
@command
def start(
    invocation: Invocation,
    engines: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Engines, separated by commas; by default those installed here; none: no shards."
        ),
    ] = None,
    queues: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Queues to take shards from; by default one for each engine."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, max=64, metavar="N", help=f"Shards at the same time; by default the setting, else {_SLOTS}."
        ),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Plan and publish too, in a process beside this one.")
    ] = True,
) -> None:
    """Run shards of jobs until SIGTERM, Ctrl-C or 'rowmill worker drain'; plan and publish jobs beside it.

    While the broker does not answer, the worker finds its work in the database.

    Asked to end, it claims nothing more, lets its shards run for drain_grace_seconds, flushes and hands back the rest,
    and ends with 0. Asked again, it flushes at once.
    """
    invocation.set_up_logging(service=True)
    settings = invocation.loaded.settings
    if settings.broker_url is None:
        raise InvalidSettings(
            "a worker needs a message broker: set it in rowmill.toml, as ROWMILL_BROKER_URL=redis://host:6379/0, or "
            "with --setting broker_url=…; without one, jobs run in the process that submits them ('rowmill run')",
            field="broker_url",
        )
    kinds = _engines(engines)
    names = tuple(queues.split(",")) if queues else kinds
    if not kinds and not control:
        raise InvalidJob("a worker without engines and without control work has nothing to do", field="--engines")
    _check_servers(invocation)
    if slots is None:
        slots = settings.slots if "slots" in settings.model_fields_set else _SLOTS
    if not kinds:
        invocation.notice("control worker: plans and publishes jobs")
        become(invocation.loaded, "tasks.worker", "--queues", "control", "--slots", "0")
    invocation.notice(
        f"worker: engines {', '.join(kinds)}; queues {', '.join(names)}; {output.plural(slots, 'slot')}"
        + ("; plans and publishes jobs beside it" if control else "")
    )
    words = ["--queues", ",".join(names), "--engines", ",".join(kinds), "--slots", str(slots)]
    become(invocation.loaded, "tasks.worker", *words, *(["--control"] if control else []))


def _engines(asked: str | None) -> tuple[str, ...]:
    from pipeline.engines import registry

    if asked == NO_ENGINE:
        return ()
    if asked is None:
        found = registry.installed()
        if not found:
            remedies = "; ".join(remedy for name in registry.names() if (remedy := registry.lacks(name)))
            raise EngineMissing(
                f"no engine is installed here: install one ({remedies}); for planning and publishing alone, "
                "--engines none",
                field="--engines",
            )
        return found
    kinds = tuple(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    if not kinds:
        raise InvalidJob("it names no engine", field="--engines")
    for name in kinds:
        if name not in registry.names():
            raise InvalidJob(f"there is no engine {name!r}; there are {', '.join(registry.names())}", field="--engines")
        if remedy := registry.lacks(name):
            raise EngineMissing(f"engine {name!r} is not installed here: install {remedy}", field="--engines")
    return kinds


def _check_servers(invocation: Invocation) -> None:
    from storage.broker import Wakeups

    with _database(invocation) as database:
        database.ensure_schema()
    try:
        Wakeups(invocation.loaded.settings.broker_url).check()
    except Unreachable as error:
        invocation.notice(f"{error}; until it does, work is looked for in the database every few seconds")


@app.command(name="list")
@command
def list_workers(invocation: Invocation) -> None:
    """Every worker: alive, draining or silent; what it takes, what it has loaded, and the shards it holds."""
    from storage.fleet import workers

    with _database(invocation) as database:
        database.ensure_schema()
        found = workers.listed(database)
    for seen in () if invocation.as_json else found:
        if seen.trouble:
            invocation.notice(f"{seen.worker.id} gets no work: {seen.trouble}")
        if seen.dropped_messages:
            invocation.notice(f"{seen.worker.id} dropped {output.plural(seen.dropped_messages, 'malformed message')}")
    columns = ("id", "state", "queues", "slots", "shards", "warm", "heartbeat", "up", "version")
    now = time.time()
    lines = [
        [
            seen.worker.id,
            seen.state,
            ",".join(seen.worker.queues) or "embedded",
            seen.worker.slots,
            len(seen.holds),
            ", ".join(f"{item['model']} ({output.size(item['bytes'])})" for item in seen.warm),
            output.duration(seen.silent_seconds) + " ago",
            output.duration(now - seen.started_at),
            seen.worker.version,
        ]
        for seen in found
    ]
    document = {"workers": [_worker(seen) for seen in found]}
    invocation.show_table(document, columns, lines, right=("slots", "shards"), none="no workers")


def _worker(seen: WorkerStatus) -> dict[str, Any]:
    own = {"pid": seen.worker.pid, "lease_seconds": seen.worker.lease_seconds}
    return {**documents.worker(seen), **own, "dropped_messages": seen.dropped_messages}


@app.command()
@command
def drain(
    invocation: Invocation,
    worker: Annotated[
        str | None, typer.Argument(metavar="WORKER", help="A worker's id, or a part of it that no other has.")
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Drain every worker that is alive.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until they have ended.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Stop waiting after this time, with exit code 124.")
    ] = None,
) -> None:
    """Ask a worker to end: it claims nothing more, finishes or hands back its shards, and ends with 0.

    The worker notices it at its next heartbeat, after 10 seconds at most. A supervisor may start it again.
    """
    from storage.fleet import workers

    if (worker is None) == (not everyone):
        raise InvalidJob("name one worker, or give --all", field="WORKER")
    with _database(invocation) as database:
        database.ensure_schema()
        if worker is not None:
            ids = [workers.find(database, worker)]
        else:
            ids = [seen.worker.id for seen in workers.listed(database) if seen.worker.queues and seen.state != "silent"]
        asked = workers.drain(database, ids)
        dead = {seen.worker.id: why for seen in workers.listed(database) if (why := _death(seen))}
        if wait:
            _wait(lambda: {seen.worker.id: seen for seen in workers.listed(database)}, asked, timeout)
    if invocation.as_json:
        output.emit_json(
            {"drained" if wait else "draining": asked} | {"dead": [each for each in asked if each in dead]}
        )
    elif asked:
        done = "ended" if wait else "is asked to drain"
        output.emit("\n".join(f"{worker_id}  {dead.get(worker_id, done)}" for worker_id in asked))
    else:
        invocation.notice("no workers")


def _wait(known: Callable[[], dict[str, WorkerStatus]], asked: list[str], timeout: float | None) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    while left := [seen for worker_id, seen in known().items() if worker_id in asked]:
        if dead := [f"{seen.worker.id} {why}" for seen in left if (why := _death(seen))]:
            raise NotFound("; ".join(dead))
        if deadline is not None and time.monotonic() > deadline:
            names = ", ".join(seen.worker.id for seen in left)
            raise WaitTimeout(f"still draining after {timeout:g} seconds: {names}")
        time.sleep(_POLL_SECONDS)


def _death(seen: WorkerStatus) -> str | None:
    """What there is to say of a worker that is dead, or seems to be; ``None`` of one that lives."""
    import platform

    from pipeline.process.runtime import is_alive

    silence = f"it gave no sign of life for {output.duration(seen.silent_seconds)}"
    if seen.worker.host == platform.node() and not is_alive(seen.worker):
        return f"is dead, its process has ended: {silence}; others take its shards when its lease is over"
    if seen.state == "silent":
        return f"may be dead: {silence}; others take its shards. If it lives after all, it will drain"
    return None


@app.command()
@command
def health(invocation: Invocation) -> int:
    """Check that the workers on this machine are alive and look for work: for health checks of containers.

    Exit code 0 when there is a worker and all of them look for work, 1 otherwise. Where a restart would not help, it
    says so and ends with 0: a worker drains, or the database does not answer. Workers get work without the broker.
    """
    import platform

    from pipeline.process.runtime import is_alive
    from storage.fleet import workers

    try:
        with _database(invocation) as database:
            found = [s for s in workers.listed(database) if s.worker.host == platform.node() and is_alive(s.worker)]
    except Unreachable as error:
        if invocation.as_json:
            output.emit_json({"healthy": True, "gets_work": False, "workers": []})
        invocation.notice(f"no work can be had, and nothing is known of the workers: {error}")
        return errors.OK
    healthy = bool(found) and not any(seen.state == "silent" or seen.trouble for seen in found)
    gets_work = healthy and any(seen.state == "alive" for seen in found)
    document = {"healthy": healthy, "gets_work": gets_work, "workers": [_worker(seen) for seen in found]}
    invocation.show(document, "\n".join(map(_health, found)) or "no worker runs here")
    return errors.OK if healthy else errors.ERROR


def _health(seen: WorkerStatus) -> str:
    said = f"{seen.worker.id}  {seen.state}"
    if seen.state == "silent":
        return f"{said}: no work can be had, it gave no sign of life for {output.duration(seen.silent_seconds)}"
    if seen.trouble:
        return f"{said}: no work can be had, {seen.trouble}"
    return f"{said}: it takes no more work" if seen.state == "draining" else said


def _database(invocation: Invocation) -> closing[Database]:
    from storage.sql.database import Database

    try:
        return closing(Database(invocation.loaded.settings.effective_database_url))
    except OSError as error:
        raise Unreachable(f"the database's folder cannot be used: {error.strerror}: {error.filename}") from error
