"""A real library of custom operators, built from C++ here, and the rules about which ones a job may load."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import helper

from pipeline import Client
from pipeline.config.settings import Settings
from storage.errors import InvalidJob
from storage.states import JobState
from tests.engines.onnx.support import FLOAT, value

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler here")
    path = tmp_path_factory.mktemp("ops") / "libdecay.so"
    source = Path(__file__).parent / "custom_op.cc"
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = helper.make_graph(
        [helper.make_node("Decay", ["x", "rate"], ["y"], domain="tests.rowmill")],
        "graph",
        [value("x", FLOAT, ["N", "L"])],
        [value("y", FLOAT, ["N", "L"])],
        [helper.make_tensor("rate", FLOAT, [], [0.5])],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("tests.rowmill", 1)]
    path = tmp_path / "decay.onnx"
    onnx.save(helper.make_model(made, opset_imports=domains, ir_version=10), str(path))
    return path


def fields(model: Path, tmp_path: Path, libraries: Any) -> dict[str, Any]:
    rows = np.arange(60, dtype=np.float32).reshape(20, 3)
    pq.write_table(pa.table({"x": pa.array(list(rows), pa.list_(pa.float32()))}), tmp_path / "rows.parquet")
    return {
        "input": str(tmp_path / "rows.parquet"),
        "output": str(tmp_path / "out"),
        "model": str(model),
        "task": "tensor",
        "engine_options": {"custom_ops": libraries},
    }


def test_a_graph_with_an_operator_of_its_own(library: Path, model: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", custom_op_paths=(library,))
    with Client(settings=settings) as client:
        status = client.run(**fields(model, tmp_path, [str(library)]))
    assert (status.state, status.rows_done, status.rows_failed) == (JobState.COMPLETED, 20, 0)
    found = np.array(pq.read_table(tmp_path / "out" / "data")["y"].to_pylist(), np.float32)
    rows = np.arange(60, dtype=np.float32).reshape(20, 3)
    assert np.allclose(found, rows * np.exp(-0.5 * np.arange(3)), rtol=1e-6)


def test_the_library_that_was_allowed_is_the_one_that_is_loaded(
    library: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name without a slash is looked up by the loader in other places than by the check."""
    monkeypatch.chdir(library.parent)
    settings = Settings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", custom_op_paths=(library,))
    with Client(settings=settings) as client:
        assert client.run(**fields(model, tmp_path, [library.name])).state is JobState.COMPLETED


@pytest.mark.parametrize("allowed", [True, False])
def test_only_libraries_that_the_operator_named_are_loaded(model: Path, tmp_path: Path, allowed: bool) -> None:
    other, named = tmp_path / "other.so", tmp_path / "named.so"
    other.write_bytes(b"")
    paths = (named,) if allowed else ()
    settings = Settings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", custom_op_paths=paths)
    with Client(settings=settings) as client:
        says = f"custom_op_paths names {named if allowed else 'none'}"
        with pytest.raises(InvalidJob, match=f"engine_options.custom_ops: .*other.so is no library .*{says}"):
            client.run(**fields(model, tmp_path, [str(other)]))
        with pytest.raises(InvalidJob, match="custom_ops: a list of paths"):
            client.run(**fields(model, tmp_path, str(other)))
        if allowed:
            with pytest.raises(InvalidJob, match=r"named\.so is not there"):
                client.run(**fields(model, tmp_path, [str(named)]))
        assert client.jobs() == []


def test_a_graph_without_its_library_and_a_library_that_is_none(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    settings = Settings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", custom_op_paths=(broken,))
    with Client(settings=settings) as client:
        job = client.run(**fields(model, tmp_path, []))
        assert job.state is JobState.FAILED and "Decay" in str(job)
        more = fields(model, tmp_path, [str(broken)]) | {"output": str(tmp_path / "other")}
        job = client.run(**more)
        assert job.state is JobState.FAILED and "custom operators" in str(job)
