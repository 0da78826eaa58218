"""``rowmill tenant``: whose jobs these are, their shares of the fleet, and what they may use."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import output
from pipeline.cli.command import Invocation, command
from storage.errors import InvalidJob

if TYPE_CHECKING:
    from pipeline.client.client import Client

app = typer.Typer(help="Tenants: shares, limits, use.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant, as jobs name it.")]
Weight = Annotated[
    float | None, typer.Option(metavar="W", help="Share of the fleet while tenants compete for it. [default: 1]")
]
MaxRunning = Annotated[str | None, typer.Option(metavar="N|none", help="Most shards that run at a time.")]
MaxJobs = Annotated[str | None, typer.Option(metavar="N|none", help="Most jobs that are live at a time.")]
RowsPerDay = Annotated[str | None, typer.Option(metavar="N|none", help="Most rows of its jobs in a UTC day.")]
TokensPerDay = Annotated[
    str | None, typer.Option(metavar="N|none", help="Tokens in a UTC day, after which jobs are refused.")
]


@app.command()
@command
def add(
    invocation: Invocation,
    tenant: Name,
    weight: Weight = None,
    max_running: MaxRunning = None,
    max_jobs: MaxJobs = None,
    rows_per_day: RowsPerDay = None,
    tokens_per_day: TokensPerDay = None,
) -> None:
    """Register a tenant. What is not given is not limited."""
    values = _values(weight, max_running, max_jobs, rows_per_day, tokens_per_day)
    with invocation.client() as client:
        client.add_tenant(tenant, **values)
        _show(invocation, client, tenant)


@app.command(name="set")
@command
def change(
    invocation: Invocation,
    tenant: Name,
    weight: Weight = None,
    max_running: MaxRunning = None,
    max_jobs: MaxJobs = None,
    rows_per_day: RowsPerDay = None,
    tokens_per_day: TokensPerDay = None,
) -> None:
    """Change a tenant's share or limits; "none" lifts one. What runs or is queued already is left alone."""
    values = _values(weight, max_running, max_jobs, rows_per_day, tokens_per_day)
    if not values:
        raise InvalidJob("nothing to change is given; see 'rowmill tenant set --help'")
    with invocation.client() as client:
        client.set_tenant(tenant, **values)
        _show(invocation, client, tenant)


@app.command(name="list")
@command
def list_tenants(invocation: Invocation) -> None:
    """All tenants, and what they use now."""
    with invocation.client() as client:
        found = [_described(client, tenant.name) for tenant in client.tenants()]
    columns = ("tenant", "weight", "jobs", "running", "rows today", "tokens today")
    lines = [
        [
            item["name"],
            output.count(item["weight"]),
            _of(item, "jobs", "max_jobs"),
            _of(item, "running", "max_running"),
            _of(item, "rows_today", "rows_per_day"),
            _of(item, "tokens_today", "tokens_per_day"),
        ]
        for item in found
    ]
    invocation.show_table({"tenants": found}, columns, lines, right=columns[1:], none="no tenants")


@app.command()
@command
def show(invocation: Invocation, tenant: Name) -> None:
    """One tenant: its share, its limits, and what it uses now."""
    with invocation.client() as client:
        _show(invocation, client, tenant)


@app.command()
@command
def remove(invocation: Invocation, tenant: Name) -> None:
    """Forget a tenant that has no live jobs, with its limits and its use. Its ended jobs stay."""
    with invocation.client() as client:
        client.remove_tenant(tenant)
    invocation.show({"removed": tenant}, f"tenant {tenant} was removed")


def _show(invocation: Invocation, client: Client, name: str) -> None:
    item = _described(client, name)
    facts = [
        ("tenant", name),
        ("weight", output.count(item["weight"])),
        ("running shards", _of(item, "running", "max_running")),
        ("live jobs", _of(item, "jobs", "max_jobs")),
        ("rows today", _of(item, "rows_today", "rows_per_day")),
        ("tokens today", _of(item, "tokens_today", "tokens_per_day")),
        ("since", output.moment(item["created_at"])),
    ]
    invocation.show({"tenant": item}, output.pairs(facts))


def _described(client: Client, name: str) -> dict[str, Any]:
    tenant, usage = client.tenant(name)
    return {**asdict(tenant), **asdict(usage)}


def _of(item: dict[str, Any], used: str, limit: str) -> str:
    return f"{item[used]:,}" + ("" if item[limit] is None else f" of {item[limit]:,}")


def _values(
    weight: float | None,
    max_running: str | None,
    max_jobs: str | None,
    rows_per_day: str | None,
    tokens_per_day: str | None,
) -> dict[str, Any]:
    values: dict[str, Any] = {} if weight is None else {"weight": weight}
    limits = {
        "max_running": max_running,
        "max_jobs": max_jobs,
        "rows_per_day": rows_per_day,
        "tokens_per_day": tokens_per_day,
    }
    for name, text in limits.items():
        if text is not None:
            values[name] = None if text.lower() == "none" else _number(text, "--" + name.replace("_", "-"))
    return values


def _number(text: str, option: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise InvalidJob(f"a whole number or none, not {text!r}", field=option) from None
