"""Two databases and one output: the output itself says which job it belongs to, and no rows are replaced in silence."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.jobs.plan import plan_job
from pipeline.jobs.submit import submit_job
from pipeline.output import owner as output_owner
from storage import failpoints, locations
from storage.errors import Conflict, InvalidInput, InvalidJob, JobFailed
from storage.queue import jobs
from storage.states import JobState
from tests.conftest import S3
from tests.faults.driver import wait_until
from tests.storage.objects.faulty_s3 import IGNORE, Faults, proxy

Make = Callable[..., Client]


@pytest.fixture
def client_of(tmp_path: Path, cache_dir: Path) -> Iterator[Make]:
    """A client whose jobs are in the database of that name."""
    made: list[Client] = []

    def make(name: str, **more: Any) -> Client:
        settings = Settings(data_dir=tmp_path / name, cache_dir=cache_dir, **more)
        made.append(Client(settings=settings))
        return made[-1]

    yield make
    failpoints.disarm()
    for client in made:
        client.close()


@pytest.fixture
def mine(client_of: Make) -> Client:
    return client_of("mine", flush_rows=20)  # so that there are part files


@pytest.fixture
def theirs(client_of: Make) -> Client:
    return client_of("theirs", flush_rows=20)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"id": range(100), "text": [f"text {n}" for n in range(100)]}), path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def fields(texts: Path, out: object, prompt: str = "Mine: {text}", **more: Any) -> dict[str, Any]:
    base = {"input": str(texts), "output": str(out), "model": "fake", "task": "generate", "prompt": prompt}
    return base | more


def whose(out: Path) -> set[str]:
    """Of whom the published rows are: the first words of the prompts that the fake engine answers with."""
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((out / "data").glob("*.parquet"))])
    assert rows.column("id").to_pylist() == list(range(100))
    [word] = {name for name in ("Mine", "Theirs") if all(name in text for text in rows.column("output").to_pylist())}
    return {word}


def owner(out: Path) -> str | None:
    path = Path(locations.owner(str(out)))
    return json.loads(path.read_text())["job"] if path.exists() else None


def test_a_live_job_of_another_database_keeps_its_output(
    mine: Client, theirs: Client, texts: Path, out: Path, tmp_path: Path
) -> None:
    job = mine.submit(start=False, **fields(texts, out))
    assert owner(out) == job.id
    with pytest.raises(Conflict) as refused:
        theirs.run(**fields(texts, out, "Theirs: {text}"))
    assert all(part in str(refused.value) for part in (str(out), job.id, str(tmp_path / "mine"), "overwrite"))
    assert theirs.jobs() == []
    assert mine.run(**fields(texts, out)).id == job.id  # the same job goes on
    assert whose(out) == {"Mine"}
    assert not (out / ".rowmill").exists()


@pytest.mark.parametrize("name", ["out/", "./out", "link", "link/../out", "file"])
def test_an_output_has_one_owner_whatever_it_is_called(
    mine: Client, theirs: Client, texts: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    mine.submit(start=False, **fields(texts, out))
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(Conflict, match="another database"):
        theirs.run(**fields(texts, f"file://{out}" if name == "file" else name))


def test_a_link_that_leads_nowhere_holds_up_nobody(mine: Client, texts: Path, out: Path) -> None:
    """A put finds it, and a read does not."""
    owner_file = Path(locations.owner(str(out)))
    owner_file.parent.mkdir(parents=True)
    owner_file.symlink_to("nowhere")
    with pytest.raises(Conflict, match=r"owner\.json is there and cannot be read.*delete it"):
        mine.run(**fields(texts, out))
    owner_file.unlink()
    mine.run(**fields(texts, out))
    assert whose(out) == {"Mine"}


def test_one_database_knows_its_job_by_another_name(mine: Client, texts: Path, out: Path, tmp_path: Path) -> None:
    job = mine.submit(start=False, **fields(texts, out))
    (tmp_path / "link").symlink_to(out)
    for overwrite in (False, True):
        with pytest.raises(Conflict, match=f"{job.id}.* which calls it {out}"):
            mine.run(**fields(texts, tmp_path / "link", overwrite=overwrite))
    mine.run(**fields(texts, out))
    assert whose(out) == {"Mine"}


def test_on_an_object_store(client_of: Make, s3: S3, texts: Path) -> None:
    options = {"storage_options": dict.fromkeys(("s3", "s3a"), s3.storage_options["s3"])}
    mine, theirs = client_of("mine", **options), client_of("theirs", **options)
    mine.submit(start=False, **fields(texts, s3.url("out")))
    for url in (s3.url("out/"), s3.url("out").replace("s3://", "s3a://")):
        with pytest.raises(Conflict, match="another database"):
            theirs.run(**fields(texts, url))
    assert mine.run(**fields(texts, s3.url("out"))).state is JobState.COMPLETED
    names = mine._runtime.store.list_tree(s3.url("out"))
    assert sorted(name.removeprefix(s3.url("out/")) for name in names) == [
        "_SUCCESS", "_manifest.json", "data/part-00000.parquet",
    ]  # fmt: skip


def test_of_two_at_the_same_moment_one_is_refused(mine: Client, theirs: Client, texts: Path, out: Path) -> None:
    both = threading.Barrier(2, timeout=60)
    failpoints.arm("submit.inserted", both.wait)
    found: dict[str, object] = {}

    def submit(name: str, client: Client) -> None:
        try:
            found[name] = client.submit(start=False, **fields(texts, out, f"{name}: {{text}}")).id
        except Conflict as error:
            found[name] = error

    threads = [threading.Thread(target=submit, args=item) for item in (("Mine", mine), ("Theirs", theirs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failpoints.disarm()
    [winner] = [name for name, what in found.items() if isinstance(what, str)]
    client, other = (mine, theirs) if winner == "Mine" else (theirs, mine)
    assert owner(out) == found[winner]
    assert [job.state for job in other.jobs()] == [JobState.FAILED]
    client.run(**fields(texts, out, f"{winner}: {{text}}"))
    assert whose(out) == {winner}


def test_a_whole_job_between_the_look_and_the_claim(mine: Client, theirs: Client, texts: Path, out: Path) -> None:
    """Nobody owns the output any more when this one comes to own it, but there are rows now."""

    def come_and_go() -> None:
        failpoints.disarm()
        theirs.run(**fields(texts, out, "Theirs: {text}"))

    failpoints.arm("plan.prepared", come_and_go)
    with pytest.raises(Conflict, match=r"holds the rows of job .* by now"):
        mine.run(**fields(texts, out))
    assert whose(out) == {"Theirs"}
    assert owner(out) is None


class Killed(BaseException):
    pass


def die() -> None:
    raise Killed


def test_killed_before_the_output_knew(mine: Client, texts: Path, out: Path) -> None:
    failpoints.arm("submit.inserted", die)
    with pytest.raises(Killed):
        mine.run(**fields(texts, out))
    failpoints.disarm()
    [job] = mine.jobs()
    assert owner(out) is None
    assert mine.run(**fields(texts, out)).id == job.id
    assert whose(out) == {"Mine"}


def test_killed_before_the_job_ended(mine: Client, theirs: Client, texts: Path, out: Path) -> None:
    """An owner that has ended in this database stands in nobody's way here."""
    job = mine.submit(start=False, **fields(texts, out))
    left = Path(locations.owner(str(out))).read_bytes()
    assert job.cancel().state is JobState.CANCELLED
    assert owner(out) is None
    Path(locations.owner(str(out))).parent.mkdir(exist_ok=True)
    Path(locations.owner(str(out))).write_bytes(left)
    with pytest.raises(Conflict, match="another database"):
        theirs.run(**fields(texts, out))
    assert mine.run(**fields(texts, out)).state is JobState.COMPLETED
    assert owner(out) is None


