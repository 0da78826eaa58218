"""``rowmill doctor``: does everything that is installed really work here?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import errors, output
from pipeline.cli.command import Invocation, command

if TYPE_CHECKING:
    from pipeline.spec.check import Check


@command
def doctor(
    invocation: Invocation,
    deep: Annotated[
        bool, typer.Option("--deep", help="Start real engines as well, where an engine offers it (up to a minute).")
    ] = False,
    output_uri: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="URI", help="Try what a job does at this output; leaves nothing there."),
    ] = None,
) -> int:
    """Check what is installed, and what really works here: engines, providers, database, broker, directories.

    Exit code 0 when nothing failed, 7 when the database, the broker or the object store does not answer, 1 otherwise.

    Example: rowmill doctor --output s3://results/run-1
    """
    from pipeline.diagnostics.doctor import checks

    found = []
    if sys.stderr.isatty():
        invocation.notice("trying the engines; this takes some seconds")
    for check in checks(invocation.loaded, deep=deep, output=output_uri):
        found.append(check)
        if not invocation.as_json:
            _print(check)
    code = verdict(found)
    counts = {status: sum(c.status == status for c in found) for status in ("ok", "warn", "fail", "skip")}
    if invocation.as_json:
        output.emit_json({"checks": [c.to_json() for c in found], "counts": counts, "exit_code": code})
    else:
        output.emit("\n" + ", ".join(f"{n} {status}" for status, n in counts.items()))
    return code


def verdict(found: list[Check]) -> int:
    """The exit code for these findings."""
    if any(check.unreachable for check in found):
        return errors.UNREACHABLE
    return errors.ERROR if any(check.status == "fail" for check in found) else errors.OK


_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def _print(check: Check) -> None:
    from rich.console import Console
    from rich.text import Text

    shown = check.to_json()
    line = Text(f"{shown['status']:<5}", style=_STYLES[shown["status"]])
    line.append(f"{check.name}: ", style="bold").append(output.printable(shown["detail"]), style="not bold")
    if check.remedy:
        line.append(f"\n     → {output.printable(check.remedy)}", style="not bold")
    Console(soft_wrap=True, highlight=False).print(line)
