"""``rowmill db``: the database's schema."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli import output
from pipeline.cli.command import Invocation, command
from storage.errors import InvalidJob
from storage.redaction import redact_url

app = typer.Typer(help="The database's schema: upgrade, wait for it, downgrade.", no_args_is_help=True)


@app.command()
@command
def upgrade(invocation: Invocation) -> None:
    """Bring the database to this version's schema. Safe to repeat, and to run from several places at once."""
    from storage.sql import database

    url = invocation.loaded.settings.effective_database_url
    _tell(invocation, url, database.upgrade(url))


@app.command()
@command
def wait(
    invocation: Invocation,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Stop waiting after this time, with exit code 124.")
    ] = None,
) -> None:
    """Wait until the database answers and has this version's schema: for a container that starts before it."""
    from storage.sql import database

    url = invocation.loaded.settings.effective_database_url
    database.await_schema(url, timeout=timeout, notice=invocation.notice)
    if invocation.as_json:
        output.emit_json({"database": redact_url(url), "ready": True})


@app.command()
@command
def downgrade(
    invocation: Invocation,
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="An earlier revision, such as 0008.")],
    yes: Annotated[bool, typer.Option("--yes", help="Confirm it: what the later revisions keep is lost.")] = False,
) -> None:
    """Take the schema back to an earlier version's, with the later version's Rowmill. Drain all workers first."""
    from storage.sql import database

    url = invocation.loaded.settings.effective_database_url
    if not yes:
        raise InvalidJob(
            f"going back to {revision} drops what later revisions keep; make a backup first", field="--yes"
        )
    _tell(invocation, url, database.downgrade(url, revision))


def _tell(invocation: Invocation, url: str, revision: str) -> None:
    shown = redact_url(url)
    invocation.show({"database": shown, "revision": revision}, f"{shown} is at revision {revision}")
