"""The commands of ``rowmill`` by name, each imported when it is asked for: most calls need one of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup


class _Entry(NamedTuple):
    """Where a command is (``module:attribute``), and what ``rowmill --help`` says of it without importing it."""

    where: str
    summary: str


COMMANDS = {
    "run": _Entry(
        "pipeline.cli.run:run",
        "Run a model over every row, here and now; the same command resumes an interrupted run.",
    ),
    "beat": _Entry(
        "pipeline.cli.admin.beat:beat",
        "Keep time: fire schedules, recover lost shards, expire jobs and collect garbage. Runs until it is stopped.",
    ),
    "doctor": _Entry(
        "pipeline.cli.doctor:doctor",
        "Check what is installed, and what really works here: engines, providers, database, broker, directories.",
    ),
    "serve": _Entry(
        "pipeline.cli.admin.serve:serve",
        "Serve the HTTP API: /api/v1 (jobs), /v1 (OpenAI's batch API), /docs. Runs until it is stopped.",
    ),
    "job": _Entry("pipeline.cli.job.submit:app", "Jobs: submit, list, show, wait, cancel, retry."),
    "schedule": _Entry("pipeline.cli.admin.schedule:app", "Schedules: jobs that are submitted again and again."),
    "worker": _Entry("pipeline.cli.admin.worker:app", "Workers of a fleet: start, list, drain, health."),
    "config": _Entry("pipeline.cli.config:app", "The settings, and where each value comes from."),
    "db": _Entry("pipeline.cli.admin.db:app", "The database's schema: upgrade, wait for it, downgrade."),
    "tenant": _Entry("pipeline.cli.admin.tenant:app", "Tenants: shares, limits, use."),
    "key": _Entry("pipeline.cli.admin.key:app", "API keys of tenants: create, list, revoke, rotate."),
    "admin": _Entry("pipeline.cli.admin.maintenance:app", "For operators: queues, lost shards, garbage."),
    "model": _Entry(
        "pipeline.cli.model.group:app", "Models: register, prove, activate; export to ONNX, quantize, benchmark."
    ),
}


class LazyCommands(MutableMapping[str, Any]):
    """Typer's commands by name. Only those that are asked for are imported."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _made(name, *COMMANDS[name].where.split(":"))
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands are not taken away")

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class LazyGroup(TyperGroup):
    """Typer's group over :data:`COMMANDS`. Its own help imports none of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"commands": LazyCommands()})
        self._telling = False

    def list_commands(self, ctx: Any) -> list[str]:
        """See Typer."""
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """See Typer. While the help is written, a command is its name and its summary."""
        if self._telling:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name].summary)
        return super().get_command(ctx, cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """See Typer."""
        self._telling = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._telling = False


def _made(name: str, module: str, attribute: str) -> Any:
    found = getattr(importlib.import_module(module), attribute)
    made: Any
    if isinstance(found, typer.Typer):
        made = typer.main.get_group(found)
    else:
        alone = typer.Typer(add_completion=False)
        alone.command()(found)
        made = typer.main.get_command(alone)
    made.name = name
    return made
