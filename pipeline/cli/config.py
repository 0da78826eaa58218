"""``rowmill config``: the settings, each with its source."""

from __future__ import annotations

from typing import Any

import typer

from pipeline.cli import output
from pipeline.cli.command import Invocation, command
from storage.redaction import redact, redact_url

app = typer.Typer(help="The settings, and where each value comes from.", no_args_is_help=True)


@app.command()
@command
def show(invocation: Invocation) -> None:
    """Every setting, its value, and where the value comes from. Secrets are hidden.

    A flag wins over a ROWMILL_* variable, that over rowmill.toml here (or the file named by ROWMILL_CONFIG), that over
    the user's config.toml, that over the default.
    """
    loaded = invocation.loaded
    for warning in loaded.warnings:
        invocation.notice(f"warning: {warning}")
    shown = [(origin, redact(origin.value, origin.name.rpartition(".")[2])) for origin in loaded.origins]
    effective = redact_url(loaded.settings.effective_database_url)
    settings: dict[str, Any] = {
        origin.name: {"value": value, "kind": origin.kind, "source": origin.source} for origin, value in shown
    }
    files = [{"kind": file.kind, "path": str(file.path), "exists": file.exists} for file in loaded.files]
    document = {"settings": settings, "database": effective, "files": files, "warnings": list(loaded.warnings)}
    rows = [(origin.name, "-" if value in (None, {}) else value, origin.source) for origin, value in shown]
    read = [(f"{file.kind} file", f"{file.path}" + ("" if file.exists else " (not there)")) for file in loaded.files]
    text = output.table(("setting", "value", "source"), rows)
    invocation.show(document, f"{text}\n\n{output.pairs([('database', effective), *read])}")
