"""The doctor: each check on a machine of the kind that it is about, as far as one can be made here."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.doctor import verdict
from pipeline.config.settings import Settings
from pipeline.diagnostics import doctor, machine, output
from pipeline.engines import registry
from pipeline.engines.onnx.runtime import diagnosis as onnx_diagnosis
from pipeline.engines.probing import probe
from pipeline.engines.vllm.process import diagnosis as vllm_diagnosis
from pipeline.host import gpu
from pipeline.spec.check import Check
from storage.objects.store import ObjectStore
from storage.sql import database as storage_database
from tests.cli.conftest import Rowmill
from tests.conftest import S3
from tests.storage.objects.faulty_s3 import proxy


def test_the_built_in_graph_is_the_model_that_it_is_said_to_be() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(onnx_diagnosis.ADD_GRAPH)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Add"]


def test_onnx_runtime_is_proved_by_a_graph_that_ran() -> None:
    pytest.importorskip("onnxruntime")
    result = probe(onnx_diagnosis.__name__, ["run", "CPUExecutionProvider"], 60)
    assert result["ok"]
    assert result["active"] == ["CPUExecutionProvider"]
    assert result["placement"] == ["CPUExecutionProvider"]


@pytest.mark.skipif(gpu.has_gpu(), reason="there is a GPU here")
def test_a_provider_that_falls_back_to_the_cpu_does_not_pass() -> None:
    pytest.importorskip("onnxruntime")
    assert not probe(onnx_diagnosis.__name__, ["run", "CUDAExecutionProvider"], 60)["ok"]


def test_two_builds_of_onnx_runtime_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (check,) = onnx_diagnosis.checks()
    assert check.status == "fail"
    assert "onnxruntime and onnxruntime-gpu" in check.detail
    assert check.remedy is not None
    assert "pip uninstall onnxruntime onnxruntime-gpu" in check.remedy


PLUG_IN = """
from pipeline.engines.base import Check
from pipeline.engines.fake.engine import FakeEngine

class Quiet(FakeEngine):
    pass

class Lacking(FakeEngine):
    @classmethod
    def package(cls):
        return "no_such_module", "no-such-package"

class Parentless(FakeEngine):
    @classmethod
    def package(cls):
        return "no_such_parent.module", "no-such-package"

class Unsure(FakeEngine):
    @classmethod
    def package(cls):
        raise KeyError("package")

class Halfway(FakeEngine):
    @classmethod
    def diagnose(cls, *, deep):
        yield Check("engine halfway", "ok", "a first step")
        raise SystemExit("no licence")

class Other(FakeEngine):
    @classmethod
    def diagnose(cls, *, deep):
        return ["works"]

class Telling(FakeEngine):
    @classmethod
    def diagnose(cls, *, deep):
        return [Check("engine telling", "warn", f"deep: {deep}", "mend it")]

class Broken(FakeEngine):
    @classmethod
    def diagnose(cls, *, deep):
        raise OSError("no device")
