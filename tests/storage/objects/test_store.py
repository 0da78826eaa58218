"""The object store's contract, on local files and on a real S3 endpoint; then what only one of them does."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from storage import locations
from storage.errors import (
    CorruptFile,
    InvalidInput,
    InvalidJob,
    InvalidSettings,
    RowmillError,
    StorageFull,
    Unreachable,
)
from storage.objects import listing, local_files
from storage.objects.errors import explain
from storage.objects.retry import is_transient
from storage.objects.store import ObjectStore
from tests.conftest import S3
from tests.storage.objects.faulty_s3 import CUT, CUT_AFTER, STALL, TRUNCATE, Faults, proxy


@dataclass(frozen=True)
class Place:
    store: ObjectStore
    root: str
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __call__(self, path: str) -> str:
        return f"{self.root}/{path}"

    def put(self, path: str, data: bytes = b"x") -> str:
        self.store.put_bytes(self(path), data)
        return self(path)

    def names(self, pattern: str) -> list[str]:
        return [item.uri.removeprefix(self.root + "/") for item in self.store.find(self(pattern))]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.server), "memory", "elsewhere"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """``elsewhere``: a store that whoever runs the tests names, and gives an empty folder at, such as an emulator."""
    name = uuid.uuid4().hex
    if request.param == "local":
        return Place(ObjectStore(), str(tmp_path))
    if request.param == "memory":
        return Place(ObjectStore(), f"memory://{name}")
    if request.param == "elsewhere":
        if "OBJECTS_URL" not in os.environ:
            pytest.skip("set OBJECTS_URL (and OBJECTS_OPTIONS, as JSON) to a store and an empty folder at it")
        root = f"{os.environ['OBJECTS_URL']}/{name}"
        options = json.loads(os.environ.get("OBJECTS_OPTIONS", "{}"))
        return Place(ObjectStore(options), root, options)
    s3: S3 = request.getfixturevalue("s3")
    return Place(ObjectStore(s3.storage_options), s3.url("top"), s3.storage_options)


# -- the contract


def test_what_is_written_is_read_back(place: Place) -> None:
    data = os.urandom(3_000_000)
    with place.store.create(place("a/b/file.bin")) as file:
        file.write(data[:1000])
        file.write(memoryview(data)[1000:])
        assert not place.store.exists(place("a/b/file.bin"))
    assert file.written.n_bytes == len(data)
    assert file.written.sha256 == hashlib.sha256(data).hexdigest()
    assert place.store.read_bytes(file.written.uri) == data
    info = place.store.info(place("a/b/file.bin"))
    assert (info.n_bytes, info.etag) == (len(data), file.written.etag)
    place.store.verify(file.written)


def test_an_empty_file_is_a_file(place: Place) -> None:
    with place.store.create(place("empty")) as file:
        pass
    assert place.store.info(place("empty")).n_bytes == 0
    place.store.verify(file.written)


def test_a_reader_seeks(place: Place) -> None:
    data = os.urandom(5_000_000)
    uri = place.put("file", data)
    with place.store.open(uri) as file:
        assert file.seek(-10, io.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        file.seek(4_000_000)
        assert file.read(100) == data[4_000_000:4_000_100]
        assert file.tell() == 4_000_100
        file.seek(0)
        assert file.read() == data


def test_pyarrow_writes_and_reads_through_it(place: Place) -> None:
    table = pa.table({"a": range(100_000)})
    with place.store.create(place("t.parquet")) as file:
        pq.write_table(table, file)
    place.store.verify(file.written)
    with place.store.open(place("t.parquet")) as reader:
        assert pq.ParquetFile(reader).read().equals(table)
    filesystem, paths = place.store.arrow_filesystem([place("t.parquet")])
    assert pq.read_table(paths[0], filesystem=filesystem).equals(table)


def test_an_exception_leaves_nothing_behind(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), place.store.create(place("out/file")) as file:
        file.write(b"x" * 20_000_000)
        raise ZeroDivisionError
    gc.collect()
    assert place.store.find(place("out")) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_that_is_never_entered_leaves_nothing_behind(place: Place, tmp_path: Path) -> None:
    place.store.create(place("file")).write(b"data")
    gc.collect()
    assert not place.store.exists(place("file"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_writing_again_replaces(place: Place) -> None:
    before = place.store.info(place.put("f", b"one"))
    after = place.store.info(place.put("f", b"two"))
    assert place.store.read_bytes(place("f")) == b"two"
    assert before.etag != after.etag


def test_keeping_what_is_there(place: Place) -> None:
    with place.store.create(place("f")) as first:
        first.write(b"one")
    with place.store.create(place("f"), on_conflict="keep") as second:
        second.write(b"one")
    assert second.written.etag == first.written.etag


def test_put_if_absent(place: Place) -> None:
    place.store.put_bytes(place("m.json"), b"one", if_absent=True)
    with pytest.raises(FileExistsError):
        place.store.put_bytes(place("m.json"), b"two", if_absent=True)
    assert place.store.read_bytes(place("m.json")) == b"one"


def test_one_of_many_creators_wins(place: Place) -> None:
    start, won = threading.Barrier(8), []

    def create(number: int) -> None:
        start.wait()
        try:
            place.store.put_bytes(place("lock"), str(number).encode(), if_absent=True)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [place.store.read_bytes(place("lock"))] == [str(n).encode() for n in won]


def test_verify_finds_damage(place: Place) -> None:
    with place.store.create(place("f")) as file:
        file.write(b"hello world")
    place.store.put_bytes(place("f"), b"hellO world")
    with pytest.raises(CorruptFile, match="SHA-256"):
        place.store.verify(file.written)
    place.store.put_bytes(place("f"), b"hello")
    with pytest.raises(CorruptFile, match="5 bytes"):
        place.store.verify(file.written)
    place.store.delete([place("f")])
    with pytest.raises(CorruptFile, match="gone"):
        place.store.verify(file.written)


def test_publish_converges(place: Place) -> None:
    with place.store.create(place("work/out")) as file:
        file.write(b"result")
    sha256 = file.written.sha256
    place.put("data/part", b"an older result")
    place.store.publish(place("work/out"), place("data/part"), sha256=sha256)
    place.store.publish(place("work/out"), place("data/part"), sha256=sha256)
    assert place.store.read_bytes(place("data/part")) == b"result"
    place.put("work/out", b"torn")
    place.store.publish(place("work/out"), place("data/part"), sha256=sha256, n_bytes=6)
    assert place.store.read_bytes(place("data/part")) == b"result"
    with pytest.raises(CorruptFile, match="4 bytes long, and 6 were written"):
        place.store.publish(place("work/out"), place("data/other"), sha256=sha256, n_bytes=6)
    place.store.delete_tree(place("work"))
    place.store.publish(place("work/out"), place("data/part"), sha256=sha256)
    assert place.names("**") == ["data/part"]
    with pytest.raises(CorruptFile, match="gone"):
        place.store.publish(place("work/out"), place("data/part"), sha256="0" * 64)
    with pytest.raises(CorruptFile, match="gone"):
        place.store.publish(place("work/out"), place("data/other"), sha256=sha256)


def test_the_source_may_go_once_published(place: Place) -> None:
    place.put("work/out", b"result")
    place.store.publish(place("work/out"), place("new/folder/part"))
    place.put("work/out", b"overwritten")
    assert place.store.read_bytes(place("new/folder/part")) == b"result"


def test_delete_is_content_with_absence(place: Place) -> None:
    place.put("a")
    place.put("b")
    place.store.delete([place("a"), place("b"), place("never/was")])
    place.store.delete([])
    assert place.names("**") == []


def test_delete_tree_keeps_the_neighbours(place: Place) -> None:
    for name in ("job-1/a", "job-1/x/.b", "job-1/_c", "job-10/d", "job-1.txt"):
        place.put(name)
    place.store.delete_tree(place("job-1/"))
    place.store.delete_tree(place("job-1"))
    assert place.names("**") == ["job-1.txt", "job-10/d"]
    place.put("odd[1]*/f")
    place.put("odd1x/f")
    place.store.delete_tree(place("odd[1]*"))
    assert place.names("odd1x") == ["odd1x/f"]
    assert not place.store.exists(place("odd[1]*/f"))


def test_find(place: Place) -> None:
    for name in (
        "d/b.parquet",
        "d/a.parquet",
        "d/year=2024/c.parquet",
        "d/_year=2024/k.parquet",
        "d/_SUCCESS",
        "d/.hidden.parquet",
        "d/_temporary/x.parquet",
        "d/.rowmill/job/y.parquet",
        "d/note.txt",
        "dd/other.parquet",
        "e.parquet/part-0",
    ):
        place.put(name)
    everything = ["d/_year=2024/k.parquet", "d/a.parquet", "d/b.parquet", "d/note.txt", "d/year=2024/c.parquet"]
    assert place.names("d") == everything
    assert place.names("d/") == everything
    assert place.names("d/*.parquet") == ["d/a.parquet", "d/b.parquet"]
    assert place.names("d/**/*.parquet") == [name for name in everything if name.endswith(".parquet")]
    assert place.names("d/[ab].parquet") == ["d/a.parquet", "d/b.parquet"]
    assert place.names("d/year=*/*.parquet") == ["d/year=2024/c.parquet"]
    assert place.names("d/a.parquet") == ["d/a.parquet"]
    assert place.names("*.parquet") == ["e.parquet/part-0"], "a folder that a glob matches stands for what is in it"
    assert place.names("d/_temporary") == ["d/_temporary/x.parquet"], "asked for by name"
    assert place.names("d/_temp*/*") == ["d/_temporary/x.parquet"]
    assert place.names("nothing/*") == place.names("nothing") == []
    with pytest.raises(InvalidInput, match=r"\*\*"):
        place.names("d/a**.parquet")
    info = place.store.find(place("d/a.parquet"))[0]
    assert info == place.store.info(place("d/a.parquet"))


def test_a_name_with_wildcards_is_found_as_it_is(place: Place) -> None:
    place.put("odd [1].parquet")
    assert place.names("odd [1].parquet") == ["odd [1].parquet"]


def test_what_is_not_there(place: Place) -> None:
    assert not place.store.exists(place("none"))
    place.put("folder/file")
    assert not place.store.exists(place("folder"))
    for call in (place.store.info, place.store.open, place.store.read_bytes):
        with pytest.raises(InvalidInput, match="none"):
            call(place("none"))


def test_a_change_by_another_process_is_seen(place: Place) -> None:
    other = ObjectStore(place.options)
    place.put("d/a", b"1")
    before = place.store.find(place("d"))
    other.put_bytes(place("d/b"), b"1")
    other.put_bytes(place("d/a"), b"2")
    after = place.store.find(place("d"))
    assert [item.uri for item in after] == [place("d/a"), place("d/b")]
    assert after[0].etag != before[0].etag == replace(before[0]).etag


# -- local files


@pytest.mark.parametrize("size", [0, 5, 17 * 2**20])
def test_a_streamed_file_is_there_whole_or_not_at_all(place: Place, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    if not place.root.startswith("memory:"):
        monkeypatch.setattr(tempfile, "mkstemp", lambda **values: pytest.fail("spooled to this machine"))
    place.put("a", b"earlier")
    content = b"x" * size
    for target in (place("a"), place("b")):
        with place.store.stream(target) as file:
            file.write(content)
            assert place.store.exists(target) == (target == place("a"))
        assert file.written.n_bytes == size
        place.store.verify(file.written)
    with pytest.raises(ZeroDivisionError), place.store.stream(place("c")) as file:
        file.write(content)
        raise ZeroDivisionError
    given_up = place.store.stream(place("c"))
    given_up.write(content)
    given_up.close()
    assert [item.uri for item in place.store.find(place("*"))] == [place("a"), place("b")]


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(ObjectStore(), str(tmp_path))


def test_plain_paths_and_file_urls_are_one(local: Place) -> None:
    local.put("f", b"x")
    assert local.store.read_bytes("file://" + local("f")) == b"x"
    assert local.store.info("file://" + local("f")).uri == local("f")


def test_a_write_within_the_same_second_changes_the_etag(local: Place) -> None:
    path = Path(local.put("f", b"one"))
    before = local.store.info(str(path)).etag
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert local.store.info(str(path)).etag != before


@pytest.mark.parametrize("at", ["write", "close"])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    local: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def on_a_full_disk(target: Path) -> tuple[IO[bytes], Path]:
        temporary = target.with_name(".temporary")
        temporary.symlink_to("/dev/full")
        return temporary.open("wb"), temporary

    monkeypatch.setattr(local_files, "open_temporary", on_a_full_disk)
    with pytest.raises(StorageFull, match=r"no space left to write .*/f"), local.store.create(local("f")) as file:
        file.write(b"x" * (2**20 if at == "write" else 10))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_through_pyarrow(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_full_disk(target: Path) -> tuple[IO[bytes], Path]:
        temporary = target.with_name(".temporary")
        temporary.symlink_to("/dev/full")
        return temporary.open("wb"), temporary

    monkeypatch.setattr(local_files, "open_temporary", on_a_full_disk)
    table = pa.table({"a": [os.urandom(64)] * 100_000})
    with pytest.raises(StorageFull), local.store.create(local("f")) as file:
        pq.write_table(table, file, use_dictionary=False, compression="none")


def test_a_killed_writer_leaves_no_target(local: Place) -> None:
    script = (
        "import os, signal, sys\n"
        "from storage.objects.store import ObjectStore\n"
        "with ObjectStore().create(sys.argv[1]) as file:\n"
        "    file.write(b'x' * 10_000_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, local("data/part.parquet")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert local.names("**") == []
    assert list(Path(local("data")).glob("*.parquet")) == []


def test_without_hard_links_publishing_copies(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    local.put("work/out", b"result")
    local.store.publish(local("work/out"), local("data/part"))
    local.store.publish(local("work/out"), local("data/part"))
    assert local.store.read_bytes(local("data/part")) == b"result"
    local.store.put_bytes(local("once"), b"1", if_absent=True)
    with pytest.raises(FileExistsError):
        local.store.put_bytes(local("once"), b"2", if_absent=True)
    assert local.names("**") == ["data/part", "once", "work/out"]
    assert [path.name for path in Path(local.root).rglob(".*")] == []


def test_emptied_work_folders_go_with_the_last_tree(local: Place) -> None:
    output = local("out")
    local.put("other/a/f")
    local.store.delete_tree(local("other/a"))
    assert Path(local("other")).is_dir(), "only work folders are tidied away"
    for job in ("a", "b"):
        local.store.put_bytes(locations.work_dir(output, job) + "f", b"x")
    local.store.delete_tree(locations.work_dir(output, "a"))
    assert Path(output, ".rowmill").is_dir()
    local.put("out/.rowmill/b/attempts/x")
    local.store.delete([locations.work_dir(output, "b") + "f"])
    local.store.delete_tree(locations.attempts_dir(output, "b"))
    assert list(Path(output).iterdir()) == []


def test_delete_tree_does_not_follow_links(local: Place) -> None:
    local.put("precious/f")
    Path(local("job")).mkdir()
    Path(local("job/link")).symlink_to(local("precious"))
    local.store.delete_tree(local("job"))
    assert local.store.exists(local("precious/f"))
    with pytest.raises(ValueError, match="root"):
        local.store.delete_tree("/")


def test_links_are_followed_and_rings_are_refused(local: Place) -> None:
    local.put("real/f")
    Path(local("in")).mkdir()
    Path(local("in/linked")).symlink_to(local("real"))
    assert local.names("in") == ["in/linked/f"]
    Path(local("in/ring")).symlink_to(local("in"))
    with pytest.raises(RowmillError, match="contains it"):
        local.names("in")


def test_what_is_deleted_while_it_is_listed(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, since rows would be missing; but not where others delete files all the time."""
    real, listed = os.scandir, listing.local_files_of

    def scandir(folder: str) -> Any:
        if folder == local("in"):
            entries = list(real(folder))
            Path(local("in/sub/c")).unlink(missing_ok=True)
            Path(local("in/sub")).rmdir()
            return nullcontext(entries)
        return real(folder)

    def then_deleted(pattern: str, **more: Any) -> list[str]:
        paths = listed(pattern, **more)
        Path(local("in/b")).unlink()
        return paths

    def names(*, changing: bool) -> list[str]:
        return [item.uri.rpartition("/")[2] for item in local.store.find(local("in"), changing=changing)]

    for owner, name, patch in ((os, "scandir", scandir), (listing, "local_files_of", then_deleted)):
        for changing in (False, True):
            for file in ("in/a", "in/b", "in/sub/c"):
                local.store.delete([local(file)])
                local.put(file)
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, patch)
                if changing:
                    assert names(changing=True) == (["a", "b"] if owner is os else ["a", "c"])
                else:
                    with pytest.raises(InvalidInput, match="does not exist"):
                        names(changing=False)


