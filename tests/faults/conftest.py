"""The world of a fault test: a job's input and output, its database, and real processes that end with the test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.settings import Settings
from tests.faults.driver import World

LEASE_SECONDS = 1.0
"""Short, so that a lost worker is noticed soon; heartbeats come three times in it."""


def make_settings(home: Path, cache_dir: Path, database_url: str) -> Settings:
    """Batches of 5 rows, part files of 10 and a short lease; no broker."""
    return Settings(
        data_dir=home / "data",
        cache_dir=cache_dir,
        database_url=database_url,
        lease_seconds=LEASE_SECONDS,
        flush_rows=20,  # a part file holds half of it
        read_batch_rows=5,
        tick_seconds=1.0,
        drain_grace_seconds=0.0,
    )


@pytest.fixture
def world(database_url: str, tmp_path: Path, cache_dir: Path) -> Iterator[World]:
    """Once on SQLite and once on PostgreSQL."""
    made = World(make_settings(tmp_path, cache_dir, database_url), tmp_path)
    yield made
    made.close()


@pytest.fixture
def embedded_world(tmp_path: Path, cache_dir: Path, sqlite_template: Path) -> Iterator[World]:
    """SQLite alone: for what does not depend on the database."""
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    made = World(make_settings(tmp_path, cache_dir, f"sqlite:///{tmp_path / 'jobs.db'}"), tmp_path)
    yield made
    made.close()


@pytest.fixture
def broker_world(postgres_database: str, redis_url: str, tmp_path: Path, cache_dir: Path) -> Iterator[World]:
    """PostgreSQL and Redis: for real Celery processes (``world.celery``)."""
    settings = make_settings(tmp_path, cache_dir, postgres_database)
    made = World(settings.model_copy(update={"broker_url": redis_url}), tmp_path)
    yield made
    made.close()
