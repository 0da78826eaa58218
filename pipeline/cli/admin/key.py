"""``rowmill key``: who may call the gateway, for which tenant, and what for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import output
from pipeline.cli.command import Invocation, command
from pipeline.spec.job_spec import duration_seconds
from storage.errors import InvalidJob

if TYPE_CHECKING:
    from storage.tenants.keys import ApiKey

app = typer.Typer(help="API keys of tenants: create, list, revoke, rotate.", no_args_is_help=True)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as 'rowmill key list' shows it.")]


@app.command()
@command
def create(
    invocation: Invocation,
    tenant: Annotated[str, typer.Option(metavar="TENANT", help="Whose key it is; a registered tenant.")],
    scope: Annotated[
        list[str], typer.Option(metavar="submit|read|admin", help="What it may be used for. May be repeated.")
    ],
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="When it ends: 12h, 30d. [default: never]")
    ] = None,
) -> None:
    """Make a key, and show it: this once, since only its digest is stored.

    submit: write the tenant's jobs, files and batches. read: read them. admin: keys, tenants, models, workers.
    """
    seconds = None if expires is None else _seconds(expires, "--expires")
    with invocation.client() as client:
        text, key = client.keys.create(tenant, scope, expires_in=seconds)
    _show_new(invocation, text, key)


@app.command(name="list")
@command
def list_keys(
    invocation: Invocation,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only this tenant's.")] = None,
) -> None:
    """Keys, the newest first, revoked and expired ones included; never the keys themselves."""
    with invocation.client() as client:
        found = client.keys.list(tenant)
    lines = [
        (key.id, key.tenant, f"{key.prefix}…", " ".join(sorted(key.scopes)), _state(key, time.time()),
         output.moment(key.created_at), output.moment(key.expires_at)) for key in found
    ]  # fmt: skip
    columns = ("id", "tenant", "key", "scopes", "state", "created", "expires")
    document = {"keys": [key.to_json() for key in found]}
    invocation.show_table(document, columns, lines, none="no keys; 'rowmill key create' makes one")


@app.command()
@command
def revoke(invocation: Invocation, key: KeyId) -> None:
    """End a key now. Jobs that were submitted with it go on."""
    with invocation.client() as client:
        revoked = client.keys.revoke(key)
    invocation.show({"revoked": revoked.to_json()}, f"key {key} is revoked")


@app.command()
@command
def rotate(
    invocation: Invocation,
    key: KeyId,
    grace: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long the old key goes on: 1h, 7d. [default: ends at once]")
    ] = None,
) -> None:
    """Make a new key with the tenant, scopes and expiry of an old one, which ends at once or after --grace."""
    seconds = 0.0 if grace is None else _seconds(grace, "--grace")
    with invocation.client() as client:
        text, new = client.keys.rotate(key, grace_seconds=seconds)
    _show_new(invocation, text, new)


def _show_new(invocation: Invocation, text: str, key: ApiKey) -> None:
    invocation.show({"key": text, **key.to_json()}, text)
    if not invocation.as_json:
        ends = f", until {output.moment(key.expires_at)}" if key.expires_at is not None else ""
        invocation.notice(f"{key.id} of tenant {key.tenant}{ends}; the key is not shown again")


def _state(key: ApiKey, now: float) -> str:
    return "revoked" if key.revoked_at is not None else "valid" if key.is_valid(now) else "expired"


def _seconds(text: str, option: str) -> float:
    try:
        return duration_seconds(text)
    except ValueError as error:
        raise InvalidJob(str(error), field=option) from None
