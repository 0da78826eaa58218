"""A user's script with an embedded client, ended in the middle of its job: ``python -m tests.chaos.script REQUEST``.

It submits its job, writes the job's id to the file ``waits``, waits, and creates ``done`` once the job is complete.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import time
from pathlib import Path

from pipeline import Client
from pipeline.config.settings import Settings
from storage.states import JobState
from tests.chaos.process import fill_disk_while


def main(request: str) -> None:
    asked = json.loads(request)
    faulthandler.register(signal.SIGUSR1)  # asked for before one that hangs is killed
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore it
    fill_disk_while(Path(asked["full"]))
    # Left open on purpose, in every way that users do.
    client = Client(settings=Settings(**asked["settings"]))
    job = client.submit(**asked["fields"])
    if job.status().state is JobState.FAILED:
        job.retry()
    Path(asked["waits"]).write_text(job.id)
    match asked["how"]:
        case "falls off the end":
            time.sleep(asked["after"])
        case "exits":
            time.sleep(asked["after"])
            sys.exit(3)
        case "raises":
            time.sleep(asked["after"])
            raise LookupError("a mistake of the script's own")
        case _:
            job.wait()
            Path(asked["done"]).touch()


if __name__ == "__main__":
    main(sys.argv[1])
