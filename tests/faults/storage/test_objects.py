"""Faults 20 to 22: a full disk, an object store that fails, files that are not what was written."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import s3fs

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.worker import maintenance
from pipeline.worker.worker import Worker
from storage import failpoints, locations
from storage.objects import local_files
from storage.objects.new_file import NewLocalFile, Written
from storage.objects.store import ObjectStore
from storage.queue import jobs, publish_leases
from storage.states import AttemptState, JobState
from tests.conftest import S3
from tests.faults.driver import KILLED, World, wait_until
from tests.faults.sabotage import sabotaged, work
from tests.storage.objects.faulty_s3 import CUT, CUT_AFTER, Faults, proxy


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm()


def files(world: World) -> list[str]:
    """Everything below the output, hidden and temporary files too; not what says whose the output is."""
    owner = Path(locations.owner(str(world.output)))
    paths = [path for path in world.output.rglob("*") if path.is_file() and path != owner]
    return sorted(str(path.relative_to(world.output)) for path in paths)


def part_names(world: World) -> list[str]:
    """The part files that the database knows of, as :func:`files` names them."""
    return sorted(str(Path(row.uri).relative_to(world.output)) for row in world.rows("part_file"))


# -- 20: no space left


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """So many times, what is written under this name goes to a device that is full."""
    opened = local_files.open_temporary
    left = times

    def open_temporary(target: Path) -> tuple[IO[bytes], Path]:
        nonlocal left
        if target.name != name or not left:
            return opened(target)
        left -= 1
        local_files.make_dirs(target.parent)
        temporary = target.with_name(f".{target.name}.full.tmp")
        temporary.symlink_to("/dev/full")
        return temporary.open("wb"), temporary

    monkeypatch.setattr(local_files, "open_temporary", open_temporary)


@pytest.mark.parametrize("name", ["part-00001.parquet", "output.parquet"])
def test_20_the_disk_is_full(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Fault 20: the attempt failed, with no part row and no file; when there is space again, nothing is recomputed."""
    job = world.submit()
    full_disk(monkeypatch, name, times=1)
    seen: list[tuple[list[str], list[str]]] = []

    def look() -> None:
        seen.append((files(world), part_names(world)))

    failpoints.arm("claim.taken", look)
    work(world, job)
    failed, winner = world.attempts(job)
    assert failed.state is AttemptState.FAILED
    assert "no space left to write" in (failed.error or "")
    assert winner.rows_resumed == failed.rows_computed == (10 if name.startswith("part") else 200)
    # When the second attempt began, exactly the parts that the database knows of were there, and nothing published.
    on_disk, known = seen[1]
    assert on_disk == known
    assert len(known) == failed.rows_computed / 10
    world.check(job)


