"""Whatever goes wrong in the client is a ``RowmillError``: wrong arguments of any kind, calls of a closed client."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client, JobHandle, RowmillError
from pipeline.boundary import boundary, own
from pipeline.config.settings import Settings
from pipeline.schedules.api import Schedules
from storage.errors import InvalidJob, InvalidSettings, NotFound, Unexpected
from storage.states import RequestState

NASTY: tuple[Any, ...] = (
    object(),
    -1,
    2**100,
    math.nan,
    math.inf,
    "\0",
    "\ud800",
    "x" * 100_000,
    b"x",
    [],
    {},
    ("a", 3),
    True,
)


@pytest.fixture
def client(settings: Settings, database_url: str) -> Iterator[Client]:
    with Client(settings=settings.model_copy(update={"database_url": database_url})) as client:
        yield client


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "in.parquet")
    inp, out = str(tmp_path / "in.parquet"), str(tmp_path / "out")
    return {"input": inp, "output": out, "model": "fake", "task": "generate", "prompt": "{text}"}


def methods(kind: type) -> list[str]:
    return [name for name, member in vars(kind).items() if inspect.isfunction(member) and not name.startswith("_")]


def is_refused(call: Any, *args: Any, **kwargs: Any) -> bool:
    """False where the call goes through; anything else than a ``RowmillError`` is a failed test."""
    try:
        call(*args, **kwargs)
    except RowmillError as error:
        assert not isinstance(error, Unexpected), (call.__name__, args, kwargs, error)
        assert str(error)
        return True
    return False


def test_whatever_is_handed_over(client: Client, fields: dict[str, Any]) -> None:
    job = client.job(client.run(**fields).id)
    for target, kind in ((client, Client), (job, JobHandle), (client.schedules, Schedules)):
        for name in methods(kind):
            if name in ("close", "delete"):
                continue
            call = getattr(target, name)
            assert is_refused(call, *range(20)), f"{name} takes any number of arguments"
            for parameter in inspect.signature(call).parameters.values():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    assert is_refused(call, nonsense=1)
                    continue
                for value in NASTY:
                    is_refused(call, **{parameter.name: value})
            assert name in ("submit", "estimate", "run", "add_tenant", "set_tenant") or is_refused(call, nonsense=1)
    for field in fields:
        for value in NASTY[:6]:
            assert is_refused(client.submit, start=False, **fields | {field: value, "output": "/dev/null/out"})


def test_a_wrong_argument_is_named(client: Client, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidJob, match="limit: should be greater than or equal to 1, not 0") as raised:
        client.jobs(limit=0)
    assert raised.value.field == "limit"
    with pytest.raises(InvalidJob, match=r"job\(\) takes id_or_prefix"):
        client.job()  # type: ignore[call-arg]
    with pytest.raises(InvalidJob, match=r"after: .* holds a NUL"):
        client.jobs(after="no\0")
    with pytest.raises(InvalidSettings, match="data_dri"):
        Client(data_dri="x")
    with pytest.raises(InvalidSettings, match="settings, or data_dir by name"):
        Client(settings=Settings(), data_dir="x")
    with pytest.raises(NotFound):
        client.job("zzzz")


def test_numbers_of_other_libraries_are_numbers(client: Client, fields: dict[str, Any]) -> None:
    job = client.job(client.run(**fields).id)
    assert job.request(np.int64(1)).state is RequestState.SUCCEEDED  # type: ignore[arg-type]
    with pytest.raises(InvalidJob, match="row"):
        job.request(1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidJob, match="row"):
        job.request(True)


def test_settings_go_by_name(settings: Settings, tmp_path: Path) -> None:
    with Client(data_dir=tmp_path / "a", cache_dir=str(tmp_path / "b"), lease_seconds=7) as client:
        found = client._runtime.settings
        assert (found.data_dir, found.cache_dir, found.lease_seconds) == (tmp_path / "a", tmp_path / "b", 7)


def test_a_closed_client_says_so(client: Client, fields: dict[str, Any]) -> None:
    job = client.submit(**fields)
    job.wait(timeout=60)
    errors = job.errors()
    client.close()
    client.close()
    for call in (client.jobs, lambda: client.job(job.id), lambda: client.submit(**fields), lambda: client.schedules):
        with pytest.raises(RowmillError, match="the client is closed"):
            call()
    for call in (job.status, job.wait, job.table, lambda: list(errors), lambda: len(errors)):
        with pytest.raises(RowmillError, match="the client is closed"):
            call()


def test_what_callbacks_raise_is_the_users() -> None:
    @boundary
    class Thing:
        def call(self, callback: Any) -> None:
            own(callback)(1)

        def broken(self) -> None:
            raise ZeroDivisionError("a defect")

    def fails(value: int) -> None:
        raise KeyError(value)

    with pytest.raises(KeyError):
        Thing().call(fails)
    with pytest.raises(Unexpected, match="ZeroDivisionError: a defect") as raised:
        Thing().broken()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
