"""``ScheduleSpec``: the validated request for a schedule, and the job that each of its fires makes of it.

Input and output of the job are templates: ``{fire_date:%Y-%m-%d}`` is the fire's time in the schedule's zone, and
``{schedule}`` the schedule's name. Deliberately neither :meth:`str.format` nor :meth:`datetime.strftime`: a few date
directives are put in, and nothing else happens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.schedules.cron import CronTimes, local, upcoming, zone
from pipeline.spec import json_text
from pipeline.spec.job_spec import JobSpec, duration_seconds, parse
from pipeline.spec.prompt_template import Template
from pipeline.spec.values import invalid
from storage.errors import InvalidJob

_DIRECTIVES: Mapping[str, Callable[[datetime], str]] = {
    "Y": lambda at: f"{at.year:04d}",
    "m": lambda at: f"{at.month:02d}",
    "d": lambda at: f"{at.day:02d}",
    "H": lambda at: f"{at.hour:02d}",
    "M": lambda at: f"{at.minute:02d}",
    "y": lambda at: f"{at.year % 100:02d}",
    "j": lambda at: f"{at.timetuple().tm_yday:03d}",
    "G": lambda at: f"{at.isocalendar().year:04d}",
    "V": lambda at: f"{at.isocalendar().week:02d}",
    "u": lambda at: str(at.isoweekday()),
    "z": lambda at: at.strftime("%z"),
    "%": lambda at: "%",
}
"""The directives of :meth:`datetime.strftime` that a template may use, with its meanings in the C locale."""
_DIRECTIVE = re.compile(r"%(.?)", re.DOTALL)
_DATE, _NAME = "fire_date", "schedule"
_TRIED = 200
"""Upcoming fires whose outputs are compared when a schedule is made."""
SHORTEST_GRACE = 60.0


class ScheduleSpec(BaseModel):
    """When to submit which job. Immutable; raises :class:`InvalidJob` through :func:`parse_schedule`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """Letters, digits, ``_``, ``.`` and ``-``; one of its kind for each tenant."""
    cron: str
    """Five fields: minute, hour, day of month, month, day of week."""
    tz: str = "UTC"
    """The time zone that ``cron`` and ``{fire_date}`` are read in."""
    job: dict[str, Any]
    """The fields of :class:`JobSpec`, with templates in ``input`` and ``output``."""
    overlap: Literal["skip", "queue", "cancel-previous"] = "skip"
    """What a fire does while the job of an earlier one has not ended: skip it, wait for it, cancel it."""
    misfire: Literal["latest", "all"] = "latest"
    """Which of the times that passed while nobody looked get a fire."""
    misfire_grace: str | None = None
    """How late a fire may be noticed and still be run (``"30m"``); no limit if it is not given."""
    incremental: bool = False
    """Each fire takes only the files that no completed fire has taken as they are now."""

    @field_validator("*", mode="before")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        json_text.check_depth(value)
        json_text.check_text(value)
        return value

    @field_validator("tz")
    @classmethod
    def _a_zone(cls, value: str) -> str:
        zone(value)
        return value

    @field_validator("misfire_grace")
    @classmethod
    def _a_duration(cls, value: str | None) -> str | None:
        if value is not None and duration_seconds(value) < SHORTEST_GRACE:
            raise ValueError(f"{value!r} is too short: times are looked at now and then only; give a minute or more")
        return value

    @model_validator(mode="after")
    def _missed_fires_are_not_skipped(self) -> ScheduleSpec:
        if self.misfire == "all" and self.overlap != "queue":
            raise ValueError(
                "misfire 'all' makes up for missed fires one after the other: it needs overlap 'queue' "
                "(--overlap queue)"
            )
        return self

    @property
    def grace_seconds(self) -> float | None:
        """``misfire_grace`` in seconds."""
        return None if self.misfire_grace is None else duration_seconds(self.misfire_grace)


