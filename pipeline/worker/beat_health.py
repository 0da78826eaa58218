"""Whether a beat of this machine keeps time: the end of its last round is the time of a file in the cache folder."""

from __future__ import annotations

import platform
import time
from pathlib import Path

from pipeline.config.settings import Settings

LATE_ROUNDS = 4
"""A beat may be this many rounds late: one may wait for a broker or a database that does not answer."""

_ROUND_SECONDS = 60.0
"""How long one round may take by itself: collecting garbage, submitting what schedules fire."""


def note_round(settings: Settings) -> None:
    """Note that a round of the beat has ended just now."""
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    _mark(settings).touch()


def silent_seconds(settings: Settings) -> float | None:
    """Seconds since the last round of a beat on this machine; ``None`` when there has been none."""
    try:
        return time.time() - _mark(settings).stat().st_mtime
    except FileNotFoundError:
        return None


def is_late(settings: Settings, silent: float | None) -> bool:
    """Whether a beat that has been ``silent`` for this many seconds is stuck, or gone."""
    return silent is None or silent > LATE_ROUNDS * settings.tick_seconds + _ROUND_SECONDS


def _mark(settings: Settings) -> Path:
    # By host: several machines, or containers, may share a cache folder.
    return settings.cache_dir / f"beat-{platform.node()}.alive"
