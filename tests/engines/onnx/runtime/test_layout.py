"""Layouts: every one gives each row the result that it has alone; the fastest is measured once and remembered."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.tiny_encoder import build_encoder
from pipeline.engines.base import EngineContext
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.runtime import autotune
from pipeline.engines.onnx.runtime import layout as onnx_layout
from pipeline.engines.onnx.runtime import options as onnx_options
from pipeline.engines.onnx.runtime.autotune import Bench, Trial
from pipeline.engines.onnx.runtime.layout import Layout
from pipeline.engines.onnx.runtime.session_pool import SessionPool
from storage.errors import InvalidJob
from tests.engines.onnx.models.test_text import column, some_texts
from tests.engines.onnx.support import batches, embeddings, engine, job, model_at, run

LAYOUTS: list[dict[str, Any]] = [
    {"sessions": 1, "lanes": 1, "threads": 1, "io_binding": False},
    {"sessions": 1, "lanes": 1, "threads": 1, "io_binding": True},
    {"sessions": 1, "lanes": 3, "threads": 1, "io_binding": True},
    {"sessions": 2, "lanes": 1, "threads": 2, "io_binding": False},
    {"sessions": 2, "lanes": 2, "threads": 1, "token_budget": 2048, "io_binding": True},
    {"sessions": 1, "lanes": 2, "threads": 1, "token_budget": 64, "max_batch": 3},
]
GPU = pytest.param(["CUDAExecutionProvider"], marks=pytest.mark.gpu)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoder") / "tiny-encoder", normalize=True, pooling="mean")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=[["CPUExecutionProvider"], GPU])
def providers(request: pytest.FixtureRequest) -> list[str]:
    if request.param != ["CPUExecutionProvider"]:
        import onnxruntime

        if request.param[0] not in onnxruntime.get_available_providers():
            pytest.skip("needs onnxruntime-gpu and a GPU")
    return list(request.param)


@pytest.fixture(scope="module")
def alone(encoder: Path, cache: Path) -> np.ndarray[Any, Any]:
    """Embeddings of ``TEXTS``, each computed in a batch of its own."""
    made = engine(encoder, job("embed"), cache, max_batch=1, window_rows=1, io_binding=False)
    table, _ = run(made, job("embed"), column(TEXTS))
    made.close()
    return embeddings(table)


TEXTS = [*some_texts(150, seed=11), "", "red", "red", *some_texts(5, seed=12, longest=200)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
def test_no_result_depends_on_the_layout(
    encoder: Path, cache: Path, providers: list[str], alone: np.ndarray[Any, Any], layout: dict[str, Any]
) -> None:
    made = engine(encoder, job("embed"), cache, providers=providers, **layout)
    table, failures = run(made, job("embed"), column(TEXTS), size=64)
    again, _ = run(made, job("embed"), column(TEXTS[::-1]))  # through buffers that have been used
    stats = made.stats()
    made.close()
    assert not failures
    assert {name: stats[name] for name in layout if name != "max_batch"} == {
        name: value for name, value in layout.items() if name != "max_batch"
    }
    assert (stats["kept_runs"] > 0) == stats["io_binding"]
    assert np.abs(embeddings(table) - alone).max() < 1e-5
    assert np.abs(embeddings(again)[::-1] - alone).max() < 1e-5


def test_an_output_of_another_shape_than_foreseen_is_run_without_kept_buffers(tmp_path: Path) -> None:
    from onnx import helper

    from tests.engines.onnx.support import FLOAT, INT64, graph, value

    # The states of all tokens but the last: one less along the second axis than the token ids have.
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["f"], to=FLOAT),
        helper.make_node("Slice", ["f", "zero", "end", "axis"], ["cut"]),
        helper.make_node("Unsqueeze", ["cut", "two"], ["last_hidden_state"]),
    ]
    constants = [helper.make_tensor(n, INT64, [1], [v]) for n, v in [("zero", 0), ("end", -1), ("axis", 1), ("two", 2)]]
    build_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    graph(
        tmp_path / "model.onnx",
        nodes,
        [value("input_ids", INT64, ["n", "s"])],
        [value("last_hidden_state", FLOAT, ["n", "t", 1])],
        constants,
    )
    texts = [f"red {word}" for word in ("dog", "cat", "fox")]
    found = []
    for binding in (False, True):
        made = engine(tmp_path, job("embed", pooling="cls"), tmp_path, io_binding=binding)
        table, failures = run(made, job("embed", pooling="cls"), column(texts))
        assert not failures
        assert made.stats()["kept_runs"] == 0
        made.close()
        found.append(embeddings(table))
    assert (found[0] == found[1]).all()


class TestMeasured:
    @pytest.fixture
    def big(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        monkeypatch.setattr(autotune, "SAMPLE_SECONDS", 0.01)
        return some_texts(300, seed=3)

    def test_on_demand_then_remembered(self, encoder: Path, tmp_path: Path, big: list[str]) -> None:
        first = engine(encoder, job("embed"), tmp_path)
        assert first.stats()["layout_from"] == "default"
        table, failures = run(first, job("embed"), column(big))
        assert not failures
        assert not (tmp_path / "onnx-layouts").exists(), "a job measures nothing"
        before = first.stats()
        told = first.benchmark(job("embed"), batches(column(big)))
        assert first.stats() == before, "the measurement's own runs are not counted, and the engine stays as it is"
        first.close()
        assert told is not None
        (file,) = (tmp_path / "onnx-layouts").iterdir()
        kept = json.loads(file.read_text())
        assert len(kept["trials"]) == len(told["trials"]) >= 4
        second = engine(encoder, job("embed"), tmp_path)
        facts = second.stats()
        again, _ = run(second, job("embed"), column(big))
        second.close()
        assert facts["layout_from"] == "cache"
        assert {name: facts[name] for name in kept["layout"]} == kept["layout"]
        assert np.abs(embeddings(table) - embeddings(again)).max() < 1e-5
        file.write_text("{")
        third = engine(encoder, job("embed"), tmp_path)
        assert third.stats()["layout_from"] == "default"
        third.close()

    def test_a_rival_must_win_every_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        champion, slow, rival = (Layout(1, 1, 1, tokens, io_binding=False) for tokens in (512, 256, 1024))

        def winner(turns: dict[Layout, list[float | None]]) -> tuple[Layout, list[Trial]]:
            # The first turn of each warms it up, and does not count.
            left = {layout: [9.0, *seconds] for layout, seconds in turns.items()}

            def seconds(pool: Any, packs: Any) -> float:
                taken = left[packs].pop(0)
                if taken is None:
                    raise MemoryError
                return taken

            bench = object.__new__(Bench)
            bench.trials, bench._n_rows, bench._every = [], 100, 1
            bench._pool = pool = cast(SessionPool, None)
            bench._sample = lambda budget, every: Layout(1, 1, 1, budget, io_binding=False)  # type: ignore
            bench._pools = lambda champion, rivals: nullcontext(dict.fromkeys([champion, *rivals], pool))  # type: ignore
            bench._seconds = seconds  # type: ignore[method-assign, assignment]
            return bench._contest(champion, [slow, rival]), bench.trials

        fastest, trials = winner({champion: [1.0] * 3, slow: [1.2] * 3, rival: [0.8, 0.9, 0.7]})
        assert fastest == rival
        assert [(t.layout, t.ratio, t.chosen) for t in trials] == [
            (champion, 1.0, False),
            (slow, 0.833, False),
            (rival, 1.25, True),
        ]
        for turns in ([0.8, 0.8, 1.01], [0.97, 0.97, 0.97], [0.8, None], [None], [1.01] * 3):
            fastest, trials = winner({champion: [1.0] * 3, slow: [1.2] * 3, rival: list(turns)})
            assert fastest == champion
            assert [t.layout for t in trials if t.chosen] == [champion]

    def test_not_where_the_options_say_everything(self, encoder: Path, tmp_path: Path, big: list[str]) -> None:
        for options in ({"autotune": False}, LAYOUTS[4]):
            made = engine(encoder, job("embed"), tmp_path, **options)
            assert made.stats()["layout_from"] == "options"
            assert made.benchmark(job("embed"), batches(column(big))) is None
            made.close()
        assert not (tmp_path / "onnx-layouts").exists()

    def test_what_an_option_fixes_stays(self, encoder: Path, tmp_path: Path, big: list[str]) -> None:
        options = {"threads": 1, "token_budget": 128}
        made = engine(encoder, job("embed"), tmp_path, **options)
        told = made.benchmark(job("embed"), batches(column(big)))
        made.close()
        made = engine(encoder, job("embed"), tmp_path, **options)
        stats = made.stats()
        made.close()
        assert told is not None
        assert all(" 1 threads, 128 tokens" in trial["layout"] for trial in told["trials"])
        assert stats["layout_from"] == "cache"
        assert stats["threads"] == 1 and stats["token_budget"] == 128

    def test_tensors_too(self, tmp_path: Path, big: list[str]) -> None:
        import pyarrow as pa
        from onnx import helper

        from tests.engines.onnx.support import FLOAT, graph, value

        dims = ["n", 3]
        path = graph(
            tmp_path / "model.onnx",
            [helper.make_node("Relu", ["x"], ["y"])],
            [value("x", FLOAT, dims)],
            [value("y", FLOAT, dims)],
        )
        spec = job("tensor")
        data = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(900, dtype=np.float32) - 450), 3)
        columns = pa.record_batch({"x": data})
        made = engine(path, spec, tmp_path)
        assert made.benchmark(spec, batches(columns, 20)) is not None
        made.close()
        made = engine(path, spec, tmp_path)
        table, failures = run(made, spec, columns, size=20)
        stats = made.stats()
        made.close()
        assert stats["layout_from"] == "cache" and stats["rows"] == 300
        assert not failures
        flat: Any = table.column("y").combine_chunks().flatten()
        assert (np.asarray(flat) == np.maximum(np.arange(900) - 450, 0)).all()


def test_a_measurement_belongs_to_one_machine_and_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def key(digest: str = "d", version: str = "1", provider: str = "CPUExecutionProvider", **options: Any) -> str:
        return autotune.key(digest, tmp_path, "embed", version, [provider], onnx_options.parse(options))

    same = key()
    assert same == key() == key(window_rows=9)
    others = [key("e"), key(version="2"), key(provider="CUDAExecutionProvider"), key(threads=2)]
    monkeypatch.setattr(autotune, "processor", lambda: "another")
    assert len({same, *others, key()}) == 6


numbers = st.none() | st.integers(1, 8)


@settings(deadline=None)
@given(sessions=numbers, lanes=numbers, threads=numbers, cores=st.integers(1, 64), copies=st.integers(0, 64))
def test_rivals_obey_the_options_and_the_memory(
    sessions: int | None, lanes: int | None, threads: int | None, cores: int, copies: int
) -> None:
    options = onnx_options.parse({"sessions": sessions, "lanes": lanes, "threads": threads})
    base = Layout.default(options, cores, on_cpu=True)
    found = list(onnx_layout.rivals(base, options, cores, copies, on_cpu=True))
    assert base not in found and len(set(found)) == len(found)
    for layout in [base, *found]:
        assert layout == layout.obeying(options)
        assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert all(layout.sessions <= max(1, copies) for layout in found)
    if None in (sessions, lanes, threads) and not (sessions and lanes):
        assert base.sessions * base.lanes * base.threads <= max(cores, (sessions or 1) * (threads or 1) * (lanes or 1))


def test_a_layout_that_cannot_be_is_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"engine_options\.lanes"):
        OnnxEngine(model_at(encoder), job("embed").task, {"lanes": 0}, EngineContext(tmp_path))
    assert os.environ.get("ORT_DISABLE_TELEMETRY") == "1"
