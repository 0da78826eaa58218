"""What all routes share: one open session, and whether this process also runs the jobs."""

from __future__ import annotations

import threading
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from pipeline.batches.drive import drive
from pipeline.client.client import Client
from pipeline.client.session import Session
from pipeline.config.settings import Settings
from pipeline.gateway.job_runner import JobRunner
from pipeline.process.runtime import Runtime
from pipeline.worker.polling import Poller
from storage.objects.store import ObjectStore
from storage.sql.database import Database

_DRIVE_SECONDS = 1.0
"""Longest pause between two looks at the batches."""
_DRIVERS = 2
"""Threads that drive batches: one may read a long file, and the other goes on meanwhile."""


class Gateway:
    """The open database and object store of a gateway process. ``embedded``: it runs the jobs itself.

    ``client`` sees the jobs of all tenants: a route narrows each call to the tenant of its caller.
    """

    def __init__(self, settings: Settings, *, embedded: bool = False) -> None:
        self.settings, self.embedded = settings, embedded
        self.session = Session(settings)
        self.client = Client.over(self.session)
        self.runner: JobRunner | None = None
        if embedded:
            self.runner = JobRunner(self.session)
            self.runner.start()
        self._closing = threading.Event()
        self.batches = Poller("batches", self._drive_batches, count=_DRIVERS, longest=_DRIVE_SECONDS)
        self.batches.start()

    @property
    def runtime(self) -> Runtime:
        """Database, object store and identity of this process."""
        return self.session.runtime

    @property
    def database(self) -> Database:
        return self.runtime.database

    @property
    def store(self) -> ObjectStore:
        return self.runtime.store

    def wake(self) -> None:
        """A job was queued: whoever runs jobs looks at once."""
        self.session.wakeups.plan()
        if self.runner is not None:
            self.runner.wake()

    def _drive_batches(self) -> bool:
        """Take batches through their states, so that one needs neither beat nor a free worker."""
        moved = drive(self.runtime, stopped=self._closing.is_set)
        if moved:
            self.wake()
        return moved

    def close(self) -> None:
        """Flush and hand back what runs here, and close the connections."""
        self._closing.set()
        self.batches.stop()
        self.batches.join()
        if self.runner is not None:
            self.runner.stop()
        self.session.close()


def _of(connection: HTTPConnection) -> Gateway:
    gateway = connection.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


Here = Annotated[Gateway, Depends(_of)]
"""A route's parameter: the gateway that it belongs to."""
