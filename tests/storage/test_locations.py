"""Where objects live: one spelling per place, and only final files among the data."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import locations
from storage.errors import InvalidJob


@pytest.mark.parametrize(
    ("given_", "normal"),
    [
        ("/a/b/", "/a/b"),
        ("/a/../b/./c", "/b/c"),
        ("file:///a/b", "/a/b"),
        ("local:///a", "/a"),
        ("/", "/"),
        ("/a/**/*.parquet", "/a/**/*.parquet"),
        ("s3://bucket/a/b//", "s3://bucket/a/b"),
        ("S3://bucket/a/../b", "S3://bucket/a/../b"),
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_normalize(given_: str, normal: str) -> None:
    assert locations.normalize(given_) == normal
    assert locations.normalize(normal) == normal


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert locations.normalize("in/*.parquet") == f"{tmp_path}/in/*.parquet"
    assert locations.normalize("~/in") == "/home/someone/in"


@pytest.mark.parametrize("uri", ["simplecache::file:///etc/passwd", "a::b"])
def test_chained_urls_are_refused(uri: str) -> None:
    with pytest.raises(InvalidJob, match="::"):
        locations.normalize(uri)


@pytest.mark.parametrize(("uri", "name"), [("/a", "file"), ("file:///a", "file"), ("S3://b/k", "s3"), ("a:b", "file")])
def test_protocol(uri: str, name: str) -> None:
    assert locations.protocol(uri) == name


@given(
    idx=st.integers(0, 10**6), gen=st.integers(0, 9), attempt=st.integers(1, 10**4), nonce=st.text("0af", min_size=1)
)
def test_only_final_files_are_among_the_data(idx: int, gen: int, attempt: int, nonce: str) -> None:
    output = "s3://b/run"
    attempt_dir = locations.attempt_dir(output, "job", idx, gen, attempt, nonce)
    assert attempt_dir.startswith(locations.attempts_dir(output, "job"))
    for path in (f"{attempt_dir}/output.parquet", locations.chunk_in(locations.work_dir(output, "job"), idx)):
        assert path.startswith(locations.work_dir(output, "job")) and "//" not in path.removeprefix("s3://")
        assert not fnmatchcase(path, f"{locations.data_dir(output)}/*.parquet")
    assert fnmatchcase(locations.part(output, idx), "s3://b/run/data/part-[0-9]*.parquet")


def test_layout() -> None:
    assert locations.part("/o/", 42) == "/o/data/part-00042.parquet"
    assert locations.manifest("/o") == "/o/_manifest.json"
    assert locations.success("/o") == "/o/_SUCCESS"
    assert locations.work_dir("/o", "j") == "/o/.rowmill/j/"
    assert locations.owner("/o/") == "/o/.rowmill/owner.json"


@pytest.mark.parametrize(
    ("output", "outer"),
    [
        ("/o/data", ["/o"]),
        ("/data/o/.rowmill/x", ["", "/data/o"]),
        ("s3://b/data/o", ["s3://b"]),
        ("s3://data/o", []),
        ("/o/database", []),
    ],
)
def test_the_outputs_that_one_would_lie_in(output: str, outer: list[str]) -> None:
    assert locations.outer_outputs(output) == outer
