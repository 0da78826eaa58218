"""What a schedule may say, and the job that a fire makes of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schedules.cron import CronTimes
from pipeline.schedules.spec import _DIRECTIVES, check_outputs, job_fields, parse_job, parse_schedule
from storage.errors import InvalidJob

JOB = {
    "input": ["in/{fire_date:%Y}/*.parquet"],
    "output": "out/{schedule}-{fire_date:%Y-%m-%d}",
    "model": "fake",
    "task": "generate",
    "prompt": "Say: {text}",
}
NOW = 1_800_000_000.0


def fields(**more: Any) -> dict[str, Any]:
    return {"name": "nightly", "cron": "0 2 * * *", "job": JOB} | more


def check(**more: Any) -> None:
    spec = parse_schedule(fields(**more))
    check_outputs(spec, parse_job(spec), NOW)


def test_a_fire_is_a_job_of_its_own() -> None:
    at = datetime(2026, 3, 29, 2, 30, tzinfo=ZoneInfo("UTC")).timestamp()
    job = job_fields(
        JOB | {"output": "{schedule}/{fire_date}/%d{{x}}/{fire_date:%H%M%z week %V of %G, day %j, 100%%}"},
        "nightly",
        CronTimes("30 4 * * *", "Europe/Berlin"),
        at,
    )
    assert job["input"] == ["in/2026/*.parquet"]
    assert job["output"] == "nightly/2026-03-29/%d{x}/0430+0200 week 13 of 2026, day 088, 100%"
    assert job["prompt"] == "Say: {text}"
    assert job["metadata"] == {"schedule": "nightly", "fire_at": "2026-03-29T04:30:00+02:00"}


@given(st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1)), st.sampled_from(sorted(_DIRECTIVES)))
def test_directives_mean_what_strftime_means(moment: datetime, letter: str) -> None:
    at = moment.replace(tzinfo=ZoneInfo("Europe/Berlin"))
    assert _DIRECTIVES[letter](at) == at.strftime(f"%{letter}")


@pytest.mark.parametrize(
    ("more", "field", "what"),
    [
        ({"name": "a/b"}, "name", "match pattern"),
        ({"name": ".."}, "name", "match pattern"),
        ({"cron": "0 2 * *"}, "cron", "4 fields"),
        ({"cron": "0 99 * * *"}, "cron", "bad hour"),
        ({"tz": "Berlin"}, "tz", "not a time zone"),
        ({"overlap": "ignore"}, "overlap", "cancel-previous"),
        ({"misfire": "none"}, "misfire", "latest"),
        ({"misfire": "all"}, None, "needs overlap 'queue'"),
        ({"misfire_grace": "soon"}, "misfire_grace", "not a duration"),
        ({"misfire_grace": "5s"}, "misfire_grace", "too short"),
        ({"when": "now"}, "when", "unknown field"),
        ({"job": JOB | {"idempotency_key": "k"}}, "idempotency_key", "leave the key out"),
        ({"job": JOB | {"task": "sing"}}, "task", "generate"),
        ({"job": JOB | {"output": "out/{fire_date:%Q}"}}, "output", "'%Q' is not one of"),
        ({"job": JOB | {"output": "out/{fire_date:%"}}, "output", "unbalanced"),
        ({"job": JOB | {"output": "out/{fire_date:100%}"}}, "output", "'%' is not one of"),
        ({"job": JOB | {"output": "out/{fire_date.year}"}}, "output", "no field {fire_date.year}"),
        ({"job": JOB | {"output": "out/{schedule:>99999999}"}}, "output", "no field {schedule:>99999999}"),
        ({"job": JOB | {"output": "out/{fire_date!r}"}}, "output", "no field {fire_date!r}"),
        ({"job": JOB | {"output": "out/{fire_date:%Y/../..}"}}, "output", "'..' cannot stand in a date"),
        ({"job": JOB | {"output": "out/{}"}}, "output", "empty field"),
        ({"job": JOB | {"input": ["in/{text}"]}}, "input", "no field {text}"),
        ({"job": JOB | {"output": "out"}}, "output", "would both write to out"),
        ({"job": JOB | {"output": "out/{fire_date:%Y-%m}"}}, "output", "would both write to out/"),
        ({"cron": "0 2,14 * * *"}, "output", "would both write to out/nightly-"),
        ({"job": JOB | {"output": "out", "overwrite": True}, "incremental": True}, "output", "must not replace"),
    ],
)
def test_what_cannot_work_is_refused_with_its_field(more: dict[str, Any], field: str | None, what: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        check(**more)
    assert what in str(refused.value)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tz": "Europe/Berlin", "misfire": "all", "overlap": "queue", "misfire_grace": "2h", "incremental": True},
        {"job": JOB | {"output": "out", "overwrite": True}},
        {"cron": "*/5 * * * *", "job": JOB | {"output": "out/{fire_date:%Y-%m-%dT%H%M%z}"}},
    ],
)
def test_what_can_work_is_taken(more: dict[str, Any]) -> None:
    check(**more)
