"""``rowmill db``: the database's schema."""

from __future__ import annotations

import typer

from pipeline.cli import output
from pipeline.cli.command import Invocation, command
from pipeline.redaction import redact_text

app = typer.Typer(help="The database.", no_args_is_help=True)


@app.command()
@command
def upgrade(invocation: Invocation) -> None:
    """Bring the database to this version's schema. Safe to repeat, and to run from several places at once."""
    from storage import database

    url = invocation.loaded.settings.effective_database_url
    revision = database.upgrade(url)
    if invocation.as_json:
        output.emit_json({"database": redact_text(url), "revision": revision})
    else:
        output.emit(f"{redact_text(url)} is at revision {revision}")