def test_a_file_in_place_of_a_folder(local: Place) -> None:
    local.put("f")
    assert not local.store.exists(local("f/g"))
    with pytest.raises(InvalidJob, match="cannot write"), local.store.create(local("f/g")):
        pass


# -- errors by type


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), InvalidInput, "permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), InvalidInput, "permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file"), InvalidInput, "does not exist"),
        (OSError(errno.EDQUOT, "Quota exceeded"), StorageFull, "no space"),
        (OSError(errno.EIO, "Input/output error"), RowmillError, "Input/output error"),
    ],
)
def test_errors_name_the_object(error: OSError, kind: type[RowmillError], text: str) -> None:
    ours = explain("s3://b/k", error)
    assert type(ours) is kind
    assert "s3://b/k" in str(ours) and text in str(ours)


def test_a_bug_is_not_explained_away() -> None:
    assert explain("f", TypeError("bug")) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.ENOENT, errno.EINVAL])
def test_lasting_errors_are_not_retried(number: int) -> None:
    assert not is_transient(OSError(number, "timeout, 503 Slow Down, connection reset"))


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(), OSError(errno.EHOSTUNREACH, "x")])
def test_passing_errors_are_retried(error: OSError) -> None:
    assert is_transient(error)
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = error
    assert is_transient(wrapped)


