"""Registered models from end to end, on the fake engine: what a name means, and that a job keeps what it meant."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from storage.errors import ActivationRefused, Conflict, InvalidJob, InvalidModel, JobCancelled, NotFound
from storage.queue import jobs
from tests.registry.models import write_model


@pytest.fixture
def client(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(20)]}), tmp_path / "in.parquet")
    with Client(settings=settings.model_copy(update={"cache_dir": tmp_path / "cache"})) as client:
        yield client


def fields(output: str, model: str, **more: Any) -> dict[str, Any]:
    base = {"input": "in.parquet", "task": "embed", "column": "text", "engine": "fake"}
    return {**base, "output": output, "model": model, **more}


def manifest(output: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(output, "_manifest.json").read_bytes())
    return document


def test_a_job_names_a_revision_and_its_manifest_the_same_digest(client: Client, tmp_path: Path) -> None:
    write_model(tmp_path / "files")
    added = client.models.add("encoder", "files", task="embed", alias="prod")
    assert (added.reference, added.state) == ("encoder@1", "draft")
    for output, name in (("one", "encoder@1"), ("two", "encoder@prod")):
        assert client.run(**fields(output, name)).state == "completed"
        model = manifest(output)["model"]
        assert (model["name"], model["digest"]) == ("encoder@1", added.digest)
        assert (model["registered"], model["revision"], model["reports"]) == ("encoder", 1, [])
    with pytest.raises(InvalidModel, match=r"no revision of model encoder is active.*encoder@1"):
        client.run(**fields("three", "encoder"))
    client.models.activate("encoder", force=True)
    assert client.run(**fields("three", "encoder")).state == "completed"
    for name, says in (("encoder@7", "no revision 7"), ("encoder@test", "no alias 'test'")):
        with pytest.raises(InvalidModel, match=says):
            client.run(**fields("four", name))


def test_an_alias_that_moves_during_a_job_leaves_it_one_digest(client: Client, tmp_path: Path) -> None:
    one = client.models.add("encoder", str(write_model(tmp_path / "one")), alias="prod")
    two = client.models.add("encoder", str(write_model(tmp_path / "two", seed=1)))
    assert one.digest != two.digest
    turns = iter([two.reference, one.reference] * 500)
    handle = client.submit(**fields("out", "encoder@prod", shard_rows=1), start=False)
    client.models.set_alias(two.reference, "prod")
    again = client.submit(**fields("other", "encoder@prod"), start=False)
    job = jobs.get(client._runtime.database, handle.id)
    assert job.model is not None and job.model["digest"] == one.digest
    status = client.run(
        **fields("out", "encoder@1", shard_rows=1),
        on_progress=lambda status: client.models.set_alias(next(turns), "prod") and None,
    )
    assert status.id == handle.id and status.state == "completed"
    found = manifest("out")
    assert len(found["parts"]) == 20 and found["model"]["digest"] == one.digest
    assert found["engine"]["key"] == job.engine_key
    again.wait()
    assert manifest("other")["model"]["digest"] == two.digest


def test_a_registered_name_goes_before_a_path_of_that_name(client: Client, tmp_path: Path) -> None:
    inner, outer = write_model(tmp_path / "encoder"), write_model(tmp_path / "registered", seed=1)
    said: list[str] = []
    client.on_notice(said.append)
    path = client.run(**fields("one", "encoder"))  # nothing is registered yet
    assert path.state == "completed" and not said
    added = client.models.add("encoder", str(outer))
    client.models.activate("encoder", force=True)
    client.run(**fields("two", "encoder"))
    assert manifest("two")["model"]["digest"] == added.digest
    assert any("'encoder' is the registered one, encoder@1; the path is './encoder'" in line for line in said)
    client.run(**fields("three", "./encoder"))
    assert manifest("three")["model"]["digest"] == manifest("one")["model"]["digest"] != added.digest
    inner.rename(tmp_path / "encoder@old")
    client.run(**fields("four", "encoder@old"))  # a path may contain "@"
    assert manifest("four")["model"]["digest"] == manifest("one")["model"]["digest"]


def test_a_tenants_own_model_goes_before_the_operators(client: Client, tmp_path: Path) -> None:
    shared = client.models.add("encoder", str(write_model(tmp_path / "one")))
    private = client.models.add("encoder", str(write_model(tmp_path / "two", seed=1)), tenant="blue")
    for tenant, expected in (("blue", private), ("red", shared)):
        client.run(**fields(f"out-{tenant}", "encoder@1", tenant=tenant))
        assert manifest(f"out-{tenant}")["model"]["digest"] == expected.digest
    client.models.add("secret", str(tmp_path / "two"), tenant="blue")
    with pytest.raises(InvalidModel, match="no model 'secret@1'"):
        client.run(**fields("out", "secret@1", tenant="red"))
    assert {item.model.tenant for item in client.models.list("red")} == {None}
    with pytest.raises(NotFound):
        client.models.get("secret")


def test_every_flipped_byte_is_refused_by_name(client: Client, tmp_path: Path) -> None:
    root = write_model(tmp_path / "files")
    client.models.add("encoder", str(root))
    models = [path for path in sorted(root.rglob("*")) if path.is_file()]
    assert len(models) == 7
    random.seed(17)
    for n in range(100):
        path = models[n % len(models)]
        content = path.read_bytes()
        at = random.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :])
        with pytest.raises(InvalidModel, match=str(path)):
            client.models.path("encoder")
        path.write_bytes(content)
    assert client.models.path("encoder") == str(root)
    (root / "extra.json").write_text("{}")
    with pytest.raises(InvalidModel, match=r"not registered: extra\.json"):
        client.models.activate("encoder", force=True)
    (root / "extra.json").unlink()
    models[0].unlink()
    with pytest.raises(InvalidModel, match=f"{models[0]}.* is missing"):
        client.run(**fields("out", "encoder@1"))


def test_a_change_between_submit_and_run_fails_the_job(client: Client, tmp_path: Path) -> None:
    root = write_model(tmp_path / "files")
    client.models.add("encoder", str(root))
    handle = client.submit(**fields("out", "encoder@1"), start=False)
    (root / "model.safetensors").write_text("other weights!!!")
    with pytest.raises(Exception, match=r"model\.safetensors"):
        client.run(**fields("out", "encoder@1"))
    status = client.job(handle.id).status()
    assert status.state != "completed" and not Path("out", "_SUCCESS").exists()


def test_what_is_not_fit_to_be_registered(client: Client, tmp_path: Path) -> None:
    write_model(tmp_path / "files")
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"name": "a/b", "path": "files"}, "NAME"),
        ({"name": "a", "path": "nothing"}, "no model"),
        ({"name": "a", "path": "files", "task": "sing"}, "no task"),
        ({"name": "a", "path": "files", "alias": "7"}, "alias"),
        ({"name": "a", "path": "files", "tenant": ""}, "tenant"),
        ({"name": "a", "path": "s3://key:secret@bucket/x"}, "password"),
    ]
    for arguments, says in refusals:
        with pytest.raises(InvalidJob, match=says):
            client.models.add(**arguments)
    assert client.models.list() == []
    with pytest.raises(NotFound):
        client.models.history("a")


def test_removing_spares_what_is_active_or_used(client: Client, tmp_path: Path) -> None:
    client.models.add("encoder", str(write_model(tmp_path / "one")))
    client.models.add("encoder", str(write_model(tmp_path / "two", seed=1)))
    client.models.activate("encoder@2", force=True)
    with pytest.raises(Conflict, match="encoder@2 is active"):
        client.models.remove("encoder")
    assert len(client.models.revisions("encoder")) == 2
    handle = client.submit(**fields("out", "encoder@1"), start=False)
    with pytest.raises(Conflict, match=f"job {handle.id} uses encoder@1"):
        client.models.remove("encoder@1")
    handle.cancel()
    with pytest.raises(JobCancelled):
        handle.wait()
    assert [item.reference for item in client.models.remove("encoder@1")] == ["encoder@1"]
    with pytest.raises(ActivationRefused, match="nothing to go back to"):
        client.models.rollback("encoder")


def test_the_fake_model_can_be_registered(client: Client) -> None:
    added = client.models.add("pretend", "fake")
    client.models.activate("pretend", force=True)
    client.run(**fields("out", "pretend"))
    assert manifest("out")["model"]["digest"] == added.digest


def test_a_schedule_resolves_the_name_at_each_fire(client: Client, tmp_path: Path) -> None:
    one = client.models.add("encoder", str(write_model(tmp_path / "one")), alias="prod")
    two = client.models.add("encoder", str(write_model(tmp_path / "two", seed=1)))
    (tmp_path / "encoder@prod").mkdir()  # a path of that name changes nothing
    job = fields("out-{fire_date:%Y%m%dT%H%M}", "encoder@prod")
    stored = client.schedules.add("daily", cron="0 12 * * *", job={**job, "input": ["in.parquet"]})
    assert stored.spec["model"] == "encoder@prod"
    found = []
    for revision in (one, two):
        client.models.set_alias(revision.reference, "prod")
        fire = {**stored.spec, "output": f"out-{revision.number}"}
        assert client.run(**fire).state == "completed"
        found.append(manifest(f"out-{revision.number}")["model"]["digest"])
    assert found == [one.digest, two.digest]