def test_an_owner_file_that_went_missing_is_put_again(mine: Client, theirs: Client, texts: Path, out: Path) -> None:
    job = mine.submit(start=False, **fields(texts, out))
    Path(locations.owner(str(out))).unlink()
    seen: list[str | None] = []
    failpoints.arm("flush.stored", lambda: seen.append(owner(out)))
    mine.run(**fields(texts, out))
    assert seen == [job.id]


def test_a_damaged_owner_file_stands_in_the_way_until_it_is_overwritten(mine: Client, texts: Path, out: Path) -> None:
    path = Path(locations.owner(str(out)))
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(Conflict, match="is damaged"):
        mine.run(**fields(texts, out))
    mine.run(**fields(texts, out, overwrite=True))
    assert whose(out) == {"Mine"}


@pytest.mark.parametrize("end", ["completed", "cancelled", "unplannable"])
def test_a_job_that_has_ended_owns_nothing(mine: Client, theirs: Client, texts: Path, out: Path, end: str) -> None:
    if end == "completed":
        mine.run(**fields(texts, out))
    elif end == "cancelled":
        mine.submit(start=False, **fields(texts, out)).cancel()
    else:
        runtime = mine._runtime
        job = submit_job(runtime, fields(texts, out))
        texts.rename(texts.with_suffix(".away"))
        with pytest.raises(InvalidInput):
            plan_job(runtime, job)
        texts.with_suffix(".away").rename(texts)
        assert jobs.get(runtime.database, job.id).state is JobState.FAILED
    assert owner(out) is None
    theirs.run(**fields(texts, out, "Theirs: {text}", overwrite=end == "completed"))
    assert whose(out) == {"Theirs"}


