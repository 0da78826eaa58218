"""Engine names, the classes behind them, plug-ins, and the key under which an engine is shared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines import registry
from pipeline.engines.base import Permissions, RestrictsOptions
from pipeline.engines.fake.engine import FakeEngine
from pipeline.models.model import Model
from pipeline.spec.job_spec import Task, parse
from storage.errors import EngineMissing, InvalidJob

MODEL = Model(name="m", path=Path("m"), digest="d")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)

PLUG_IN = """
from pipeline.engines.fake import FakeEngine

class Mine(FakeEngine):
    name = "mine"

class Guarded(FakeEngine):
    name = "guarded"
    @classmethod
    def check_permissions(cls, options, permissions):
        if "shell" in options:
            permissions.require("shell", "it runs commands", field="engine_options.shell")

class Freer(FakeEngine):
    name = "freer"
    @classmethod
    def check(cls, spec, model, schema):
        return ("text",)
    def result_schema(self, spec):
        return None

not_a_class = 1

class Lacking:
    name = "lacking"
    def load(self): ...
"""
ENTRY_POINTS = """[rowmill.engines]
mine = rowmill_test_plugin:Mine
fake = rowmill_test_plugin:Mine
vllm = rowmill_test_plugin:Mine
onnx = rowmill_test_plugin:Mine
guarded = rowmill_test_plugin:Guarded
freer = rowmill_test_plugin:Freer
gone = rowmill_test_gone:Mine
leaving = rowmill_test_leaving:Mine
raising = rowmill_test_raising:Mine
typo = rowmill_test_plugin:Mein
value = rowmill_test_plugin:not_a_class
lacking = rowmill_test_plugin:Lacking
"""


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution that plugs engines in."""
    (tmp_path / "rowmill_test_plugin.py").write_text(PLUG_IN)
    (tmp_path / "rowmill_test_leaving.py").write_text("raise SystemExit('no licence')")
    (tmp_path / "rowmill_test_raising.py").write_text("raise OSError('no device')")
    info = tmp_path / "rowmill_test_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rowmill-test-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("rowmill_test_plugin", None)


@pytest.mark.parametrize("name", list(registry.BUILT_IN))
def test_built_in_engines(name: str) -> None:
    found = registry.engine_class(name)
    assert found.name == name
    assert found.tasks <= set(Task)


def test_names_start_with_the_built_in_ones() -> None:
    assert registry.names()[:3] == ("fake", "vllm", "onnx")


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidJob, match="no engine 'vlm'; there are auto, fake, vllm, onnx") as caught:
        registry.engine_class("vlm")
    assert caught.value.field == "engine"


@pytest.mark.usefixtures("plugged")
def test_engines_are_plugged_in() -> None:
    assert "mine" in registry.names()
    found = registry.engine_class("mine")
    assert found.name == "mine"
    assert issubclass(found, FakeEngine)


@pytest.mark.usefixtures("plugged")
def test_a_plug_in_takes_no_built_in_name() -> None:
    assert registry.engine_class("fake") is FakeEngine
    assert registry.names().count("fake") == 1


@pytest.mark.usefixtures("plugged")
def test_the_options_of_a_plug_in_are_its_own() -> None:
    others = {"tokenizer": "mine", "download_dir": "/d", "load_format": "x", "custom_ops": "all", "shell": "ls"}
    registry.check_permissions("mine", others, Permissions())


@pytest.mark.usefixtures("plugged")
def test_a_plug_in_says_which_options_need_the_operators_leave() -> None:
    registry.check_permissions("guarded", {"tokenizer": "mine"}, Permissions())
    with pytest.raises(InvalidJob, match="it runs commands: the setting allowed_engine_options must name 'shell'"):
        registry.check_permissions("guarded", {"shell": "ls"}, Permissions(frozenset({"tokenizer"})))
    registry.check_permissions("guarded", {"shell": "ls"}, Permissions(frozenset({"shell"})))


@pytest.mark.usefixtures("plugged")
def test_a_subclass_that_replaces_the_check_has_other_rules() -> None:
    spec = parse({"input": "in", "output": "out", "model": "m", "task": "tensor", "engine_options": {"own": 1}})
    with pytest.raises(InvalidJob, match="own"):
        registry.check_request("mine", spec, MODEL)
    registry.check_request("freer", spec, MODEL)
    assert registry.result_names("mine", spec, MODEL) == ("output",)
    assert registry.result_names("freer", spec, MODEL) is None


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("name", "options"), [("vllm", {"worker_cls": "evil.Worker"}), ("onnx", {"custom_ops": ["/tmp/evil.so"]})]
)
def test_a_plug_in_of_a_built_in_name_lifts_no_restriction(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidJob, match="allow"):
        registry.check_permissions(name, options, Permissions(own_machine=True))


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "rowmill_test_gone"),
        ("leaving", "SystemExit: no licence"),
        ("raising", "OSError: no device"),
        ("typo", "Mein"),
        ("value", "lacks"),
        ("lacking", "infer"),
    ],
)
def test_a_broken_plug_in_is_named_and_hides_no_other(name: str, words: str) -> None:
    with pytest.raises(EngineMissing, match=words) as caught:
        registry.engine_class(name)
    assert caught.value.field == "engine"
    assert name not in registry.names_with(RestrictsOptions)
    assert "guarded" in registry.names_with(RestrictsOptions)


@given(JSON.filter(lambda value: isinstance(value, dict)))
def test_the_key_does_not_depend_on_order_or_place(options: Mapping[str, Any]) -> None:
    key = registry.engine_key("vllm", MODEL, Task.EMBED, options)
    backwards = dict(reversed(list(options.items())))
    moved = replace(MODEL, name="other", path=Path("elsewhere"))
    assert registry.engine_key("vllm", moved, Task.EMBED, backwards) == key
    assert len(bytes.fromhex(key)) == 32


def test_the_key_follows_everything_else() -> None:
    keys = {
        registry.engine_key("vllm", MODEL, Task.EMBED, {"a": 1}),
        registry.engine_key("onnx", MODEL, Task.EMBED, {"a": 1}),
        registry.engine_key("vllm", replace(MODEL, digest="e"), Task.EMBED, {"a": 1}),
        registry.engine_key("vllm", MODEL, Task.SCORE, {"a": 1}),
        registry.engine_key("vllm", MODEL, Task.EMBED, {"a": "1"}),
        registry.engine_key("vllm", MODEL, Task.EMBED, {}),
    }
    assert len(keys) == 6


def test_the_key_is_the_same_in_another_process() -> None:
    code = (
        "from pipeline.engines.registry import engine_key; from pipeline.models.model import Model; "
        "from pipeline.spec.job_spec import Task; from pathlib import Path; "
        "print(engine_key('vllm', Model('m', Path('m'), 'd'), Task.EMBED, {'b': [1, 2], 'a': None}))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == registry.engine_key("vllm", MODEL, Task.EMBED, {"a": None, "b": [1, 2]})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, Path("x")])
def test_options_that_are_not_json_are_refused(value: Any) -> None:
    with pytest.raises(InvalidJob, match="JSON") as caught:
        registry.engine_key("vllm", MODEL, Task.EMBED, {"a": value})
    assert caught.value.field == "engine_options"
