"""``rowmill schedule`` and ``rowmill beat``."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from storage.sql import tables
from storage.states import JobState
from tests.cli.conftest import Rowmill

SPEC = """
input = ["in/*.parquet"]
output = "out/{schedule}/{fire_date:%Y-%m-%d}"
model = "fake"
task = "generate"
prompt = "Say: {text}"
"""
ADD = ("schedule", "add", "nightly", "job.toml", "--cron", "0 2 * * *", "--tz", "Europe/Berlin")
YEARLY = ("schedule", "add", "yearly", "job.toml", "--cron", "0 12 1 1 *")


@pytest.fixture
def home(rowmill: Rowmill) -> Path:
    (rowmill.home / "job.toml").write_text(SPEC)
    (rowmill.home / "in").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), rowmill.home / "in" / "a.parquet")
    return rowmill.home


def test_the_life_of_a_schedule(rowmill: Rowmill, home: Path) -> None:
    dry = rowmill.inside(*ADD, "--dry-run", "--json").document
    assert len(dry["next"]) == 5
    first = dry["next"][0]
    day = first["local"][:10]
    assert first["output"] == str(home / "out" / "nightly" / day)
    assert first["input"] == [str(home / "in" / "*.parquet")]
    assert first["fire_at"] == datetime.fromisoformat(first["local"]).timestamp()
    assert rowmill.inside("schedule", "list", "--json").document["schedules"] == []

    added = rowmill.inside(*ADD, "--json").document["schedule"]
    assert (added["name"], added["tz"], added["overlap"], added["misfire"]) == (
        "nightly",
        "Europe/Berlin",
        "skip",
        "latest",
    )
    assert added["next_at"] == first["fire_at"]
    shown = rowmill.inside("schedule", "show", "nightly", "--json").document
    assert shown == {"version": 1, "schedule": added, "fires": []}
    assert rowmill.inside("schedule", "next", "nightly", "-n", "5", "--json").document["next"] == dry["next"]
    assert f"{day} 02:00:00+0" in rowmill.inside("schedule", "list").out

    assert "paused" in rowmill.inside("schedule", "pause", "nightly").out
    assert rowmill.inside("schedule", "show", "nightly", "--json").document["schedule"]["next_at"] is None
    resumed = rowmill.inside("schedule", "resume", "nightly", "--json").document["schedule"]
    assert resumed == added
    assert rowmill.inside("schedule", "remove", "nightly").out == "nightly  removed\n"
    gone = rowmill.inside("schedule", "show", "nightly", "--json")
    assert gone.code == 6
    assert "no schedule 'nightly'" in gone.document["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "field", "what"),
    [
        (("--cron", "0 2 * *"), "cron", "five"),
        (("--tz", "Berlin"), "tz", "not a time zone"),
        (("--misfire-grace", "soon"), "misfire_grace", "not a duration"),
        (("--misfire", "all"), None, "--overlap queue"),
    ],
)
def test_a_mistake_is_refused_with_its_field(
    rowmill: Rowmill, home: Path, arguments: tuple[str, ...], field: str | None, what: str
) -> None:
    done = rowmill.inside(*ADD, *arguments, "--json")
    assert done.code == 2
    assert done.document["error"]["field"] == field
    assert what in done.document["error"]["message"]
    assert rowmill.inside("schedule", "list", "--json").document["schedules"] == []


def test_a_bad_spec_is_refused(rowmill: Rowmill, home: Path) -> None:
    for text, what in (
        ("input = [", "not valid TOML"),
        (SPEC.replace('"fake"', '"none"'), "none"),
        (SPEC.replace("{fire_date:%Y-%m-%d}", "x"), "would both write"),
        (SPEC.replace("{fire_date:%Y-%m-%d}", "{fire_date.year}"), "no field"),
        ("", "input"),
    ):
        (home / "job.toml").write_text(text)
        done = rowmill.inside(*ADD)
        assert done.code == 2, text
        assert what in done.err
    (home / "job.toml").unlink()
    done = rowmill.inside(*ADD)
    assert done.code == 2
    assert "SPEC: no such file" in done.err


def _due(database: Path) -> None:
    """As if the schedule had been waiting since the newest first of January."""
    since = datetime(datetime.now(UTC).year, 1, 1, 12, tzinfo=UTC).timestamp()
    with sqlite3.connect(database, timeout=60) as connection:
        connection.execute("UPDATE schedule SET next_at = ?", (since,))


def _ends(process: subprocess.Popen[str]) -> tuple[str, str]:
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=60)
    finally:
        process.kill()


def test_beat_without_a_broker_runs_the_jobs(rowmill: Rowmill, home: Path, tmp_path: Path) -> None:
    """A laptop: one process fires the schedule, runs its job, and ends cleanly on SIGTERM."""
    (home / "job.toml").write_text(SPEC.replace("{fire_date:%Y-%m-%d}", "{fire_date:%Y}"))
    assert rowmill(*YEARLY).code == 0
    _due(tmp_path / "data" / "rowmill.db")
    beat = subprocess.Popen(
        rowmill.command("beat", "--setting", "tick_seconds=0.1"),
        cwd=home,
        env=rowmill.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert beat.stderr is not None
    told = [beat.stderr.readline() for _ in range(2)]
    assert "completed: 2 rows to" in told[1], told
    out, err = _ends(beat)
    assert (beat.returncode, out) == (0, ""), err
    assert "Traceback" not in err
    (fire,) = rowmill.inside("schedule", "show", "yearly", "--json").document["fires"]
    assert (fire["state"], fire["job_state"]) == ("submitted", "completed")
    year = datetime.now(UTC).year
    assert pq.read_table(home / "out" / "yearly" / str(year) / "data").num_rows == 2


def test_beat_outlives_a_broker_that_is_away(rowmill: Rowmill, home: Path) -> None:
    with socket.socket() as taken:  # bound, and nobody listens: connections are refused
        taken.bind(("127.0.0.1", 0))
        broker = f"broker_url=redis://127.0.0.1:{taken.getsockname()[1]}/0"
        beat = subprocess.Popen(
            rowmill.command("beat", "--setting", "tick_seconds=0.1", "--setting", broker),
            cwd=home,
            env=rowmill.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert beat.stderr is not None
        told = [beat.stderr.readline() for _ in range(3)]
        assert all("the broker does not answer" in line for line in told[1:]), told
        out, err = _ends(beat)
    assert (beat.returncode, out) == (0, ""), err
    assert "Traceback" not in err


@pytest.mark.postgres
def test_two_beats_with_a_broker(
    postgres_database: str, redis_url: str, rowmill: Rowmill, home: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Two ``rowmill beat`` wake a worker, which fires the schedule once; both end cleanly on SIGTERM."""
    (home / "job.toml").write_text(SPEC.replace("{fire_date:%Y-%m-%d}", "{fire_date:%Y}"))
    environment = rowmill.environment | {
        "ROWMILL_DATABASE_URL": postgres_database,
        "ROWMILL_CACHE_DIR": str(cache_dir),
        "ROWMILL_BROKER_URL": redis_url,
    }
    settings = Settings(database_url=postgres_database, broker_url=redis_url, cache_dir=cache_dir)
    done = rowmill(*YEARLY, "--json", **{k: environment[k] for k in ("ROWMILL_DATABASE_URL", "ROWMILL_BROKER_URL")})
    assert done.code == 0, done.err
    processes = []
    log = (tmp_path / "processes.log").open("w")

    def start(*command: str) -> None:
        processes.append(
            subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)
        )

    try:
        for _ in range(2):
            start(*rowmill.command("beat", "--setting", "tick_seconds=0.5"))
        worker = ("worker", "--pool", "threads", "--concurrency", "2", "-Q", "control,fake", "--loglevel", "warning")
        start(sys.executable, "-m", "celery", "-A", "tasks.app", *worker)
        with Client(settings=settings) as client:
            since = datetime(datetime.now(UTC).year, 1, 1, 12, tzinfo=UTC).timestamp()
            with client._runtime.database.write() as connection:
                connection.execute(tables.schedule.update().values(next_at=since))
            deadline = time.monotonic() + 120
            while not (fires := client.schedules.fires("yearly")) or fires[0].job_state is not JobState.COMPLETED:
                assert time.monotonic() < deadline, (tmp_path / "processes.log").read_text()
                assert all(process.poll() is None for process in processes), (tmp_path / "processes.log").read_text()
                time.sleep(0.05)
            assert [(fire.fire_at, fire.job_state) for fire in fires] == [(since, JobState.COMPLETED)]
            assert len(client.jobs()) == 1
            while (tmp_path / "processes.log").read_text().count("waking the workers every 0.5 s") < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        log.close()
    text = (tmp_path / "processes.log").read_text()
    assert "Traceback" not in text, text
    assert [process.returncode for process in processes[:2]] == [0, 0], text