POINTS = [
    "claim.taken", "flush.stored", "commit.assembled", "finalize.publishing", "finalize.part", "finalize.manifest",
    "finalize.put", "finalize.success",
]  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
def test_overwrite_takes_the_output_and_the_first_job_notices(
    mine: Client, theirs: Client, texts: Path, out: Path, point: str
) -> None:
    """Whatever the first job was at, it fails without touching what the second one has published."""

    def overtake() -> None:
        failpoints.disarm()
        theirs.run(**fields(texts, out, "Theirs: {text}", overwrite=True))

    failpoints.arm(point, overtake)
    status = mine.run(**fields(texts, out, shard_rows=50))
    [other] = theirs.jobs()
    assert status.state is JobState.FAILED
    assert str(out) in str(status.error) and other.id in str(status.error)
    assert json.loads((out / "_manifest.json").read_text())["job"]["id"] == other.id
    assert (out / "_SUCCESS").exists()
    assert whose(out) == {"Theirs"}
    with pytest.raises(Conflict, match=str(out)):
        mine.job(status.id).retry()


def test_the_first_job_fails_while_the_second_one_still_has_the_output(
    mine: Client, theirs: Client, texts: Path, out: Path
) -> None:
    job = mine.submit(start=False, **fields(texts, out))
    other = theirs.submit(start=False, **fields(texts, out, "Theirs: {text}", overwrite=True))
    with pytest.raises(JobFailed, match=f"{out} belongs to job {other.id} of another database"):
        job.wait()
    with pytest.raises(Conflict, match=f"{out} belongs to job {other.id} of another database"):
        job.retry()
    other.cancel()
    job.retry()
    job.wait()
    assert whose(out) == {"Mine"}


def test_a_retry_owns_the_output_again(mine: Client, theirs: Client, texts: Path, out: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = mine.submit(**fields(texts, out, engine_options={"gate_file": str(gate)}))
    wait_until(lambda: job.status().state is JobState.IN_PROGRESS, "a running job")
    job.cancel()
    wait_until(lambda: job.status().terminal, "its end")
    job.retry()
    with pytest.raises(Conflict, match="another database"):
        theirs.run(**fields(texts, out))
    gate.touch()
    job.wait()
    assert whose(out) == {"Mine"}


def test_overwrite_of_the_live_job_takes_its_output_back(mine: Client, theirs: Client, texts: Path, out: Path) -> None:
    job = mine.submit(start=False, **fields(texts, out))
    other = theirs.submit(start=False, **fields(texts, out, "Theirs: {text}", overwrite=True))
    assert mine.run(**fields(texts, out, overwrite=True)).id == job.id
    with pytest.raises(JobFailed, match=job.id):
        other.wait()
    assert whose(out) == {"Mine"}


@pytest.mark.parametrize("inner", ["data", "data/more", ".rowmill/x"])
@pytest.mark.parametrize("ended", [False, True])
def test_no_output_lies_among_the_files_of_another(
    mine: Client, theirs: Client, texts: Path, out: Path, inner: str, ended: bool
) -> None:
    mine.submit(start=False, **fields(texts, out))
    if ended:
        mine.run(**fields(texts, out))
    with pytest.raises(Conflict, match=f"among the files of the output {out}"):
        theirs.run(**fields(texts, out / inner, overwrite=True))


REFUSALS: list[tuple[str, Callable[[Faults], object]]] = [
    ("If-None-Match", lambda faults: setattr(faults, "conditional", IGNORE)),
    ("If-None-Match", lambda faults: setattr(faults, "conditional", 501)),
    ("s3:DeleteObject", lambda faults: setattr(faults, "script", lambda m, path: 403 if m == "DELETE" else None)),
    ("s3:ListBucket", lambda faults: setattr(faults, "script", lambda m, path: 403 if "list-type" in path else None)),
]


@pytest.mark.parametrize(("right", "refuse"), REFUSALS, ids=["ignored", "unknown", "delete", "list"])
def test_a_store_that_could_not_hold_the_output_is_refused_before_anything_is_computed(
    client_of: Make, s3: S3, texts: Path, tmp_path: Path, right: str, refuse: Callable[[Faults], object]
) -> None:
    with proxy(s3.endpoint) as faults:
        client = client_of("mine", storage_options=replace(s3, endpoint=faults.endpoint).storage_options)
        refuse(faults)
        rows = {"rows_file": str(tmp_path / "rows")}
        with pytest.raises(InvalidJob, match=right):
            client.run(**fields(texts, s3.url("out"), engine_options=rows))
        assert not (tmp_path / "rows").exists()
        assert client.jobs() == []


def test_in_a_fleet_the_planner_finds_out(client_of: Make, s3: S3, texts: Path) -> None:
    """The client may not have the workers' rights: what it cannot do is left to them."""
    with proxy(s3.endpoint) as faults:
        options = replace(s3, endpoint=faults.endpoint).storage_options
        # The broker is never asked.
        runtime = client_of("fleet", storage_options=options, broker_url="redis://127.0.0.1:1/0")._runtime
        faults.conditional = 403
        job = submit_job(runtime, fields(texts, s3.url("out")))
        with pytest.raises(InvalidJob, match=r"conditional put below .* failed"):
            plan_job(runtime, job)
        assert jobs.get(runtime.database, job.id).state is JobState.FAILED
        job = submit_job(runtime, fields(texts, s3.url("out")))
        faults.conditional = None
        assert plan_job(runtime, job).state is JobState.QUEUED
        assert output_owner.read(runtime.store, s3.url("out")) is not None
