"""Segments of cached results, and what many writers of them make of a folder: on local files and on S3."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.result_cache import cache as result_cache
from pipeline.result_cache.cache import ResultCaches
from storage.errors import CorruptFile, TransientError
from storage.objects.store import ObjectStore
from storage.parquet import keyed_segments
from tests.conftest import S3
from tests.examples import examples

SCHEMA = pa.schema(
    [
        ("output", pa.string()),
        ("n", pa.int32()),
        ("v", pa.list_(pa.float32(), 2)),
        ("more", pa.list_(pa.struct([("a", pa.int64())]))),
    ]
)
FACTS = {"model": "m"}


def key(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


def values(names: list[Any]) -> pa.RecordBatch:
    rows = [{"output": f"of {n}", "n": len(str(n)), "v": [1.0, len(str(n))], "more": [{"a": 1}]} for n in names]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def keep(caches: ResultCaches, names: list[Any], tenant: str = "t") -> int:
    cache = caches.open(tenant, FACTS, SCHEMA)
    for at in range(0, len(names), 7):
        cache.add([key(name) for name in names[at : at + 7]], values(names[at : at + 7]))
    cache.finish()
    assert not cache.failures
    return cache.written


def kept(caches: ResultCaches, names: list[Any], tenant: str = "t") -> dict[Any, str]:
    cache = caches.open(tenant, FACTS, SCHEMA)
    keys = [key(name) for name in names]
    places = cache.find(keys)
    at = np.flatnonzero(places >= 0)
    found: dict[Any, str] = {}
    for which, batch in cache.read([keys[i] for i in at], places[at]):
        assert batch.schema.equals(SCHEMA)
        for position, row in zip(which, batch.to_pylist(), strict=True):
            name = names[at[position]]
            assert name not in found and row == values([name]).to_pylist()[0]
            found[name] = row["output"]
    assert not cache.failures
    return found


def caches_at(root: Path | str, index_bytes: int = 2**20) -> ResultCaches:
    return ResultCaches(ObjectStore(retry_seconds=1), str(root), index_bytes)


NAMES = st.lists(st.integers(0, 40), max_size=30, unique=True)


@settings(deadline=None, max_examples=examples(40))
@given(st.lists(st.tuples(st.sampled_from("ab"), NAMES, st.booleans()), max_size=5), NAMES)
def test_what_was_kept_is_found_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, list[int], bool]], asked: list[int]
) -> None:
    root = tmp_path_factory.mktemp("results")
    caches, known = caches_at(root), {"a": set[int](), "b": set[int]()}
    for tenant, names, anew in steps:
        caches = caches_at(root) if anew else caches
        assert keep(caches, names, tenant) == len(names)
        known[tenant] |= set(names)
    for tenant in "ab":
        for reader in (caches, caches_at(root)):
            assert kept(reader, asked, tenant).keys() == known[tenant] & set(asked)


def test_row_groups_are_read_once_and_only_where_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed_segments, "GROUP_ROWS", 10)
    caches = caches_at(tmp_path)
    keep(caches, list(range(100)))
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, number: int, **more: Any) -> pa.Table:
        read.append(number)
        return original(self, number, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    wanted = [95, 3, 17, 91, 4, 200, 15]
    assert list(kept(caches, wanted)) == [3, 4, 17, 15, 95, 91] or kept(caches, wanted).keys() == set(wanted) - {200}
    assert sorted(set(read)) == [0, 1, 9]


def test_a_large_answer_that_is_asked_for_often_comes_in_portions(tmp_path: Path) -> None:
    caches = caches_at(tmp_path)
    large = 2**20
    cache = caches.open("t", FACTS, SCHEMA)
    rows = [{"output": "x" * large, "n": 1, "v": [1.0, 2.0], "more": []}, *values(["small"]).to_pylist()]
    cache.add([key("large"), key("small")], pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    cache.finish()
    cache = caches.open("t", FACTS, SCHEMA)
    keys = [key("large")] * 50 + [key("small")] * 50
    portions = list(cache.read(keys, cache.find(keys)))
    assert sorted(which for some, _ in portions for which in some) == list(range(100))
    assert max(batch.nbytes for _, batch in portions) <= keyed_segments.GROUP_BYTES + large
    for some, batch in portions:
        lengths = [len(output) for output in batch.column(0).to_pylist()]
        assert lengths == [large if which < 50 else len("of small") for which in some]


def test_equal_hashes_are_told_apart_by_the_whole_key(tmp_path: Path) -> None:
    caches = caches_at(tmp_path)
    cache = caches.open("t", FACTS, SCHEMA)
    twins = [b"12345678" + bytes([n]) * 24 for n in (1, 2)]
    cache.add(twins[:1], values(["one"]))
    cache.finish()
    cache = caches.open("t", FACTS, SCHEMA)
    places = cache.find(twins)
    assert (places >= 0).all()
    assert [which for which, _ in cache.read(twins, places)] == [[0]]


def test_the_newest_are_known_when_memory_is_short(tmp_path: Path) -> None:
    for number in range(4):
        keep(caches_at(tmp_path), [f"{number} {row}" for row in range(10)])
    few = caches_at(tmp_path, index_bytes=25 * result_cache.ENTRY_BYTES)
    names = [f"{number} {row}" for number in range(4) for row in range(10)]
    assert kept(few, names).keys() == set(names[20:])
    # Another namespace takes its place.
    keep(few, ["x"], "other")
    assert kept(few, ["x"], "other") == {"x": "of x"}
    assert sum(len(known.index) for known in few._known.values()) <= 25


def test_deleting_and_reading_at_the_same_time(tmp_path: Path) -> None:
    reader = caches_at(tmp_path)
    keep(reader, ["a", "b"])
    cache = reader.open("t", FACTS, SCHEMA)
    places = cache.find([key("a"), key("b")])
    store, (old,) = ObjectStore(), cache.segments.values()
    store.delete([old.uri])
    assert list(cache.read([key("a"), key("b")], places)) == [] and not cache.failures
    assert kept(reader, ["a", "b"]) == {}


WRITER = """
import sys
from tests.storage.parquet.test_keyed_segments import caches_at, keep
caches = caches_at(sys.argv[1])
for number in range(12):
    keep(caches, [f"{number} {row}" for row in range(20)])
