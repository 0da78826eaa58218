"""What is wrong inside the processes of a chaos run, and the Celery processes themselves.

``python -m tests.chaos.process FULL SECONDS ARGUMENTS``: Celery with these arguments, on a disk that is full for as
long as the file ``FULL`` exists, and with a wall clock that is off by ``SECONDS``.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import IO, Any

from storage.objects import local_files


def fill_disk_while(full: Path) -> None:
    """Whatever this process writes to files of its own goes to a full device while ``full`` exists."""
    opened = local_files.open_temporary

    class OnDisk(io.FileIO):
        def write(self, data: Any) -> int:
            if full.exists():
                with Path("/dev/full").open("wb", buffering=0) as device:
                    return device.write(data)
            return super().write(data)

    def open_temporary(target: Path) -> tuple[IO[bytes], Path]:
        file, temporary = opened(target)
        file.close()
        return io.BufferedWriter(OnDisk(temporary, "wb")), temporary

    local_files.open_temporary = open_temporary


def set_wall_clock(seconds: float) -> None:
    """The wall clock of this process is off: no stored time may come from it."""
    wall, wall_ns = time.time, time.time_ns
    time.time = lambda: wall() + seconds
    time.time_ns = lambda: wall_ns() + int(seconds * 1e9)


if __name__ == "__main__":
    fill_disk_while(Path(sys.argv[1]))
    set_wall_clock(float(sys.argv[2]))
    from celery.__main__ import main

    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["celery", "-A", "tasks.app", *sys.argv[3:]]
    main()