def test_20_the_disk_stays_full(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: the budget of failures is spent. The job says why, nothing is published; a retry ends it."""
    world.replace_settings(max_failures=2)
    job = world.submit()
    full_disk(monkeypatch, "output.parquet", times=3)
    work(world, job)
    ended = world.job(job)
    assert ended.state is JobState.FAILED
    assert "no space left to write" in (ended.error or "")
    assert not (world.output / "_SUCCESS").exists()
    world.client.job(job).retry()
    work(world, job)
    world.check(job)


def test_20_a_file_is_cut_off_while_it_is_written(world: World) -> None:
    """Fault 20: the kernel takes some bytes of a file and refuses the rest. The attempt failed, without a trace."""
    job = world.submit()
    process = sabotaged(world, {"file_limit": ["part-00001.parquet", 1000]}, arm={"claim.taken": "stop@2"})
    wait_until(process.stopped, "the second attempt")
    assert files(world) == part_names(world)
    assert len(files(world)) == 1
    process.signal(signal.SIGCONT)
    world.wait(job, JobState.COMPLETED)
    failed, winner = world.attempts(job)
    assert (failed.state, failed.rows_computed) == (AttemptState.FAILED, 10)
    assert "part-00001.parquet: File too large" in (failed.error or "")
    assert winner.rows_resumed == 10
    world.check(job)


# -- 21: the object store fails


@pytest.fixture
def faults(s3: S3) -> Iterator[Faults]:
    with proxy(s3.endpoint) as running:
        yield running


@pytest.fixture
def bucket(s3: S3) -> s3fs.S3FileSystem:
    """The store itself, past the faults."""
    return s3fs.S3FileSystem(**s3.storage_options["s3"], use_listings_cache=False, skip_instance_cache=True)


@pytest.fixture
def shaky(settings: Settings, s3: S3, faults: Faults) -> Settings:
    options = replace(s3, endpoint=faults.endpoint).storage_options
    return settings.model_copy(update={"storage_options": options, "flush_rows": 50, "read_batch_rows": 25})


def wide_input(path: Path, megabytes: int = 0) -> dict[str, Any]:
    """A job over 100 rows, with so much random ballast in a column that is kept."""
    texts = [f"text {n}" for n in range(100)]
    ballast = [os.urandom(megabytes * 10_000) for _ in range(100)]
    pq.write_table(pa.table({"id": range(100), "text": texts, "ballast": ballast}), path)
    return {"input": str(path), "model": "fake", "task": "generate", "prompt": "{text}", "shard_rows": 100}


def objects(bucket: s3fs.S3FileSystem, s3: S3, prefix: str) -> list[str]:
    return sorted(name.removeprefix(f"{s3.bucket}/{prefix}/") for name in bucket.find(f"{s3.bucket}/{prefix}"))


def check(bucket: s3fs.S3FileSystem, s3: S3, prefix: str) -> None:
    """One object of each, the rows in order, and no upload left open."""
    assert objects(bucket, s3, prefix) == ["_SUCCESS", "_manifest.json", "data/part-00000.parquet"]
    table = ds.dataset(f"{s3.bucket}/{prefix}/data", filesystem=bucket, format="parquet").to_table()
    assert table.column("id").to_pylist() == list(range(100))
    answers: list[Any] = table.column("output").to_pylist()
    assert [text.rpartition(" ")[2] for text in answers] == [str(n) for n in range(100)]
    assert bucket.list_multipart_uploads(s3.bucket) == []


@pytest.mark.parametrize("status", [503, 409, CUT_AFTER])
def test_21_an_upload_fails_in_passing(
    shaky: Settings, s3: S3, bucket: s3fs.S3FileSystem, faults: Faults, tmp_path: Path, status: int
) -> None:
    """Fault 21: the first try at every object fails, or its answer is lost. Retried there: no attempt is spent."""
    tried: set[str] = set()

    def first_put_of_each(method: str, path: str) -> int | None:
        path = path.partition("?")[0]
        if method != "PUT" or path in tried:
            return None
        tried.add(path)
        return status

    faults.script = first_put_of_each
    with Client(settings=shaky) as client:
        done = client.run(**wide_input(tmp_path / "in.parquet"), output=s3.url("out"))
    assert (done.state, done.rows_done, done.attempts, done.failures) == (JobState.COMPLETED, 100, 1, 0)
    assert faults.injected == len(tried)
    assert {path.rpartition("/")[2] for path in tried} >= {
        "part-00000.parquet", "part-00001.parquet", "output.parquet", "_manifest.json", "_SUCCESS"
    }  # fmt: skip
    check(bucket, s3, "out")


def test_21_the_second_piece_of_an_upload_fails(
    shaky: Settings,
    s3: S3,
    bucket: s3fs.S3FileSystem,
    faults: Faults,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault 21, mid-upload: a large file goes in pieces, and one of them is refused. Begun again; one object."""
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: 5 * 2**20)
    refused = 0

    def second_piece(method: str, path: str) -> int | None:
        nonlocal refused
        if method != "PUT" or "partNumber=2" not in path or refused == 3:
            return None
        refused += 1
        return 503

    faults.script = second_piece
    with Client(settings=shaky) as client:
        done = client.run(**wide_input(tmp_path / "in.parquet", megabytes=12), output=s3.url("out"))
    assert (done.state, done.attempts, done.failures) == (JobState.COMPLETED, 1, 0)
    assert faults.injected == 3
    check(bucket, s3, "out")


