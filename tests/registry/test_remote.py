"""Models on an object store: fetched once, gone on with after a break, and verified file by file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import s3fs

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.models.resolve import resolve
from pipeline.registry import remote
from storage.errors import InvalidModel
from tests.conftest import S3
from tests.registry.models import write_model


@pytest.fixture
def store(s3: S3, tmp_path: Path) -> s3fs.S3FileSystem:
    """A bucket with a model, and beside it what is none of it."""
    filesystem = s3fs.S3FileSystem(**s3.storage_options["s3"])
    filesystem.put(str(write_model(tmp_path / "encoder")), f"{s3.bucket}/models/encoder", recursive=True)
    filesystem.pipe(f"{s3.bucket}/models/encoder/README.md", b"not part of it")
    return filesystem


@pytest.fixture
def opened(s3: S3, tmp_path: Path) -> Callable[[str], Client]:
    def client(cache: str) -> Client:
        return Client(
            settings=Settings(
                data_dir=tmp_path / "data", cache_dir=tmp_path / cache, storage_options=s3.storage_options
            )
        )

    return client


def test_a_model_is_fetched_once_and_has_the_digest_of_its_files(
    store: s3fs.S3FileSystem, s3: S3, tmp_path: Path, opened: Callable[[str], Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    real = remote._download

    def watched(store: Any, info: Any, *rest: Any) -> None:
        fetched.append(info.uri)
        real(store, info, *rest)

    monkeypatch.setattr(remote, "_download", watched)
    local = resolve(str(tmp_path / "encoder"), tmp_path / "cache-local").digest
    with opened("one") as client:
        added = client.models.add("encoder", f"s3://{s3.bucket}/models/encoder")
        assert added.digest == local and len(fetched) == 7
        assert resolve(client.models.path("encoder"), tmp_path / "one").digest == local
        assert len(fetched) == 7
    with opened("two") as client, ThreadPoolExecutor(4) as pool:  # another machine, whose threads all want it
        paths = set(pool.map(lambda _: client.models.path("encoder"), range(4)))
        assert len(paths) == 1 and len(fetched) == 14
        assert not (Path(paths.pop()) / "README.md").exists()


def test_a_graph_is_fetched_with_what_lies_beside_it(
    store: s3fs.S3FileSystem, s3: S3, tmp_path: Path, opened: Callable[[str], Client]
) -> None:
    local = resolve(str(tmp_path / "encoder" / "onnx" / "model.onnx"), tmp_path / "cache-local")
    url = f"s3://{s3.bucket}/models/encoder/onnx/model.onnx"
    with opened("one") as client:
        added = client.models.add("graph", url)
        names = {"model.onnx", "model.onnx_data", "tokenizer.json", "config.json"}
        assert names <= {path.name for path in Path(client.models.path("graph")).parents[1].rglob("*")}
    with opened("two") as client:
        assert resolve(client.models.path("graph"), tmp_path / "two").digest == added.digest
    assert local.onnx_files[0].name == "model.onnx"


def test_a_broken_fetch_goes_on_where_it_stopped(
    store: s3fs.S3FileSystem, s3: S3, tmp_path: Path, opened: Callable[[str], Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("one") as client:
        client.models.add("encoder", f"s3://{s3.bucket}/models/encoder")
    monkeypatch.setattr(remote, "_CHUNK", 16)
    read: list[int] = []
    with opened("two") as client:
        objects = client._runtime.store
        real = objects.open

        class Broken:
            """A reader that is cut off after some chunks."""

            def __init__(self, file: Any) -> None:
                self._file = file

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                self._file.close()

            def seek(self, at: int) -> None:
                read.append(at)
                self._file.seek(at)

            def read(self, n: int) -> bytes:
                if len(read) == 1 and self._file.tell() >= 32:
                    raise ConnectionError("cut off")
                return bytes(self._file.read(n))

        monkeypatch.setattr(objects, "open", lambda uri: Broken(real(uri)))
        with pytest.raises(Exception, match="cut off"):
            client.models.path("encoder")
        client.models.path("encoder")
    assert read[:2] == [0, 32]


def test_what_changed_on_the_store_is_refused_by_name(
    store: s3fs.S3FileSystem, s3: S3, tmp_path: Path, opened: Callable[[str], Client]
) -> None:
    with opened("one") as client:
        client.models.add("encoder", f"s3://{s3.bucket}/models/encoder")
        shutil.rmtree(tmp_path / "one")
        before = store.cat(f"{s3.bucket}/models/encoder/model.safetensors")
        store.pipe(f"{s3.bucket}/models/encoder/model.safetensors", before[:-1] + b"!")
        with pytest.raises(InvalidModel, match=r"model\.safetensors is not the file that was registered"):
            client.models.path("encoder")
        store.pipe(f"{s3.bucket}/models/encoder/model.safetensors", before)
        client.models.path("encoder")
        with pytest.raises(InvalidModel, match="there is nothing at"):
            client.models.add("other", f"s3://{s3.bucket}/nothing")