def parse_schedule(fields: Mapping[str, Any]) -> ScheduleSpec:
    """A spec from keyword arguments, or :class:`InvalidJob` naming every field at fault and why."""
    try:
        spec = ScheduleSpec(**fields)
    except ValidationError as error:
        raise invalid(error) from None
    try:
        CronTimes(spec.cron, spec.tz)
    except ValueError as error:
        raise InvalidJob(str(error), field="cron") from None
    if spec.job.get("idempotency_key") is not None:
        raise InvalidJob("a fire is submitted only once anyway; leave the key out", field="idempotency_key")
    return spec


def parse_job(spec: ScheduleSpec) -> JobSpec:
    """The job, its templates not filled in, or :class:`InvalidJob` naming the field and the reason."""
    job = parse(dict(spec.job))
    if spec.incremental and (some := next((n for n in ("limit", "sample") if getattr(job, n) is not None), None)):
        what = (
            "the files of an incremental fire count as processed, so all of their rows must be computed; leave it out"
        )
        raise InvalidJob(what, field=some)
    for field, texts in (("input", job.input), ("output", (job.output,))):
        for text in texts:
            _checked(text, field)
    return job


def check_outputs(spec: ScheduleSpec, job: JobSpec, after: float) -> None:
    """Raise :class:`InvalidJob` when two of the fires after ``after`` (Unix seconds) would write to the same place."""
    if job.overwrite and not spec.incremental:
        return
    seen: dict[str, str] = {}
    times = CronTimes(spec.cron, spec.tz)
    for at in upcoming(times, after, _TRIED):
        when = local(times, at)
        output = _text(job.output, spec.name, when)
        if output in seen:
            remedy = "put more of the time into it, as in {fire_date:%Y-%m-%dT%H%M}"
            if spec.incremental:
                remedy += "; an incremental fire holds the new files' rows only, so it must not replace an earlier one"
            else:
                remedy += ", or set overwrite = true to keep the newest only"
            raise InvalidJob(f"the fires of {seen[output]} and {when} would both write to {output}: {remedy}",
                             field="output")  # fmt: skip
        seen[output] = str(when)


def job_fields(job: Mapping[str, Any], name: str, times: CronTimes, at: float) -> dict[str, Any]:
    """The fields of the job that the fire at ``at`` (Unix seconds) submits."""
    when = local(times, at)
    metadata = {"schedule": name, "fire_at": when.isoformat()} | dict(job.get("metadata") or {})
    return {
        **job,
        "input": [_text(text, name, when) for text in job["input"]],
        "output": _text(job["output"], name, when),
        "metadata": metadata,
    }


def _checked(text: str, field: str) -> Template:
    try:
        template = Template(text)
    except ValueError as error:
        raise InvalidJob(f"{text!r}: {error}", field=field) from None
    for name in template.fields:
        date, _, pattern = name.partition(":")
        if name in (_NAME, _DATE):
            continue
        if date != _DATE or not pattern:
            raise InvalidJob(
                f"{text!r}: no field {{{name}}}; there are {{fire_date:%Y-%m-%d}} and {{schedule}}", field=field
            )
        if ".." in pattern:  # it would be taken for a parent folder, brace and all, when the path is made absolute
            raise InvalidJob(f"{text!r}: '..' cannot stand in a date", field=field)
        for match in _DIRECTIVE.finditer(pattern):
            if match[1] not in _DIRECTIVES:
                known = " ".join(f"%{letter}" for letter in _DIRECTIVES)
                raise InvalidJob(f"{text!r}: {match[0]!r} is not one of {known}", field=field)
    return template


def _text(text: str, name: str, when: datetime) -> str:
    template = Template(text)
    return template.render({item: name if item == _NAME else _date(item, when) for item in template.fields})


def _date(field: str, when: datetime) -> str:
    pattern = field.partition(":")[2] or "%Y-%m-%d"
    return _DIRECTIVE.sub(lambda match: _DIRECTIVES[match[1]](when), pattern)
