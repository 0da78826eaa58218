"""``rowmill schedule``: jobs that are submitted again and again."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from zoneinfo import ZoneInfo

import typer

from pipeline.cli import output, values
from pipeline.cli.command import Invocation, command
from pipeline.client import documents

if TYPE_CHECKING:
    from pipeline.schedules.api import Upcoming
    from storage.records import Schedule

app = typer.Typer(help="Schedules: jobs that are submitted again and again.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name.")]
Tenant = Annotated[str, typer.Option(metavar="TENANT", help="Whose schedule it is.")]


@app.command()
@command
def add(
    invocation: Invocation,
    name: Name,
    spec: Annotated[
        Path,
        typer.Argument(
            metavar="SPEC", help="The job as TOML or JSON; {fire_date:%Y-%m-%d} and {schedule} in input and output."
        ),
    ],
    cron: Annotated[
        str, typer.Option(metavar="CRON", help="Minute, hour, day of month, month, day of week: '0 2 * * *'.")
    ],
    tz: Annotated[str, typer.Option(metavar="ZONE", help="Time zone, such as Europe/Berlin.")] = "UTC",
    overlap: Annotated[
        Literal["skip", "queue", "cancel-previous"],
        typer.Option(
            metavar="HOW", help="While an earlier job has not ended: skip the fire, queue it, or cancel-previous."
        ),
    ] = "skip",
    misfire: Annotated[
        Literal["latest", "all"],
        typer.Option(
            metavar="HOW", help="Times that passed while nothing fired: fire for the latest only, or for all."
        ),
    ] = "latest",
    misfire_grace: Annotated[
        str | None, typer.Option(metavar="TIME", help="Skip a fire noticed later than this: 30m, 24h, 7d.")
    ] = None,
    incremental: Annotated[
        bool, typer.Option("--incremental", help="Read only files that are new or changed since a completed fire.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the next fires; store nothing.")
    ] = False,
) -> None:
    """Submit a job at certain times: checked and stored now, fired by 'rowmill beat' (with a broker, and workers)."""
    options: dict[str, Any] = {
        "cron": cron,
        "tz": tz,
        "job": values.spec_file(spec, "SPEC"),
        "overlap": overlap,
        "misfire": misfire,
        "misfire_grace": misfire_grace,
        "incremental": incremental,
    }
    with invocation.client() as client:
        if dry_run:
            _tell_upcoming(invocation, name, client.schedules.preview(name, **options))
            return
        _tell(invocation, client.schedules.add(name, **options))


@app.command(name="list")
@command
def list_schedules(
    invocation: Invocation,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only this tenant's.")] = None,
) -> None:
    """Schedules by name."""
    with invocation.client() as client:
        found = client.schedules.list(tenant)
    lines = (
        (s.name, s.cron, s.tz, "paused" if s.paused else _moment(s.next_at, s.tz), s.overlap, s.spec["output"])
        for s in found
    )
    document = {"schedules": [documents.schedule(item) for item in found]}
    invocation.show_table(document, ("name", "cron", "zone", "next", "overlap", "output"), lines, none="no schedules")


@app.command()
@command
def show(
    invocation: Invocation,
    name: Name,
    tenant: Tenant = "default",
    limit: Annotated[int, typer.Option("-n", "--limit", min=0, max=1000, metavar="N", help="Most fires to show.")] = 20,
) -> None:
    """One schedule, and what came of its last fires, the newest first."""
    with invocation.client() as client:
        schedule = client.schedules.get(name, tenant)
        fires = client.schedules.fires(name, tenant, limit)
    if invocation.as_json:
        shown = [documents.fire(f) | {"local": _moment(f.fire_at, schedule.tz, "T")} for f in fires]
        output.emit_json({"schedule": documents.schedule(schedule), "fires": shown})
        return
    output.emit(_described(schedule))
    if fires:
        columns = ("fire", "state", "job", "job state", "missed", "reason")
        lines = [
            (_moment(f.fire_at, schedule.tz), f.state, f.job_id, f.job_state, f.missed or None, f.reason) for f in fires
        ]
        output.emit("\n" + output.table(columns, lines, right=("missed",)))


@app.command(name="next")
@command
def next_fires(
    invocation: Invocation,
    name: Name,
    tenant: Tenant = "default",
    count: Annotated[
        int, typer.Option("-n", "--count", min=1, max=1000, metavar="N", help="How many times to show.")
    ] = 5,
) -> None:
    """The next fires, with their zone, and where their jobs will read from and write to."""
    with invocation.client() as client:
        _tell_upcoming(invocation, name, client.schedules.upcoming(name, tenant, count))


@app.command()
@command
def pause(invocation: Invocation, name: Name, tenant: Tenant = "default") -> None:
    """Stop firing until it is resumed. Jobs that were submitted go on."""
    with invocation.client() as client:
        _tell(invocation, client.schedules.pause(name, tenant))


@app.command()
@command
def resume(invocation: Invocation, name: Name, tenant: Tenant = "default") -> None:
    """Fire again from now on. Times that passed while it was paused are skipped."""
    with invocation.client() as client:
        _tell(invocation, client.schedules.resume(name, tenant))


@app.command()
@command
def remove(invocation: Invocation, name: Name, tenant: Tenant = "default") -> None:
    """Delete a schedule and what is known of its fires. Their jobs stay as they are."""
    with invocation.client() as client:
        client.schedules.remove(name, tenant)
    invocation.show({"removed": name}, f"{name}  removed")


def _tell(invocation: Invocation, schedule: Schedule) -> None:
    comes = "paused" if schedule.paused else f"next {_moment(schedule.next_at, schedule.tz)}"
    invocation.show({"schedule": documents.schedule(schedule)}, f"{schedule.name}  {comes}")


def _tell_upcoming(invocation: Invocation, name: str, found: Iterable[Upcoming]) -> None:
    found = list(found)
    items = [{"fire_at": f.at, "local": f.local, "input": list(f.input), "output": f.output} for f in found]
    lines = [(f.local, ", ".join(f.input), f.output) for f in found]
    invocation.show({"name": name, "next": items}, output.table(("fire", "input", "output"), lines))


def _described(s: Schedule) -> str:
    return output.pairs(
        [
            ("name", s.name),
            ("cron", f"{s.cron} ({s.tz})"),
            ("next", "paused" if s.paused else _moment(s.next_at, s.tz)),
            ("overlap", s.overlap),
            ("misfire", s.misfire),
            ("misfire grace", None if s.misfire_grace is None else output.duration(s.misfire_grace)),
            ("incremental", "yes" if s.incremental else None),
            ("task", s.spec["task"]),
            ("model", s.spec["model"]),
            ("input", ", ".join(s.spec["input"])),
            ("output", s.spec["output"]),
            ("tenant", s.tenant if s.tenant != "default" else None),
            ("created", output.moment(s.created_at)),
        ]
    )


def _moment(at: float, tz: str, sep: str = " ") -> str:
    """A time in the schedule's own zone, with the offset that tells apart what the clock shows twice."""
    return datetime.fromtimestamp(at, ZoneInfo(tz)).isoformat(sep=sep)
