"""OpenAI's own client, unmodified and strict, against a real server: files, batches and models."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa
import uvicorn
from openai.types import Batch

from pipeline.batches import places
from pipeline.config.settings import Settings
from pipeline.gateway.app import create_app
from storage.sql import tables
from storage.tenants import keys, tenants

CHAT: Any = "/v1/chat/completions"
EMBEDDINGS: Any = "/v1/embeddings"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """The address of a server that runs the jobs itself, and its gateway."""
    folder = tmp_path_factory.mktemp("gateway")
    settings = Settings(
        data_dir=folder / "data", cache_dir=folder / "cache", max_file_bytes=1_000_000, max_line_bytes=10_000
    )
    app = create_app(settings, embedded=True)
    web = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="on"))
    started = threading.Event()
    startup = web.startup

    async def started_up(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    web.startup = started_up  # type: ignore[method-assign]
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    assert started.wait(60)
    port = web.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", app.state.gateway
    web.should_exit = True
    thread.join(60)


def client_of(server: tuple[str, Any], tenant: str) -> openai.OpenAI:
    address, gateway = server
    if tenant not in {item.name for item in tenants.listed(gateway.database)}:
        tenants.add(gateway.database, tenant)
    text, _ = keys.create(gateway.database, tenant, ("submit", "read"), expires_in=None, actor="test")
    return openai.OpenAI(
        base_url=f"{address}/v1", api_key=text, _strict_response_validation=True, max_retries=0, timeout=60
    )


@pytest.fixture(scope="module")
def client(server: tuple[str, Any]) -> Iterator[openai.OpenAI]:
    with client_of(server, "acme") as made:
        yield made


@pytest.fixture(scope="module")
def other(server: tuple[str, Any]) -> Iterator[openai.OpenAI]:
    with client_of(server, "other") as made:
        yield made


def chats(n: int, **body: Any) -> list[str]:
    return [
        json.dumps(
            {
                "custom_id": f"r{at}",
                "method": "POST",
                "url": CHAT,
                "body": {"model": "fake", "messages": [{"role": "user", "content": f"hello {at}"}], **body},
            }
        )
        for at in range(n)
    ]


def upload(client: openai.OpenAI, lines: list[str]) -> str:
    return client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch").id


def created(client: openai.OpenAI, lines: list[str], endpoint: Any = CHAT, **values: Any) -> Batch:
    return client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h", **values
    )


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    pause = threading.Event()
    for _ in range(600):
        found = client.batches.retrieve(batch.id)
        if found.status in ("completed", "failed", "cancelled", "expired"):
            return found
        pause.wait(0.1)
    raise AssertionError(f"batch {batch.id} is still {found.status}")


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_from_upload_to_download(client: openai.OpenAI) -> None:
    lines = chats(40)
    lines[7] = json.dumps(json.loads(lines[7]) | {"body": {**json.loads(lines[7])["body"], "best_of": 4}})
    batch = created(
        client, lines, metadata={"b": "2", "a": "1"}, output_expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert batch.status in ("validating", "in_progress") and batch.expires_at == batch.created_at + 86_400
    done = ended(client, batch)
    assert done.status == "completed" and done.errors is None
    assert done.request_counts is not None and done.usage is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (40, 39, 1)
    assert (done.model, done.metadata) == ("fake", {"a": "1", "b": "2"})
    assert done.created_at <= (done.in_progress_at or 0) <= (done.finalizing_at or 0) <= (done.completed_at or 0)
    good = lines_of(client, done.output_file_id)
    assert [item["custom_id"] for item in good] == [f"r{n}" for n in range(40) if n != 7]
    bad = lines_of(client, done.error_file_id)
    assert [(item["custom_id"], item["response"]["status_code"]) for item in bad] == [("r7", 400)]
    answers = [openai.types.chat.ChatCompletion.model_validate(item["response"]["body"]) for item in good]
    assert all(item["error"] is None for item in good) and all(answer.model == "fake" for answer in answers)
    assert done.usage.total_tokens == sum(answer.usage.total_tokens for answer in answers if answer.usage)
    output = client.files.retrieve(done.output_file_id or "")
    assert (output.purpose, output.status, output.expires_at) == ("batch_output", "processed", output.created_at + 3600)


def test_embeddings(client: openai.OpenAI) -> None:
    lines = [
        json.dumps(
            {"custom_id": f"e{n}", "method": "POST", "url": EMBEDDINGS, "body": {"model": "fake", "input": ["a", "b"]}}
        )
        for n in range(3)
    ]
    done = ended(client, created(client, lines, EMBEDDINGS))
    found = lines_of(client, done.output_file_id)
    for item in found:
        answer = openai.types.CreateEmbeddingResponse.model_validate(item["response"]["body"])
        assert [each.index for each in answer.data] == [0, 1]
    assert done.usage is not None and done.usage.output_tokens == 0 < done.usage.input_tokens


def test_a_malformed_line_fails_the_batch_and_is_named(client: openai.OpenAI) -> None:
    lines = chats(20)
    lines[16] = lines[16][:-1]
    done = ended(client, created(client, lines))
    assert (done.status, done.in_progress_at, done.output_file_id) == ("failed", None, None)
    assert done.errors is not None and done.errors.data is not None
    assert [(item.line, item.code) for item in done.errors.data] == [(17, "invalid_json_line")]


def test_a_cancelled_batch_keeps_what_it_finished(client: openai.OpenAI) -> None:
    lines = chats(200)
    batch = created(client, lines)
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status == "cancelling" and cancelled.cancelling_at
    done = ended(client, batch)
    assert done.status == "cancelled" and client.batches.cancel(batch.id).status == "cancelled"
    good = lines_of(client, done.output_file_id) if done.output_file_id else []
    bad = lines_of(client, done.error_file_id) if done.error_file_id else []
    assert sorted(item["custom_id"] for item in good + bad) == sorted(f"r{n}" for n in range(200))
    assert done.request_counts is not None and done.request_counts.failed == len(bad)
    assert {item["error"]["code"] for item in bad} <= {"batch_cancelled"}


def test_a_batch_that_has_ended_cannot_be_cancelled(client: openai.OpenAI) -> None:
    done = ended(client, created(client, ["{"]))
    with pytest.raises(openai.ConflictError) as refused:
        client.batches.cancel(done.id)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_another_tenant_finds_nothing(client: openai.OpenAI, other: openai.OpenAI) -> None:
    file_id = upload(client, chats(1))
    batch = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    for call in (
        lambda: other.files.retrieve(file_id),
        lambda: other.files.content(file_id),
        lambda: other.files.delete(file_id),
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: other.batches.list(after=batch.id),
        lambda: other.files.list(after=file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert not other.batches.list().data and not other.files.list().data
    theirs = ended(other, other.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h"))
    assert theirs.status == "failed" and theirs.errors is not None and theirs.errors.data is not None
    assert theirs.errors.data[0].param == "file_id"


@pytest.mark.parametrize(
    ("values", "param", "says"),
    [
        ({"endpoint": "/v1/images"}, "endpoint", EMBEDDINGS),
        ({"completion_window": "1h"}, "completion_window", "24h"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "512"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds", "3,600"),
    ],
)
def test_create_refuses_shapes(client: openai.OpenAI, values: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(**{"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h", **values})
    assert (refused.value.code, refused.value.param) == ("invalid_value", param) and says in refused.value.message


def test_a_create_is_idempotent(client: openai.OpenAI) -> None:
    def create(metadata: dict[str, str], **headers: str) -> str:
        return client.batches.create(
            input_file_id="file-x",
            endpoint=CHAT,
            completion_window="24h",
            metadata=metadata,
            extra_headers={name.replace("_", "-"): value for name, value in headers.items()},
        ).id

    first = create({"a": "1", "b": "2"}, idempotency_key="k1")
    assert create({"b": "2", "a": "1"}, idempotency_key="k1") == first
    with pytest.raises(openai.ConflictError):
        create({"a": "2"}, idempotency_key="k1")
    plain = create({"c": "1"})
    assert create({"c": "1"}) != plain
    again = create({"d": "1"})
    assert create({"d": "1"}, x_stainless_retry_count="1") == again


def test_lists_are_paged(client: openai.OpenAI) -> None:
    made = [
        client.batches.create(input_file_id=f"file-{n}", endpoint=CHAT, completion_window="24h").id for n in range(3)
    ]
    page = client.batches.list(limit=2)
    assert [item.id for item in page.data] == made[:0:-1] and page.has_more
    assert [item.id for item in client.batches.list(limit=1, after=page.data[-1].id).data] == made[:1]
    with pytest.raises(openai.NotFoundError):
        client.batches.list(after="batch_none")
    for limit in (0, 101):
        with pytest.raises(openai.BadRequestError):
            client.batches.list(limit=limit)
    uploaded = [upload(client, ["x"]) for _ in range(3)]
    files = client.files.list(limit=2, order="desc", purpose="batch")
    assert [item.id for item in files.data] == uploaded[:0:-1] and files.has_more


def test_files(client: openai.OpenAI) -> None:
    found = client.files.create(file=("../../a/ü.jsonl", io.BytesIO("hällo\n".encode())), purpose="batch")
    assert (found.filename, found.bytes, found.status, found.purpose) == ("ü.jsonl", 7, "processed", "batch")
    assert found.expires_at == found.created_at + 2_592_000
    assert client.files.wait_for_processing(found.id) == found == client.files.retrieve(found.id)
    short = client.files.create(file=b"", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (short.bytes, short.expires_at) == (0, short.created_at + 3600)
    raw = client.files.with_raw_response.content(found.id)
    assert raw.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%BC.jsonl"
    assert raw.headers["content-length"] == "7" and raw.http_response.content == "hällo\n".encode()
    part = client.files.with_raw_response.content(found.id, extra_headers={"Range": "bytes=1-3"})
    assert (part.http_response.status_code, part.http_response.content) == (206, "hällo\n".encode()[1:4])
    assert part.headers["content-range"] == "bytes 1-3/7"
    assert client.files.delete(found.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(found.id)


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("a.csv", b"x", 400),
        ("a.jsonl", b"\xff\xfe", 400),
        ("a.jsonl", b"\xc3", 400),
        ("a.jsonl", b"x" * 1_000_001, 413),
    ],
)
def test_uploads_that_are_refused_leave_nothing(
    server: tuple[str, Any],
    other: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    status: int,
) -> None:
    monkeypatch.setattr(places, "new_id", lambda kind: f"{kind}-refused")
    gateway = server[1]
    with pytest.raises(openai.APIStatusError) as refused:
        other.files.create(file=(name, content), purpose="batch")
    assert refused.value.status_code == status and refused.value.param == "file"
    assert not list(Path(gateway.settings.effective_files_dir).rglob("*refused*"))
    with gateway.database.read() as connection:
        assert connection.execute(sa.select(tables.file).where(tables.file.c.id == "file-refused")).first() is None


def test_a_form_that_ends_too_soon(server: tuple[str, Any], client: openai.OpenAI) -> None:
    headers = {"authorization": f"Bearer {client.api_key}", "content-type": "multipart/form-data; boundary=b"}
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\nhalf'
    answer = httpx.post(f"{server[0]}/v1/files/", headers=headers, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_form")


def test_models(client: openai.OpenAI) -> None:
    assert [item.id for item in client.models.list().data] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "rowmill"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")
