"""Trying a place for an output: each missing right is named, and nothing is left behind."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from storage.errors import InvalidJob, Unreachable
from storage.objects import output_probe
from storage.objects.output_probe import CONDITIONAL, COPY, DELETE, GET, LIST, PARTS, PUT, OutputProbe
from storage.objects.store import ObjectStore
from tests.conftest import S3
from tests.storage.objects.faulty_s3 import IGNORE, Faults, proxy


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.server), "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ObjectStore, str]:
    if request.param == "local":
        return ObjectStore(), str(tmp_path / "out")
    if request.param == "memory":
        return ObjectStore(), f"memory://{uuid.uuid4().hex}/out"
    s3: S3 = request.getfixturevalue("s3")
    return ObjectStore(s3.storage_options), s3.url("below/out")


@pytest.fixture
def faults(s3: S3) -> Iterator[Faults]:
    with proxy(s3.endpoint) as running:
        yield running


@pytest.fixture
def shaky(s3: S3, faults: Faults) -> tuple[ObjectStore, str]:
    options = replace(s3, endpoint=faults.endpoint).storage_options
    return ObjectStore(options, retry_seconds=0.1), s3.url("below/out")


def test_every_step_works_and_leaves_nothing(place: tuple[ObjectStore, str]) -> None:
    store, output = place
    probe = OutputProbe(store, output, f"{output}/.rowmill/try/")
    assert list(probe.steps)[-1] == DELETE
    assert (PARTS in probe.steps) == output.startswith("s3")
    for step in probe.steps.values():
        step()
    assert store.list_tree(output) == []
    output_probe.require(store, output, f"{output}/.rowmill/try/")
    assert store.list_tree(output) == []


def denied(method: str, *, listing: bool | None = None) -> Callable[[str, str], int | None]:
    def script(asked: str, path: str) -> int | None:
        wanted = asked == method and (listing is None or ("list-type" in path) == listing)
        return 403 if wanted else None

    return script


REFUSALS = [
    (PUT, "s3:PutObject", denied("PUT")),
    (PUT, "s3:GetObject", denied("HEAD")),
    (GET, "s3:GetObject", denied("GET", listing=False)),
    (LIST, "s3:ListBucket", denied("GET", listing=True)),
    (DELETE, "s3:DeleteObject", denied("DELETE")),
]


@pytest.mark.parametrize(("step", "right", "script"), REFUSALS, ids=[right for _, right, _ in REFUSALS])
def test_a_missing_right_is_named(
    shaky: tuple[ObjectStore, str], faults: Faults, step: str, right: str, script: Callable[[str, str], int | None]
) -> None:
    store, output = shaky
    faults.script = script
    with pytest.raises(InvalidJob, match=f"{step} below {output} failed: .*{right}") as refused:
        output_probe.require(store, output, f"{output}/.rowmill/try/")
    assert refused.value.field == "output"
    assert refused.value.retry_on_other_worker
    faults.script = lambda method, path: None
    assert len(store.list_tree(output)) == (step == DELETE)


@pytest.mark.parametrize("status", [403, 501, IGNORE])
def test_a_store_without_conditional_puts(shaky: tuple[ObjectStore, str], faults: Faults, status: int) -> None:
    store, output = shaky
    faults.conditional = status
    with pytest.raises(InvalidJob, match=f"{CONDITIONAL} below {output} failed: .*If-None-Match.*choose an output"):
        output_probe.require(store, output, f"{output}/.rowmill/try/")
    assert store.list_tree(output) == []


def test_copies_and_uploads_in_parts_are_tried(shaky: tuple[ObjectStore, str], faults: Faults) -> None:
    store, output = shaky
    probe = OutputProbe(store, output, f"{output}/.rowmill/try/")
    probe.steps[PUT]()
    faults.script = lambda method, path: 403 if "-copy" in path and method == "PUT" else None
    with pytest.raises(InvalidJob):
        probe.steps[COPY]()
    faults.script = lambda method, path: 403 if "uploadId" in path and method == "PUT" else None
    with pytest.raises(InvalidJob):
        probe.steps[PARTS]()
    faults.script = lambda method, path: None
    probe.steps[PARTS]()
    assert sum("partNumber" in request.path for request in faults.requests) == 2
    probe.steps[DELETE]()
    assert store.list_tree(output) == []


def test_what_may_pass_is_no_missing_right(shaky: tuple[ObjectStore, str], faults: Faults) -> None:
    store, output = shaky
    faults.script = lambda method, path: 503
    with pytest.raises(Unreachable):
        output_probe.require(store, output, f"{output}/.rowmill/try/")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidJob, match="the right to put"):
        output_probe.require(ObjectStore(), str(tmp_path / "out"), str(tmp_path / "out/.rowmill/try/"))


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InvalidJob, match=f"put below {tmp_path / 'out'} failed"):
        output_probe.require(ObjectStore(), str(tmp_path / "out"), str(tmp_path / "out/.rowmill/try/"))
