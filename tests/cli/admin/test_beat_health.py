"""``rowmill beat --health``: what a container's health check is told about the beat beside it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.config.settings import Settings
from pipeline.engines.base import Cancellation
from pipeline.worker import beat, beat_health
from tests.cli.conftest import Rowmill


def test_without_a_beat_it_is_not_healthy(rowmill: Rowmill) -> None:
    done = rowmill.inside("beat", "--health")
    assert done.code == 1 and "no beat has run" in done.out


def test_each_round_shows(rowmill: Rowmill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beat that wakes workers notes its rounds also while the broker is away; a beat that stands still is late."""
    settings = Settings(cache_dir=tmp_path / "cache", broker_url="redis://127.0.0.1:9/0", tick_seconds=0.01)
    interrupt = Cancellation()
    noted = beat_health.note_round

    def note(of: Settings) -> None:
        noted(of)
        interrupt.cancel("interrupted")

    monkeypatch.setattr(beat_health, "note_round", note)
    beat.wake_workers(settings, interrupt)
    done = rowmill.inside("beat", "--health", "--json")
    assert done.code == 0 and done.document["healthy"] is True
    [mark] = (tmp_path / "cache").glob("beat-*.alive")
    long_ago = time.time() - 3600
    os.utime(mark, (long_ago, long_ago))
    assert rowmill.inside("beat", "--health").code == 1
