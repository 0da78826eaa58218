"""Where an attempt's time goes inside its engine: a trace beside the output, and a summary in the attempt's stats.

The rows of a profiled job run on a second engine, loaded for the attempt with its profiler on, so that no other job
slows down and the trace holds nothing else.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pipeline.engines.base import Engine
from storage import locations
from storage.errors import TransientError
from storage.log_actions import Action
from storage.logs import get_logger
from storage.objects.store import ObjectStore
from storage.records import Claim

log = get_logger(__name__)

MOST_OPERATORS = 40
"""Operators in a summary."""


@runtime_checkable
class Profiled(Protocol):
    """An engine that can write traces."""

    def profiled(self, folder: Path) -> Engine:
        """A second engine like this one, loaded, which writes Chrome traces (``*.json``) into ``folder`` until it is
        closed; the caller closes it."""
        ...


class Profile:
    """One attempt's profile. ``engine`` is the one to use; without a profile that is the one that was given."""

    def __init__(self, store: ObjectStore, claim: Claim, engine: Engine, folder: Path | None) -> None:
        self._store, self._claim, self._folder = store, claim, folder
        self.engine = engine
        if folder is not None:
            assert isinstance(engine, Profiled)
            self.engine = engine.profiled(folder)

    def finish(self) -> dict[str, Any]:
        """End the profile; for the attempt's stats: ``{"profile": {"trace": URI, "operators": […]}}``, or nothing.

        A trace that cannot be stored fails no shard.
        """
        if self._folder is None:
            return {}
        self.engine.close()
        events = [event for path in sorted(self._folder.glob("*.json")) for event in _events(path)]
        uri = locations.profile(self._claim.job.output_uri, self._claim.shard.idx, self._claim.attempt_no)
        try:
            self._store.put_bytes(uri, json.dumps(events).encode())
        except (TransientError, OSError) as error:
            log.warning(
                "the trace of attempt %d was not stored: %s",
                self._claim.attempt_no,
                error,
                action=Action.PROFILE_NOT_STORED,
            )
            uri = ""
        return {"profile": {"trace": uri, **summary(events)}}


@contextmanager
def recording(store: ObjectStore, claim: Claim, engine: Engine, *, wanted: bool) -> Iterator[Profile]:
    """A profile of the attempt if it is wanted and the engine can make one; what it leaves on disk goes with the block.

    An engine without traces was refused when the job was submitted; one that lost the ability runs without.
    """
    if not wanted or not isinstance(engine, Profiled):
        yield Profile(store, claim, engine, None)
        return
    with tempfile.TemporaryDirectory(prefix="rowmill-profile-") as name:
        profile = Profile(store, claim, engine, Path(name))
        try:
            yield profile
        finally:
            profile.engine.close()


def _events(path: Path) -> list[dict[str, Any]]:
    try:
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:  # cut off: the process was short of disk
        return []
    return [event for event in events if isinstance(event, dict)]


def summary(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Time by operator, from ONNX Runtime's events: ``seconds``, and ``operators`` with ``operator``, ``provider``,
    ``runs``, ``seconds`` and ``share`` of all of them, the largest first."""
    return _shares(
        (str(details.get("op_name", "?")), str(details.get("provider", "")), 1, float(event.get("dur", 0)) / 1e6)
        for event in events
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time")
        for details in [event.get("args") or {}]
    )


def together(profiles: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Several attempts' summaries as one."""
    return _shares(
        (each["operator"], each["provider"], each["runs"], each["seconds"])
        for profile in profiles
        for each in profile.get("operators", ())
    )


def _shares(measured: Iterable[tuple[str, str, int, float]]) -> dict[str, Any]:
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    runs: dict[tuple[str, str], int] = defaultdict(int)
    for operator, provider, n, spent in measured:
        seconds[operator, provider] += spent
        runs[operator, provider] += n
    total = sum(seconds.values())
    operators = [
        {
            "operator": operator,
            "provider": provider,
            "runs": runs[operator, provider],
            "seconds": round(spent, 6),
            "share": round(spent / total, 4) if total else 0.0,
        }
        for (operator, provider), spent in sorted(seconds.items(), key=lambda item: (-item[1], item[0]))[
            :MOST_OPERATORS
        ]
    ]
    return {"seconds": round(total, 6), "operators": operators}