for number in range(20, 24):
    keep(caches, [f"{sys.argv[2]} {number}"])
"""


def test_processes_that_write_the_same_answers_at_the_same_time(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(who)], env=environment) for who in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    names = [f"{n} {row}" for n in range(12) for row in range(20)] + [
        f"{who} {n}" for who in range(4) for n in range(12)
    ]
    assert kept(caches_at(tmp_path), list(dict.fromkeys(names))).keys() == set(names)


KILLED = """
import os, sys
from storage import failpoints
from storage.objects import local_files
from tests.storage.parquet.test_keyed_segments import caches_at, keep
if sys.argv[2] == "writing":
    local_files.publish = lambda *_: os._exit(137)
else:
    failpoints.arm("cache.stored", lambda: os._exit(137))
keep(caches_at(sys.argv[1]), ["a", "b"])
"""


@pytest.mark.parametrize(("when", "there"), [("writing", set()), ("written", {"a", "b"})])
def test_a_writer_that_is_killed_leaves_all_or_nothing(tmp_path: Path, when: str, there: set[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], env=environment, check=False)
    assert done.returncode == 137
    left = list(tmp_path.rglob(".*.tmp"))
    assert len(left) == (0 if there else 1)
    for path in left:
        os.utime(path, (0, 0))
    result_cache.collect(ObjectStore(), str(tmp_path), older_than=0, most_bytes=None)
    assert not list(tmp_path.rglob(".*.tmp"))
    assert kept(caches_at(tmp_path), ["a", "b", "c"]).keys() == there


def test_old_answers_go_and_the_oldest_beyond_a_size(tmp_path: Path) -> None:
    for number in range(6):
        keep(caches_at(tmp_path), [number], f"tenant-{number % 2}")
    store = ObjectStore()
    made = keyed_segments.listed(store, str(tmp_path))
    assert result_cache.collect(store, str(tmp_path), older_than=0, most_bytes=None) == (0, 0)
    assert result_cache.collect(store, str(tmp_path), older_than=made[4].made_at, most_bytes=None)[0] in (1, 2)
    left = keyed_segments.listed(store, str(tmp_path))
    most = left[0].n_bytes + left[1].n_bytes
    assert result_cache.collect(store, str(tmp_path), older_than=0, most_bytes=most)[0] == len(left) - 2
    assert keyed_segments.listed(store, str(tmp_path)) == left[:2]
    assert result_cache.collect(store, str(tmp_path / "nowhere"), older_than=0, most_bytes=0) == (0, 0)


def test_what_is_no_segment_is_refused(tmp_path: Path) -> None:
    keep(caches_at(tmp_path), ["a"])
    store = ObjectStore()
    (segment,) = keyed_segments.listed(store, str(tmp_path))
    folder = segment.uri.rpartition("/")[0]
    with pytest.raises(CorruptFile, match="another folder"):
        keyed_segments.hashes_of(store, f"{folder}x", segment)
    with pytest.raises(CorruptFile, match="other columns"):
        list(keyed_segments.read(store, folder, segment, np.array([0]), pa.schema([("output", pa.int64())])))


def test_on_s3(s3: S3) -> None:
    store, root = ObjectStore(s3.storage_options), s3.url("results")

    def caches() -> ResultCaches:
        return ResultCaches(store, root, 2**20)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda who: keep(caches(), [*range(30), f"own {who}"]), range(4)))
    names = [*range(30), *(f"own {who}" for who in range(4)), "never"]
    assert kept(caches(), names).keys() == set(names) - {"never"}
    assert kept(caches(), names, "another") == {}
    (torn, *_) = keyed_segments.listed(store, root)
    store.put_bytes(torn.uri, store.read_bytes(torn.uri)[:-9])
    assert len(kept(caches(), names)) == len(names) - 2
    assert result_cache.collect(store, root, older_than=2e10, most_bytes=None)[0] == 4
    assert kept(caches(), names) == {}


def test_a_bucket_that_is_not_there(s3: S3) -> None:
    said: list[str] = []
    store = ObjectStore(s3.storage_options, retry_seconds=1)
    caches = ResultCaches(store, "s3://no-such-bucket/results", 2**20, said.append)
    cache = caches.open("t", FACTS, SCHEMA)
    cache.add([key("a")], values(["a"]))
    cache.finish()
    assert cache.failures and not cache.written and len(said) == 1 and "no-such-bucket" in said[0]


class Unreachable(ObjectStore):
    """A store that can be cut off; ``asked`` counts how often that was found out."""

    cut, asked = False, 0

    def find(self, pattern: str, *, changing: bool = False) -> Any:
        if self.cut:
            self.asked += 1
            raise TransientError("connection refused")
        return super().find(pattern, changing=changing)


def test_a_store_that_failed_is_left_alone_for_a_while(tmp_path: Path) -> None:
    clock, store = [0.0], Unreachable()
    caches = ResultCaches(store, str(tmp_path), 2**20, now=lambda: clock[0])
    assert keep(caches, ["a"]) == 1
    store.cut = True
    assert caches.open("t", FACTS, SCHEMA).failures == 1
    clock[0] = result_cache.REST_SECONDS - 1
    store.cut = False
    resting = caches.open("other", FACTS, SCHEMA)
    resting.add([key("b")], values(["b"]))
    resting.finish()
    assert (store.asked, resting.failures, resting.written) == (1, 0, 0)
    assert kept(caches, ["a"]) == {}
    clock[0] = result_cache.REST_SECONDS
    assert kept(caches, ["a", "b"]) == {"a": "of a"}


def test_calls_that_waited_for_a_store_in_vain_together_ask_once(tmp_path: Path) -> None:
    store = Unreachable()
    store.cut = True
    caches = ResultCaches(store, str(tmp_path), 2**20)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: caches.open("t", FACTS, SCHEMA), range(8)))
    assert store.asked == 1