"""


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("quiet", "ok", "its module loads"),
        ("lacking", "skip", "is not installed"),
        ("parentless", "skip", "is not installed"),
        ("unsure", "fail", "KeyError: 'package'"),
        ("halfway", "fail", "SystemExit: no licence"),
        ("other", "fail", "diagnose() gave 'works', which is no Check"),
        ("leaving", "fail", "SystemExit: 3"),
        ("telling", "warn", "deep: True"),
        ("broken", "fail", "OSError: no device"),
        ("absent", "fail", "cannot be imported"),
    ],
)
def test_an_engine_of_another_distribution_speaks_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: str, detail: str
) -> None:
    folder = tmp_path / "rowmill_plug_in_for_doctor-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: rowmill-plug-in-for-doctor\nVersion: 1.0\n")
    module = f"plug_in_for_doctor_{name}"
    (folder / "entry_points.txt").write_text(f"[rowmill.engines]\n{name} = {module}:{name.title()}\n")
    (tmp_path / f"{module}.py").write_text("raise SystemExit(3)" if name == "leaving" else PLUG_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert name in registry.names()
    *before, check = doctor.engine(name, deep=True)
    assert [item.detail for item in before] == (["a first step"] if name == "halfway" else [])
    assert (check.name, check.status) == (f"engine {name}", status)
    assert detail in check.detail


def test_a_probe_that_crashes_or_hangs_is_a_finding() -> None:
    crashed = probe(onnx_diagnosis.__name__, ["nonsense"], 60)
    assert not crashed["ok"]
    assert "KeyError" in crashed["error"]
    late = probe(onnx_diagnosis.__name__, ["providers"], 0.001)
    assert late == {"ok": False, "error": "no answer within 0 s"}


def test_a_database_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    check = doctor.database(f"sqlite:///{tmp_path / 'new.db'}")
    assert check.status == "ok"
    assert "not there yet" in check.detail
    assert not (tmp_path / "new.db").exists()


def test_a_database_at_this_versions_schema(database_url: str) -> None:
    check = doctor.database(database_url)
    assert check.status == "ok"
    assert check.facts["revision"] == check.facts["newest"]


@pytest.mark.postgres
def test_an_empty_server_needs_an_upgrade(postgres_empty: str) -> None:
    check = doctor.database(postgres_empty)
    assert check.status == "warn"
    assert check.remedy == "run 'rowmill db upgrade'"
    storage_database.upgrade(postgres_empty)
    assert doctor.database(postgres_empty).status == "ok"


def test_a_server_that_does_not_answer_is_unreachable() -> None:
    check = doctor.database("postgresql://u:hunter2@127.0.0.1:1/d")
    assert (check.status, check.unreachable) == ("fail", True)
    assert "hunter2" not in check.detail


@pytest.mark.parametrize("url", ["nonsense", "mysql://h/d"])
def test_a_bad_database_url_is_not_called_unreachable(url: str) -> None:
    check = doctor.database(url)
    assert (check.status, check.unreachable) == ("fail", False)


def test_the_broker(redis_url: str) -> None:
    assert doctor.broker(None).status == "skip"
    assert doctor.broker(redis_url).status == "ok"
    gone = doctor.broker("redis://:hunter2@127.0.0.1:1/0")
    assert (gone.status, gone.unreachable) == ("fail", True)
    assert "hunter2" not in gone.detail
    bad = doctor.broker("carrier-pigeon://h")
    assert (bad.status, bad.unreachable) == ("fail", False)


def _output(options: Mapping[str, Any], uri: str | None) -> dict[str, Check]:
    found = list(output.checks(Settings(storage_options=dict(options)), uri))
    return {check.name: check for check in found}


def test_an_output_that_nobody_asked_about() -> None:
    [check] = output.checks(Settings(), None)
    assert (check.status, check.name) == ("skip", "output")


def test_an_output_on_an_object_store(s3: S3) -> None:
    found = _output(s3.storage_options, s3.url("below/out/"))
    assert {name: check.status for name, check in found.items()} == dict.fromkeys(
        [f"output {step}" for step in ("put", "get", "list", "conditional put", "copy", "multi-part upload", "delete")],
        "ok",
    )
    assert all(s3.url("below/out") in check.detail for check in found.values())
    assert ObjectStore(s3.storage_options).list_tree(s3.url("")) == []


@pytest.mark.parametrize(("method", "step"), [("PUT", "put"), ("HEAD", "get"), ("DELETE", "delete")])
def test_an_output_without_a_right(s3: S3, method: str, step: str) -> None:
    right = {"put": "s3:PutObject", "get": "s3:GetObject", "delete": "s3:DeleteObject"}[step]
    with proxy(s3.endpoint) as faults:
        faults.script = lambda asked, path: 403 if asked == method else None
        found = _output(replace(s3, endpoint=faults.endpoint).storage_options, s3.url("out"))
    failed = found[f"output {step}"]
    assert failed.status == "fail" and not failed.unreachable
    assert right in failed.detail and s3.url("out") in failed.detail
    assert ("is left at" in failed.detail) == (step == "delete")
    assert verdict(list(found.values())) == 1


def test_an_output_whose_store_does_not_answer(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_PATIENCE_SECONDS", 0.1)
    found = _output(replace(s3, endpoint="http://127.0.0.1:1").storage_options, s3.url("out"))
    assert [(check.status, check.unreachable) for check in found.values()] == [("fail", True)]


def test_a_local_output_is_left_as_it_was(tmp_path: Path) -> None:
    found = _output({}, str(tmp_path / "a" / "out"))
    assert {check.status for check in found.values()} == {"ok"}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    failed = _output({}, str(tmp_path / "file" / "out"))["output put"]
    assert failed.status == "fail" and str(tmp_path / "file") in failed.detail


@pytest.mark.parametrize("place", ["a::b", "", "s3://", "memory://x", "http://host/x", "s3:/bucket", "s3://KEY:SEC@b"])
def test_an_output_that_is_no_place(rowmill: Rowmill, place: str) -> None:
    """Refused in the words that a job hears."""
    refused = rowmill.inside("doctor", "--output", place)
    assert refused.code == 2
    assert refused.err.startswith("error: output: ")


@pytest.mark.parametrize("place", ["ftp://host/x", "nosuch://x"])
def test_an_output_that_nothing_here_opens_lacks_no_right(place: str) -> None:
    found = _output({}, place)
    assert found["output"].status == "fail"
    assert len(found) == 1


def test_directories(tmp_path: Path) -> None:
    missing = machine.directory("data directory", tmp_path / "a" / "b", sqlite=True)
    assert missing.status in ("ok", "warn")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    check = machine.directory("data directory", tmp_path / "file" / "b", sqlite=False)
    assert check.status == "fail"
    assert check.remedy is not None
    assert "data_dir" in check.remedy


def test_what_sounds_and_videos_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    found = vllm_diagnosis.media()
    assert found.status == "skip"
    assert "rowmill[audio]" in (found.remedy or "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert machine.directory("cache directory", tmp_path, sqlite=False).status == "fail"


def test_the_machine() -> None:
    for check in (machine.cpu(), machine.memory(), machine.shared_memory(), gpu.gpu()):
        assert check.detail


def test_a_driver_whose_gpu_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    command.write_text("#!/bin/sh\necho 'No devices were found' >&2\nexit 6\n")
    command.chmod(0o755)
    assert gpu.gpu().status == "warn"
    assert gpu.gpu().detail == "No devices were found"
    command.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.95'\n")
    assert gpu.gpu().status == "ok"
    assert gpu.has_gpu()


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([Check("a", "ok", ""), Check("b", "warn", ""), Check("c", "skip", "")], 0),
        ([Check("a", "fail", "")], 1),
        ([Check("a", "fail", ""), Check("broker", "fail", "", unreachable=True)], 7),
    ],
)
def test_the_verdict(found: list[Check], code: int) -> None:
    assert verdict(found) == code


def test_the_command(rowmill: Rowmill) -> None:
    secrets = ("--setting", "storage_options.s3.key=k", "--setting", "storage_options.s3.secret=hunter2")
    shutil.rmtree(rowmill.home.parent / "data")
    done = rowmill("doctor", "--json", *secrets, ROWMILL_CACHE_DIRR="x")
    assert done.code == 0, done.out
    assert "hunter2" not in done.out + done.err
    found = {check["name"]: check for check in done.document["checks"]}
    assert found["settings"]["status"] == "warn"
    assert "ROWMILL_CACHE_DIR" in found["settings"]["detail"]
    assert found["database"]["status"] == "ok"
    assert found["engine onnx, CPU"]["status"] == "ok"
    assert found["engine vllm"]["status"] in ("ok", "warn")
    assert not (rowmill.home.parent / "data").exists()
