"""Schedules as users handle them: validated and stored, listed, paused, removed, and told in advance."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import uuid_utils

from pipeline.boundary import Limit, Text, boundary
from pipeline.inputs.discovery import refuse_output_inside
from pipeline.jobs.preflight import absolute, request_of
from pipeline.process.runtime import Runtime
from pipeline.schedules.cron import CronTimes, local, upcoming
from pipeline.schedules.spec import ScheduleSpec, check_outputs, job_fields, parse_job, parse_schedule
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidJob
from storage.queue import schedules
from storage.records import Fire, NewSchedule, Schedule


@dataclass(frozen=True, slots=True)
class Upcoming:
    """A fire to come: ``at`` in Unix seconds, ``local`` as the schedule's zone shows it, and where its job would read
    from and write to."""

    at: float
    local: str
    input: tuple[str, ...]
    output: str


@boundary
class Schedules:
    """The schedules in the database of a client: ``client.schedules``."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def add(self, name: Text, *, cron: Text, job: Mapping[str, Any], **options: Any) -> Schedule:
        """Store a schedule; it comes due from now on. The fields are those of :class:`~pipeline.ScheduleSpec`.

        Raises :class:`~storage.errors.InvalidJob` naming the field and the reason; nothing is stored then.
        """
        spec, parsed = self._checked(name, cron, job, options)
        return schedules.insert(
            self._runtime.database,
            NewSchedule(
                id=str(uuid_utils.uuid7()),
                tenant=parsed.tenant,
                name=name,
                cron=spec.cron,
                tz=spec.tz,
                spec=parsed.model_dump(mode="json"),
                overlap=spec.overlap,
                misfire=spec.misfire,
                misfire_grace=spec.grace_seconds,
                incremental=spec.incremental,
                next_at=CronTimes(spec.cron, spec.tz).next_after(self._runtime.database.clock()),
            ),
        )

    def preview(
        self, name: Text, *, cron: Text, job: Mapping[str, Any], count: Limit = 5, **options: Any
    ) -> builtins.list[Upcoming]:
        """The next fires that :meth:`add` would bring, after the same checks; stores nothing."""
        spec, parsed = self._checked(name, cron, job, options)
        fields = parsed.model_dump(mode="json")
        return _upcoming(fields, name, CronTimes(spec.cron, spec.tz), self._runtime.database.clock(), count)

    def get(self, name: Text, tenant: Text = "default") -> Schedule:
        """The schedule of this name. Raises :class:`~storage.errors.NotFound`."""
        return schedules.get(self._runtime.database, tenant, name)

    def list(self, tenant: Text | None = None) -> builtins.list[Schedule]:
        """Every schedule, by name; of one tenant if it is given."""
        return schedules.listed(self._runtime.database, tenant=tenant)

    def fires(self, name: Text, tenant: Text = "default", limit: Limit = 20) -> builtins.list[Fire]:
        """What came of the last times that it came due, the newest first."""
        return schedules.fires(self._runtime.database, self.get(name, tenant).id, limit=limit)

    def upcoming(self, name: Text, tenant: Text = "default", count: Limit = 5) -> builtins.list[Upcoming]:
        """Its next fires, as if it were not paused."""
        found = self.get(name, tenant)
        times = CronTimes(found.cron, found.tz)
        return _upcoming(found.spec, found.name, times, self._runtime.database.clock(), count)

    def pause(self, name: Text, tenant: Text = "default") -> Schedule:
        """Let nothing come due until it is resumed; jobs that were submitted go on."""
        return schedules.pause(self._runtime.database, tenant, name)

    def resume(self, name: Text, tenant: Text = "default") -> Schedule:
        """Go on from now; what would have come due meanwhile is not made up for."""
        found = self.get(name, tenant)
        times = CronTimes(found.cron, found.tz)
        return schedules.resume(self._runtime.database, found, times.next_after(self._runtime.database.clock()))

    def remove(self, name: Text, tenant: Text = "default") -> None:
        """Delete it with its fires; its jobs stay. Raises :class:`~storage.errors.NotFound`."""
        schedules.remove(self._runtime.database, tenant, name)

    def _checked(
        self, name: str, cron: str, job: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[ScheduleSpec, JobSpec]:
        spec = parse_schedule({"name": name, "cron": cron, "job": job, **options})
        parsed = parse_job(spec)
        # A registered name stays one: each fire resolves it anew.
        parsed = absolute(parsed, registered=self._runtime.models.is_registered(parsed.model, parsed.tenant))
        clock = self._runtime.database.clock()
        try:
            first = CronTimes(spec.cron, spec.tz).next_after(clock)
        except ValueError as error:
            raise InvalidJob(f"{spec.cron!r}: {error}", field="cron") from None
        check_outputs(spec, parsed, clock)
        fields = job_fields(parsed.model_dump(mode="json"), name, CronTimes(spec.cron, spec.tz), first)
        example = request_of(self._runtime, fields).spec
        for pattern in example.input:
            refuse_output_inside(pattern, example.output)
        return spec, parsed


def _upcoming(job: Mapping[str, Any], name: str, times: CronTimes, clock: float, count: int) -> builtins.list[Upcoming]:
    found = []
    for at in upcoming(times, clock, count):
        fields = job_fields(job, name, times, at)
        found.append(Upcoming(at, local(times, at).isoformat(), tuple(fields["input"]), fields["output"]))
    return found
