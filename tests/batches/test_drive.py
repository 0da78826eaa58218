"""Batches from their file to their lines, driven round by round; and a driver that dies at each step."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.batches import places, validation
from pipeline.batches.drive import collect_files, drive
from pipeline.client.session import Session
from pipeline.config.settings import Settings
from pipeline.worker.worker import Worker
from storage import failpoints
from storage.broker import CONTROL_QUEUE
from storage.errors import Conflict, IllegalTransition, NotFound
from storage.files import batches, files
from storage.files.records import Batch, File, NewBatch, Purpose
from storage.log_actions import Action
from storage.logs import get_logger
from storage.queue import jobs
from storage.records import Job
from storage.states import BatchState

CHAT = "/v1/chat/completions"


@pytest.fixture
def session(settings: Settings) -> Iterator[Session]:
    opened = Session(settings.model_copy(update={"read_batch_rows": 2}))
    yield opened
    opened.close()


def line(name: str, **body: Any) -> str:
    body = {"model": "fake", "messages": [{"role": "user", "content": name}]} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body})


def upload(session: Session, text: str, tenant: str = "acme") -> File:
    runtime, file_id = session.runtime, places.new_id("file")
    uri = places.file_uri(runtime.settings, file_id)
    files.begin(runtime.database, file_id=file_id, tenant=tenant, purpose=Purpose.BATCH, uri=uri)
    runtime.store.put_bytes(uri, text.encode())
    return files.finish(runtime.database, file_id, tenant=tenant, filename="in.jsonl", n_bytes=len(text), seconds=None)


def create(
    session: Session, file_id: str, *, window_seconds: float = 86_400.0, repeated: bool = False, **values: Any
) -> Batch:
    given: dict[str, Any] = {
        "id": places.new_id("batch"),
        "tenant": "acme",
        "endpoint": CHAT,
        "input_file_id": file_id,
        "completion_window": "24h",
        "metadata": None,
        "output_seconds": None,
        "idem_key": None,
        "body_hash": "0",
        "key_id": None,
    }
    new = NewBatch(**(given | values))
    return batches.create(session.runtime.database, new, window_seconds=window_seconds, repeated=repeated)


def to_the_end(session: Session, batch: Batch) -> Batch:
    def run(job: Job) -> None:
        background = session.start(job.id)
        assert background is not None
        background.done.wait()
        assert background.error is None

    for _ in range(20):
        drive(session.runtime, run)
        batch = batches.get(session.runtime.database, batch.tenant, batch.id)
        if batch.terminal:
            return batch
    raise AssertionError(f"batch {batch.id} is still {batch.state}")


def wait_until(holds: Callable[[], bool], what: str) -> None:
    pause = threading.Event()
    for _ in range(600):
        if holds():
            return
        pause.wait(0.05)
    raise AssertionError(f"it never came to be that {what}")


def lines_of(session: Session, batch: Batch, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    found = files.get(session.runtime.database, batch.tenant, file_id)
    content = session.runtime.store.read_bytes(found.uri)
    assert found.n_bytes == len(content)
    return [json.loads(text) for text in content.splitlines()]


def names(found: list[dict[str, Any]]) -> list[str]:
    return [item["custom_id"] for item in found]


def test_a_batch_is_completed_with_its_lines_in_order(session: Session) -> None:
    texts = [line(f"r{n}", **({"best_of": 3} if n == 2 else {})) for n in range(5)]
    batch = create(session, upload(session, "\ufeff" + "\r\n\n".join(texts)).id)
    ended = to_the_end(session, batch)
    assert (ended.state, ended.model, ended.errors) == (BatchState.COMPLETED, "fake", None)
    good = lines_of(session, ended, ended.output_file_id)
    bad = lines_of(session, ended, ended.error_file_id)
    assert names(good) == ["r0", "r1", "r3", "r4"] and names(bad) == ["r2"]
    assert bad[0]["response"]["status_code"] == 400
    assert (ended.n_total, ended.n_completed, ended.n_failed) == (5, 4, 1)
    usage = [item["response"]["body"]["usage"] for item in good]
    assert ended.input_tokens == sum(item["prompt_tokens"] for item in usage) > 0
    assert ended.output_tokens == sum(item["completion_tokens"] for item in usage) > 0


def test_a_worker_takes_batches_to_their_end(session: Session) -> None:
    batch = create(session, upload(session, line("a")).id)
    worker = Worker(session.runtime.settings, engines=["fake"], queues=[CONTROL_QUEUE, "fake"], slots=1)
    worker.start()
    try:
        wait_until(lambda: batches.get(worker.runtime.database, "acme", batch.id).terminal, "the batch has ended")
    finally:
        worker.drain(0)
        worker.close()
    ended = batches.get(session.runtime.database, "acme", batch.id)
    assert ended.state is BatchState.COMPLETED
    assert names(lines_of(session, ended, ended.output_file_id)) == ["a"]


def test_a_batch_whose_lines_all_fail_completes_without_an_output_file(session: Session) -> None:
    ended = to_the_end(session, create(session, upload(session, line("a", best_of=2)).id))
    assert (ended.state, ended.output_file_id, ended.n_failed) == (BatchState.COMPLETED, None, 1)
    assert names(lines_of(session, ended, ended.error_file_id)) == ["a"]


def test_faults_fail_the_batch_with_their_lines(session: Session) -> None:
    texts = [line("a"), "{not json", line("a"), line("b", model="/etc/passwd"), line("c", stream=True)]
    ended = to_the_end(session, create(session, upload(session, "\n".join(texts)).id))
    assert (ended.state, ended.job_id, ended.in_progress_at) == (BatchState.FAILED, None, None)
    assert ended.errors is not None
    found = [(item["line"], item["code"]) for item in ended.errors["data"]]
    assert found == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "model_not_found"),
        (5, "streaming_unsupported"),
    ]


def test_a_thousand_faults_and_a_count(session: Session) -> None:
    ended = to_the_end(session, create(session, upload(session, "{\n" * 1_005).id))
    assert ended.errors is not None
    data = ended.errors["data"]
    assert len(data) == 1_001 and data[999]["line"] == 1_000 and data[1_000]["line"] is None
    assert "5" in data[1_000]["message"]


def test_a_file_that_is_not_there_or_is_anothers_fails_the_batch(session: Session) -> None:
    theirs = upload(session, line("a"), tenant="other")
    for file_id in ("file-none", theirs.id):
        ended = to_the_end(session, create(session, file_id))
        assert ended.state is BatchState.FAILED and ended.errors is not None
        assert (ended.errors["data"][0]["code"], ended.errors["data"][0]["param"]) == ("invalid_request", "file_id")


def test_an_empty_file(session: Session) -> None:
    ended = to_the_end(session, create(session, upload(session, "\n\n").id))
    assert ended.errors is not None
    assert [(item["code"], item["line"]) for item in ended.errors["data"]] == [("empty_file", None)]


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_cancelled_batch_has_each_line_once(session: Session, rounds: int) -> None:
    batch = create(session, upload(session, "\n".join(line(f"r{n}") for n in range(3))).id)
    for _ in range(rounds):
        drive(session.runtime)
    found = batches.request_cancel(session.runtime.database, "acme", batch.id)
    assert found.state is BatchState.CANCELLING and found.cancelling_at is not None
    assert batches.request_cancel(session.runtime.database, "acme", batch.id) == found
    ended = to_the_end(session, batch)
    assert ended.state is BatchState.CANCELLED
    bad = lines_of(session, ended, ended.error_file_id)
    assert names(bad) == ["r0", "r1", "r2"] and ended.output_file_id is None
    assert {(item["response"], item["error"]["code"]) for item in bad} == {(None, "batch_cancelled")}
    assert ended.n_failed == 3
    again = batches.request_cancel(session.runtime.database, "acme", batch.id)
    assert again.state is BatchState.CANCELLED


def test_a_batch_that_is_cancelled_in_the_middle_keeps_what_it_finished(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields = validation._fields
    reached = tmp_path / "reached"
    options = {"gate_file": str(tmp_path / "never"), "gate_after_rows": 2, "touch_after_rows": (2, str(reached))}

    def gated(*given: Any) -> dict[str, Any]:
        return {**fields(*given), "engine_options": options}

    monkeypatch.setattr(validation, "_fields", gated)
    batch = create(session, upload(session, "\n".join(line(f"r{n}") for n in range(4))).id)
    drive(session.runtime)
    drive(session.runtime, lambda job: session.start(job.id))
    drive(session.runtime, lambda job: session.start(job.id))
    wait_until(reached.exists, "two rows are computed")
    batches.request_cancel(session.runtime.database, "acme", batch.id)
    ended = to_the_end(session, batch)
    assert ended.state is BatchState.CANCELLED
    assert names(lines_of(session, ended, ended.output_file_id)) == ["r0", "r1"]
    assert names(lines_of(session, ended, ended.error_file_id)) == ["r2", "r3"]
    assert (ended.n_total, ended.n_completed, ended.n_failed) == (4, 2, 2)


def test_an_expired_batch_has_each_line_once(session: Session) -> None:
    text = "\n".join(line(f"r{n}") for n in range(2))
    batch = create(session, upload(session, text).id, window_seconds=-1.0)
    ended = to_the_end(session, batch)
    assert ended.state is BatchState.EXPIRED
    bad = lines_of(session, ended, ended.error_file_id)
    assert [item["error"]["code"] for item in bad] == ["batch_expired"] * 2
    with pytest.raises(IllegalTransition):
        batches.request_cancel(session.runtime.database, "acme", batch.id)


class _Died(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("step", ["batch.checked", "batch.submitted", "batch.written"])
def test_a_driver_that_dies_is_followed_by_another(
    session: Session, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    batch = create(session, upload(session, line("a")).id)
    left = 1

    def hit(name: str) -> None:
        nonlocal left
        if name == step and left:
            left -= 1
            raise _Died

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "hit", hit)
        with pytest.raises(_Died):
            to_the_end(session, batch)
    ended = to_the_end(session, batch)
    assert ended.state is BatchState.COMPLETED and left == 0
    assert names(lines_of(session, ended, ended.output_file_id)) == ["a"]
    assert (
        len(files.listed(session.runtime.database, "acme", purpose=None, limit=9, after=None, newest_first=True)[0])
        == 2
    )


def test_what_a_drive_logs_names_its_batch(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = create(session, upload(session, line("a")).id)

    def check(*given: object) -> None:
        get_logger("tests.batches").warning("checking", action=Action.BATCH_POSTPONED)
        raise OSError("no disk")

    monkeypatch.setattr(validation, "check", check)
    drive(session.runtime)
    fields = [(vars(record)["batch_id"], vars(record)["tenant"]) for record in caplog.records]
    assert fields == [(batch.id, "acme")] * 2, "also of what is called, and of the failure"


def test_a_deleted_file_stays_while_its_batch_runs(session: Session) -> None:
    database, file = session.runtime.database, upload(session, line("a"))
    batch = create(session, file.id)
    files.delete(database, "acme", file.id)
    with pytest.raises(NotFound):
        files.get(database, "acme", file.id)
    assert collect_files(session.runtime) == 0
    assert to_the_end(session, batch).state is BatchState.COMPLETED
    assert collect_files(session.runtime) == 1
    assert not session.runtime.store.exists(file.uri)


def test_the_same_request_creates_one_batch(session: Session) -> None:
    first = create(session, "file-x", idem_key="k", body_hash="1")
    assert create(session, "file-x", idem_key="k", body_hash="1").id == first.id
    assert create(session, "file-x", idem_key="k", body_hash="1", tenant="other").id != first.id
    with pytest.raises(Conflict) as refused:
        create(session, "file-x", idem_key="k", body_hash="2")
    assert refused.value.field == "idempotency_key"
    plain = create(session, "file-x", body_hash="3", key_id="a")
    assert create(session, "file-x", body_hash="3", key_id="a").id != plain.id
    repeated = create(session, "file-x", body_hash="4", key_id="a")
    assert create(session, "file-x", body_hash="4", key_id="a", repeated=True).id == repeated.id
    assert create(session, "file-x", body_hash="4", key_id="b", repeated=True).id != repeated.id


def test_a_refused_job_fails_its_batch(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = create(session, upload(session, line("a")).id)
    monkeypatch.setattr(
        jobs, "insert", lambda *args, **kwargs: (_ for _ in ()).throw(Conflict("taken", field="output"))
    )
    ended = to_the_end(session, batch)
    assert ended.state is BatchState.FAILED and ended.errors is not None
    assert "taken" in ended.errors["data"][0]["message"]