def test_21_killed_in_the_middle_of_an_upload(
    shaky: Settings, s3: S3, bucket: s3fs.S3FileSystem, faults: Faults, tmp_path: Path
) -> None:
    """Fault 21, and the process dies mid-upload: there is no object, until the next run has uploaded it whole."""
    world = World(shaky, tmp_path)
    fields = wide_input(tmp_path / "wide.parquet", megabytes=12) | {"output": s3.url("out")}
    process = sabotaged(world, {"small_uploads": []}, run=fields)

    def kill(method: str, path: str) -> int | None:
        if method == "PUT" and "partNumber=2" in path and process.running():
            process.kill()
            return CUT
        return None

    faults.script = kill
    assert process.join() == -signal.SIGKILL
    assert not any(name.endswith("output.parquet") for name in objects(bucket, s3, "out"))
    faults.script = lambda method, path: None
    with Client(settings=shaky) as client:
        done = client.run(**fields)
    assert (done.state, done.losses, done.rows_resumed) == (JobState.COMPLETED, 1, 100)
    # What the dead process left open is not an object; the bucket's lifecycle rule ends it.
    for upload in bucket.list_multipart_uploads(s3.bucket):
        bucket.call_s3("abort_multipart_upload", Bucket=s3.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    check(bucket, s3, "out")


def test_21_412_says_that_it_is_there(s3: S3, bucket: s3fs.S3FileSystem, faults: Faults) -> None:
    """Fault 21: a conditional put is refused with 412 because the object is there: it stands, and there is one."""
    store = ObjectStore(replace(s3, endpoint=faults.endpoint).storage_options, retry_seconds=20.0)
    faults.next(409, method="PUT", times=2)  # two conditional writers at once: S3 asks to try again
    store.put_bytes(s3.url("out/_manifest.json"), b"first", if_absent=True)
    assert faults.injected == 2
    with pytest.raises(FileExistsError):
        store.put_bytes(s3.url("out/_manifest.json"), b"second", if_absent=True)
    faults.next(412, method="PUT")
    with pytest.raises(FileExistsError):
        store.put_bytes(s3.url("out/_manifest.json"), b"third", if_absent=True)
    assert objects(bucket, s3, "out") == ["_manifest.json"]
    assert bucket.cat_file(f"{s3.bucket}/out/_manifest.json") == b"first"


# -- 22: a file is not what was written


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


Damage = Callable[[Path], None]


@pytest.mark.parametrize("damage", [truncate, flip])
@pytest.mark.parametrize("name", ["part-00001.parquet", "output.parquet"])
def test_22_a_file_is_damaged_on_its_way_to_the_disk(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, damage: Damage
) -> None:
    """Fault 22: what was stored is read again before it counts: no part row, no commit; the next attempt is whole."""
    job = world.submit()
    publish = NewLocalFile._publish
    damaged: list[Path] = []

    def torn(self: NewLocalFile) -> Written:
        written = publish(self)
        if Path(self.uri).name == name and not damaged:
            damaged.append(Path(self.uri))
            damage(damaged[0])
        return written

    monkeypatch.setattr(NewLocalFile, "_publish", torn)
    work(world, job)
    failed, winner = world.attempts(job)
    assert failed.state is AttemptState.FAILED
    assert str(damaged[0]) in (failed.error or "")
    assert str(damaged[0]) not in [row.uri for row in world.rows("part_file")]
    assert winner.rows_resumed == failed.rows_computed == (10 if name.startswith("part") else 200)
    world.check(job)


# -- 22, later: a file that was durable is damaged or gone


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_22_a_flushed_part_is_damaged_later(world: World, damage: Damage) -> None:
    """Fault 22, after the flush: its rows, and no others, are computed again; all counters are of what stands."""
    job = world.submit()
    assert world.worker(arm={"flush.recorded": "exit@3"}).join() == KILLED
    second = sorted(world.rows("part_file"), key=lambda row: row.seq)[1]
    damage(Path(second.uri))
    world.replace_settings(lease_seconds=0.5)
    world.wait_for_lease_end(job)
    work(world, job)
    lost, failed, winner = world.attempts(job)
    assert (lost.state, failed.state, winner.state) == (AttemptState.LOST, AttemptState.FAILED, AttemptState.SUCCEEDED)
    assert "10 flushed rows have to be computed again" in (failed.error or "")
    assert (winner.rows_resumed, winner.rows_computed) == (190, 10)
    assert world.events(job, "shard.part_lost") == 1
    world.check(job, recomputed=10, forgotten=1)
    ended, [shard] = world.job(job), world.shards(job)
    tokens = world.published().column("prompt_tokens").to_pylist()
    assert ended.tokens["prompt_tokens"] == shard.prompt_tokens == sum(count or 0 for count in tokens)
    assert [row.row_idx for row in world.rows("row_exception")] == [7]


def test_22_a_committed_file_is_lost_before_it_is_published(world: World) -> None:
    """Fault 22, after the commit: the job fails and says why, the rest is published; a retry makes it whole."""
    job = world.submit(shard_rows=100)
    assert world.worker(arm={"finalize.claimed": "exit"}).join() == KILLED
    _, second = world.shards(job)
    [output] = [
        Path(row.uri) for row in world.rows("part_file", shard_id=second.id) if row.uri.endswith("output.parquet")
    ]
    output.unlink()
    world.wait(job, JobState.FINALIZING)
    work(world, job)
    ended = world.job(job)
    assert (ended.state, ended.n_failed_shards, ended.rows_done) == (JobState.FAILED, 1, 100)
    assert str(output) in (ended.error or "")
    assert not (world.output / "_SUCCESS").exists()
    assert world.published().column("id").to_pylist() == list(range(100))
    world.client.job(job).retry()
    work(world, job)
    assert world.job(job).rows_done == 200
    world.check(job, recomputed=101)  # the lost shard, and the row that had failed


@pytest.mark.parametrize("harm", ["unlink", "truncate"])
def test_22_the_file_of_a_later_generation_is_lost(world: World, tmp_path: Path, harm: str) -> None:
    """What the generation before had published stays, and only the rows computed since are computed again."""
    counts = tmp_path / "counts"
    counts.mkdir()
    options = {"die_on": "number 00003", "die_times": 1000, "counts_dir": str(counts)}
    job = world.submit(shard_rows=100, engine_options=options)
    work(world, job)
    assert world.job(job).rows_failed == 2
    (counts / "die").write_bytes(bytes(1000))  # from now on that row is fine
    world.client.job(job).retry()
    assert world.worker(arm={"finalize.claimed": "exit"}).join() == KILLED
    [again] = [shard for shard in world.shards(job) if shard.gen == 1]
    [output] = [
        Path(row.uri) for row in world.rows("part_file", shard_id=again.id) if row.uri.endswith("output.parquet")
    ]
    if harm == "unlink":
        output.unlink()
    else:
        os.truncate(output, 1000)
    world.wait(job, JobState.FINALIZING)
    work(world, job)
    ended = world.job(job)
    assert (ended.state, ended.n_failed_shards, ended.rows_done) == (JobState.FAILED, 1, 198)
    assert world.published().column("id").to_pylist() == list(range(200))
    assert not (world.output / "_SUCCESS").exists()
    world.client.job(job).retry()
    work(world, job)
    world.check(job, recomputed=4, completed=2)  # the two rows that had failed, twice


def test_22_a_lost_file_and_a_late_finalizer(world: World) -> None:
    """A completed output is disturbed, and a file of it is gone: it is not called whole any more, and a retry heals."""
    job = world.submit(shard_rows=100)
    work(world, job)
    [first, _] = sorted((world.output / "data").iterdir())
    first.unlink()
    publish_leases.request_republish(world.database, str(world.output), actor="test")
    other = Worker(world.settings)
    try:
        other.finalize()
    finally:
        other.close()
    ended = world.job(job)
    assert (ended.n_failed_shards, ended.rows_done) == (1, 100)
    assert not (world.output / "_SUCCESS").exists()
    assert world.published().column("id").to_pylist() == list(range(100, 200))
    world.client.job(job).retry()
    work(world, job)
    world.check(job, recomputed=101, completed=2)


def test_garbage_is_collected_while_a_retry_begins(world: World) -> None:
    """The collector has forgotten the part files, a retry starts and flushes: its files are not the collector's."""
    world.replace_settings(broker_url="redis://127.0.0.1:9/0", attempt_retention_hours=0.0)
    job = world.submit()
    assert world.worker(arm={"flush.recorded": "exit@3"}).join() == KILLED
    jobs.request_stop(world.database, job, "cancelled", actor="test")
    world.wait_for_lease_end(job)
    world.reap()
    collector = Worker(world.settings)
    try:
        maintenance.wind_down(collector.runtime)
        collector.finalize()
        assert world.job(job).state is JobState.CANCELLED

        def retry() -> None:
            failpoints.disarm()
            world.client.job(job).retry()
            assert world.worker(arm={"flush.recorded": "exit@2"}).join() == KILLED

        failpoints.arm("garbage.given_up", retry)
        assert maintenance.collect_garbage(collector.runtime) == 1
    finally:
        collector.close()
    assert len(part_names(world)) == 2
    assert part_names(world) == [name for name in files(world) if name.startswith(".rowmill")]
    world.wait_for_lease_end(job)
    work(world, job)
    assert world.attempts(job)[-1].rows_resumed == 20
    world.check(job, recomputed=30, forgotten=3)
