"""The page that lists all time limits: it forgets none, names none that is not there, and has the right defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from pipeline.cli.main import app
from pipeline.config.settings import Settings
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.vllm.options.engine_args import OWN_OPTIONS
from pipeline.engines.vllm.process.process import STALL_SECONDS
from pipeline.schedules.spec import ScheduleSpec
from pipeline.spec.job_spec import JobSpec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "time-limits.md"
_A_TIME = re.compile(r"(^|_)(seconds|timeout|window|grace|days|hours|minutes)$")
NOT_TIMES = {"window"}
"""Called like one: vLLM's window of requests."""


def _rows() -> dict[str, list[str]]:
    """Name in the first column → the row's cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    return {row[0].strip("`"): row for row in rows if len(row) == 4}


FIELDS = {
    name
    for names in (
        Settings.model_fields,
        JobSpec.model_fields,
        ScheduleSpec.model_fields,
        OnnxOptions.model_fields,
        OWN_OPTIONS,
    )
    for name in names
    if _A_TIME.search(name) and name not in NOT_TIMES
}


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_and_setting_that_is_a_time_is_listed(name: str) -> None:
    assert name in _rows()


def test_no_limit_is_listed_that_is_not_there() -> None:
    assert {name for name in _rows() if re.fullmatch(r"[a-z]+(_[a-z]+)+", name)} == FIELDS


@pytest.mark.parametrize("name", sorted(FIELDS & set(Settings.model_fields)))
def test_the_defaults_of_settings_are_those_of_the_code(name: str) -> None:
    default = Settings.model_fields[name].default
    assert _rows()[name][2] == ("off" if default is None else f"{default:g}")


def test_other_defaults() -> None:
    rows = _rows()
    assert rows["stall_seconds"][2] == f"{STALL_SECONDS:g}"
    assert JobSpec.model_fields["completion_window"].default in rows["completion_window"][2]
    off = (JobSpec.model_fields["request_timeout"], OnnxOptions.model_fields["row_timeout"])
    assert [field.default for field in off] == [None, None]
    assert rows["request_timeout"][2] == rows["row_timeout"][2] == "off"


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from _commands(below, (*path, name))
    else:
        yield path, command


def test_every_option_that_is_a_time_is_listed() -> None:
    text = PAGE.read_text()
    timed = [
        (path, option)
        for path, command in _commands(typer.main.get_command(app))
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and _A_TIME.search(option.removeprefix("--").replace("-", "_"))
    ]
    assert (("job", "wait"), "--timeout") in timed
    for path, option in timed:
        # Options of a job stand there once, for all the commands that take them.
        whose = r"`[^`]*" if option in ("--request-timeout", "--completion-window") else f"`{' '.join(path)} [^`]*"
        assert re.search(whose + re.escape(option), text), f"rowmill {' '.join(path)} {option}"
