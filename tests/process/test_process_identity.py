"""A worker's process is told from a later one with its pid, whatever the host's clock was set to meanwhile."""

from __future__ import annotations

import sys
from dataclasses import replace

import psutil
import pytest

from pipeline.config.settings import Settings
from pipeline.process.runtime import is_alive, start
from storage.fleet import workers


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the wall clock's time of the start is all there is")
def test_a_clock_that_was_set_changes_nothing(settings: Settings, database_url: str) -> None:
    runtime = start(settings.model_copy(update={"database_url": database_url}))
    try:
        runtime.register()
        (mine,) = workers.on_host(runtime.database, runtime.worker.host)
        assert mine == runtime.worker
        assert mine.start_ticks is not None
        assert is_alive(replace(mine, pid_started_at=mine.pid_started_at - 3600.0))
        assert not is_alive(replace(mine, start_ticks=mine.start_ticks - 1)), "a later process has the pid"
        assert not is_alive(replace(mine, boot_id="another boot of this host"))
    finally:
        runtime.close()


def test_a_worker_that_registered_without_them_is_known_by_its_time(settings: Settings) -> None:
    runtime = start(settings)
    runtime.close()
    old = replace(runtime.worker, boot_id=None, start_ticks=None)
    assert is_alive(old)
    assert not is_alive(replace(old, pid_started_at=old.pid_started_at - 3600.0))
    assert not is_alive(
        replace(runtime.worker, pid=next(pid for pid in range(2, 1 << 22) if not psutil.pid_exists(pid)))
    )