def test_unknown_and_uninstalled_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidJob, match="gopher"):
        ObjectStore().exists("gopher://host/file")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InvalidJob, match=r"rowmill\[gcs\]"):
        ObjectStore().exists("gs://bucket/file")


def test_options_that_the_client_does_not_know_are_named() -> None:
    with pytest.raises(InvalidSettings, match=r"storage_options\.s3: .*'kye'"):
        ObjectStore({"s3": {"kye": "a"}}).exists("s3://bucket/file")


@pytest.mark.parametrize("pattern", ["closed/f", "closed/*.parquet", "**/*.parquet", "", "closed"])
def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(
    local: Place, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """Tests may run as root, whom nothing is forbidden: the system calls refuse as they would anybody else."""
    local.put("closed/f")
    scandir, look = os.scandir, os.stat

    def refused(path: Any) -> PermissionError | None:
        path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        return PermissionError(errno.EACCES, "Permission denied", path) if local("closed") in str(path) else None

    def guarded_scandir(path: Any = ".") -> Any:
        if error := refused(path):
            raise error
        return scandir(path)

    def guarded_stat(path: Any, **options: Any) -> os.stat_result:
        if not str(path).endswith("closed") and (error := refused(path)):
            raise error
        return look(path, **options)

    monkeypatch.setattr(os, "scandir", guarded_scandir)
    monkeypatch.setattr(os, "stat", guarded_stat)
    with pytest.raises(InvalidInput, match="permission denied"):
        local.store.find(local(pattern))


# -- a failing S3


@pytest.fixture
def faults(s3: S3) -> Iterator[Faults]:
    with proxy(s3.endpoint) as running:
        yield running


@pytest.fixture
def shaky(s3: S3, faults: Faults) -> Place:
    options = replace(s3, endpoint=faults.endpoint).storage_options
    return Place(ObjectStore(options, retry_seconds=20.0), s3.url("top"))


@pytest.mark.parametrize("status", [503, 500, 429, CUT])
def test_a_passing_fault_is_retried(shaky: Place, faults: Faults, status: int) -> None:
    faults.next(status, method="PUT", times=2)
    with shaky.store.create(shaky("f")) as file:
        file.write(b"data" * 1000)
    assert faults.injected == 2
    faults.next(status, method="HEAD", times=2)
    assert shaky.store.info(shaky("f")).n_bytes == 4000
    faults.next(status, method="GET", times=2)
    shaky.store.verify(file.written)
    assert faults.injected == 6


def test_a_fault_in_the_middle_of_reading_is_retried(shaky: Place, faults: Faults) -> None:
    table = pa.table({"a": [os.urandom(1000) for _ in range(10_000)]})
    with shaky.store.create(shaky("t.parquet")) as file:
        pq.write_table(table, file, row_group_size=1000)
    with shaky.store.open(shaky("t.parquet")) as reader:
        parquet = pq.ParquetFile(reader)
        faults.next(503, method="GET", times=3)
        assert parquet.read().equals(table)
    assert faults.injected == 3


@pytest.mark.parametrize("fault", [STALL, TRUNCATE])
def test_a_body_that_stalls_or_ends_early_is_read_again(s3: S3, faults: Faults, fault: int) -> None:
    options = replace(s3, endpoint=faults.endpoint).storage_options
    options["s3"]["config_kwargs"] = {"read_timeout": 1}
    store = ObjectStore(options, retry_seconds=20.0)
    data = os.urandom(300_000)
    store.put_bytes(s3.url("f"), data)
    faults.next(fault, method="GET", times=2)
    with store.open(s3.url("f")) as file:
        assert file.read(100_000) == data[:100_000]
        assert file.read() == data[100_000:]
    assert faults.injected == 2
    faults.next(fault, method="GET", times=2)
    assert store.read_bytes(s3.url("f")) == data
    assert faults.injected == 4


@pytest.mark.parametrize(("status", "times"), [(409, 2), (503, 2)])
def test_a_conditional_put_that_meets_another_is_tried_again(
    shaky: Place, faults: Faults, status: int, times: int
) -> None:
    """409: another conditional write of the same key is under way, which says nothing of how it will end."""
    faults.next(status, method="PUT", times=times)
    shaky.store.put_bytes(shaky("m"), b"mine", if_absent=True)
    assert (faults.injected, shaky.store.read_bytes(shaky("m"))) == (times, b"mine")


def test_a_precondition_that_fails_is_a_conflict_at_once(shaky: Place, faults: Faults) -> None:
    shaky.put("m", b"another's")
    faults.next(412, method="PUT", times=-1)
    with pytest.raises(FileExistsError):
        shaky.store.put_bytes(shaky("m"), b"mine", if_absent=True)
    assert faults.injected == 1


def test_a_lasting_fault_ends_as_unreachable(s3: S3, faults: Faults) -> None:
    store = ObjectStore(replace(s3, endpoint=faults.endpoint).storage_options, retry_seconds=1.0)
    faults.next(503, method="HEAD", times=-1)
    with pytest.raises(Unreachable, match=r"top/f.*does not answer"):
        store.exists(s3.url("top/f"))


def test_no_server_at_all(s3: S3) -> None:
    store = ObjectStore(replace(s3, endpoint="http://127.0.0.1:9").storage_options, retry_seconds=1.0)
    with pytest.raises(Unreachable):
        store.exists(s3.url("f"))


def test_a_refusal_is_not_retried(shaky: Place, faults: Faults) -> None:
    faults.next(403, method="PUT", times=-1)
    with pytest.raises(InvalidJob, match="permission denied") as refused, shaky.store.create(shaky("f")) as file:
        file.write(b"data")
    assert faults.injected == 1
    assert refused.value.retry_on_other_worker, "another worker may have the permission"
    faults.next(403, method="HEAD", times=-1)
    with pytest.raises(InvalidInput, match="permission denied"):
        shaky.store.info(shaky("f"))


@pytest.mark.parametrize("pattern", ["d", "d/*.parquet", "d/**/*.parquet"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_listing_that_fails_is_not_an_empty_one(s3: S3, faults: Faults, pattern: str, method: str) -> None:
    store = ObjectStore(replace(s3, endpoint=faults.endpoint).storage_options, retry_seconds=0.1)
    store.put_bytes(s3.url("d/a.parquet"), b"x")
    faults.next(403, method=method, times=-1)
    with pytest.raises(InvalidInput, match="permission denied"):
        store.find(s3.url(pattern))
    faults.next(503, method=method, times=-1)
    with pytest.raises(Unreachable):
        store.find(s3.url(pattern))


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "ExpiredToken", "RequestTimeTooSkewed"])
def test_bad_credentials_are_no_fault_of_the_job(shaky: Place, faults: Faults, code: str) -> None:
    """Expired ones can be mended while the shard is tried again: the job must not fail for good."""
    faults.next(403, method="PUT", times=-1, code=code)
    with pytest.raises(Unreachable, match=r"top/f: .*credentials.*storage_options\.s3") as refused:
        shaky.store.put_bytes(shaky("f"), b"x")
    assert refused.value.retry_on_other_worker
    faults.next(403, method="GET", times=-1, code=code)
    with pytest.raises(Unreachable, match="credentials"):
        shaky.store.find(shaky("d"))


def test_no_credentials_at_all(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    store = ObjectStore({"s3": {"endpoint_url": s3.endpoint}})
    with pytest.raises(Unreachable, match=r"credentials.*storage_options\.s3"):
        store.find(s3.url("d"))


def test_a_lost_answer_to_a_conditional_put_is_no_conflict(shaky: Place, faults: Faults) -> None:
    """The first try arrived, but its answer did not: what is there is our own."""
    faults.next(CUT_AFTER, method="PUT")
    shaky.store.put_bytes(shaky("m"), b"mine", if_absent=True)
    assert faults.injected == 1
    with pytest.raises(FileExistsError):
        shaky.store.put_bytes(shaky("m"), b"mine", if_absent=True)


def test_a_large_upload_goes_in_parts_and_is_begun_again(
    shaky: Place, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: 5 * 2**20)
    data = os.urandom(12 * 2**20)
    seen: list[str] = []

    def second_part_fails_once(method: str, path: str) -> int | None:
        seen.append(path)
        return 503 if "partNumber=2" in path and sum("partNumber=2" in p for p in seen) <= 2 else None

    faults.script = second_part_fails_once
    with shaky.store.create(shaky("large")) as file:
        for at in range(0, len(data), 2**20):
            file.write(data[at : at + 2**20])
    assert faults.injected == 2
    shaky.store.verify(file.written)


def test_a_copy_too_large_for_one_request_goes_in_parts(
    shaky: Place, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 copies up to 5 GB in one request; beyond, s3fs copies ranges within the store. Here the limit is lowered."""
    monkeypatch.setattr(s3fs.core, "MANAGED_COPY_THRESHOLD", 6 * 2**20)
    managed = s3fs.S3FileSystem._copy_managed

    async def in_small_blocks(self: Any, path1: str, path2: str, size: int, **kwargs: Any) -> None:
        await managed(self, path1, path2, size, block=5 * 2**20, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_copy_managed", in_small_blocks)
    data = os.urandom(12 * 2**20)
    shaky.store.put_bytes(shaky("work/large"), data)
    faults.requests.clear()
    seen: list[str] = []

    def second_part_fails_once(method: str, path: str) -> int | None:
        seen.append(path)
        return 503 if "partNumber=2" in path and sum("partNumber=2" in p for p in seen) <= 2 else None

    faults.script = second_part_fails_once
    digest = hashlib.sha256(data).hexdigest()
    shaky.store.publish(shaky("work/large"), shaky("data/large"), sha256=digest)
    assert faults.injected == 2
    copies = [request.path for request in faults.requests if request.method == "PUT"]
    assert [path.partition("partNumber=")[2][:1] for path in copies[-3:]] == ["1", "2", "3"]
    assert sum(request.n_bytes for request in faults.requests) < 10_000, "the content never comes here"
    shaky.store.verify_content(shaky("data/large"), len(data), digest)


def test_a_missing_bucket(s3: S3) -> None:
    store = ObjectStore(s3.storage_options)
    assert not store.exists("s3://no-such-bucket/f")
    assert store.find("s3://no-such-bucket/d/*.parquet") == []
    with pytest.raises(InvalidJob, match="no such bucket"), store.create("s3://no-such-bucket/f") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="refusing"):
        store.delete_tree(f"s3://{s3.bucket}")


@pytest.mark.parametrize("put", [{}, {"if_absent": True}], ids=["put", "conditional put"])
def test_a_link_that_leads_nowhere_is_no_folder(tmp_path: Path, put: dict[str, Any]) -> None:
    """Nor is the object there, which a conditional put would say by its error."""
    (tmp_path / "Data").symlink_to("nowhere")
    with pytest.raises(InvalidJob, match=r"/Data is a link that leads nowhere, not a folder"):
        ObjectStore().put_bytes(f"{tmp_path}/Data/x", b"x", **put)
