"""The pure parts: options, folders, pooling, halving of batches, windows."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from pipeline.engines import pooling
from pipeline.engines.base import RowBatch
from pipeline.engines.model_config import text
from pipeline.engines.onnx.runtime import options as onnx_options
from pipeline.engines.onnx.runtime.ort import CPU, TENSORRT, GraphFile, open_session, with_engine_cache
from pipeline.engines.onnx.runtime.run import RunFailed, RunTimedOut
from pipeline.engines.onnx.runtime.stream import bisect, settle, windows
from pipeline.models import int8_overflow
from pipeline.models.int8_overflow import PRECISE
from storage.errors import EngineDead, InvalidJob, InvalidModel
from tests.engines.onnx.support import FLOAT, graph, model_at, value


def test_the_table_of_providers_is_onnx_runtimes() -> None:
    assert set(onnxruntime.get_all_providers()) <= onnx_options.PROVIDERS  # type: ignore[attr-defined]


def test_options_have_names_pairs_and_aliases() -> None:
    made = onnx_options.parse(
        {"providers": ["CUDAExecutionProvider", ["CPUExecutionProvider", {"use_arena": 1}]], "intra_op_num_threads": 4}
    )
    assert made.providers == (("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {"use_arena": "1"}))
    assert made.threads == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"provider": ["CPU"]}, "engine_options.provider: unknown option of engine 'onnx'; it has"),
        ({"providers": "CPUExecutionProvider"}, "engine_options.providers: a list of provider names"),
        ({"providers": []}, "a list of provider names"),
        ({"providers": [["A", {}, 1]]}, "neither a provider's name nor"),
        ({"providers": ["A", "A"]}, "A is named twice"),
        ({"providers": [["A", {"trt_engine_cache_path": "x"}]]}, "names a file or an address, which a job may not"),
        ({"session_config": {"ep.context_file_path": "x"}}, "names a file or an address, which a job may not"),
        ({"providers": [["A", {"cache_dir": "x"}]]}, "cache_dir names a file"),
        ({"providers": [["A", {"ModelCacheDirectory": "x"}]]}, "ModelCacheDirectory names a file"),
        ({"providers": [["A", {"trt_engine_cache_prefix": "x"}]]}, "trt_engine_cache_prefix names a file"),
        ({"providers": [["A", {"load_config": "{}"}]]}, "load_config names a file"),
        ({"providers": [["A", {"backend_lib": "x"}]]}, "backend_lib names a file"),
        ({"providers": [["A", {"op_packages": "x"}]]}, "op_packages names a file"),
        ({"providers": [["A", {"trt_extra_plugin_lib": "x"}]]}, "trt_extra_plugin_lib names a file"),
        ({"providers": [["A", {"gpu_external_alloc": "1"}]]}, "gpu_external_alloc names a file or an address"),
        ({"providers": [["A", {"device_type": "../x"}]]}, "the value of device_type looks like a path"),
        ({"session_config": {"session.other": "a\\b"}}, "the value of session.other looks like a path"),
        ({"session_config": ["a"]}, "engine_options.session_config: a mapping"),
        ({"threads": 1, "intra_op_num_threads": 1}, "the same option as threads"),
        ({"threads": True}, "engine_options.threads"),
        ({"token_budget": 0}, "engine_options.token_budget"),
        ({"graph_optimization_level": "max"}, "'disable', 'basic'"),
        ({"file": "/etc/model.onnx"}, "leaves the model directory"),
        ({"file": "a/../../model.onnx"}, "leaves the model directory"),
        ({"file": "model.bin"}, "is not a .onnx file"),
    ],
)
def test_bad_options_are_refused_with_their_name_and_the_reason(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        onnx_options.parse(options)
    assert says in str(caught.value)


def folder(path: Path, **files: Any) -> text.TextFolder:
    for name, content in files.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".json").write_text(json.dumps(content))
    return text.read(model_at(path))


MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"},
    {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.base.modules.normalize.Normalize"},
]


def test_both_generations_of_sentence_transformers_are_read(tmp_path: Path) -> None:
    new = folder(tmp_path / "new", modules=MODULES, **{"1_Pooling__config": {"pooling_mode": ["cls", "lasttoken"]}})
    assert new.pooling == ("cls", "last") and new.normalize
    legacy = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    old = folder(tmp_path / "old", modules=MODULES[:2], **{"1_Pooling__config": legacy})
    assert old.pooling == ("max", "mean") and not old.normalize
    plain = folder(tmp_path / "plain", config={})
    assert plain.pooling is None and not plain.sentence_transformer


def test_modules_that_the_engine_does_not_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="outside the model directory"):
        folder(tmp_path / "out", modules=[{"idx": 0, "path": "../../etc", "type": "a.Transformer"}])
    with pytest.raises(InvalidModel, match="unknown pooling median"):
        folder(tmp_path / "median", modules=MODULES[:2], **{"1_Pooling__config": {"pooling_mode": "median"}})


@pytest.mark.parametrize(
    ("config", "sentence", "tokenizer", "limit"),
    [
        ({"max_position_embeddings": 512}, {}, {}, 512),
        ({"max_position_embeddings": 512}, {"max_seq_length": 256}, {"model_max_length": 512}, 256),
        ({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1}, {}, {}, 512),
        ({}, {}, {"model_max_length": 1e30}, None),
    ],
)
def test_the_length_limit_is_the_smallest_that_is_named(
    tmp_path: Path, config: Any, sentence: Any, tokenizer: Any, limit: int | None
) -> None:
    made = folder(tmp_path, config=config, sentence_bert_config=sentence, tokenizer_config=tokenizer)
    assert made.max_length == limit


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from(["mean", "max", "mean_sqrt_len", "weightedmean", "cls", "last"]),
)
def test_pooling_looks_at_no_padding(lengths: list[int], mode: str) -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(len(lengths), max(lengths), 4)).astype(np.float32)
    expected = pooling.pool(states, sizes := np.array(lengths), [mode])
    for row, length in enumerate(lengths):
        states[row, length:] = np.nan
        alone = pooling.pool(states[row : row + 1, :length], sizes[row : row + 1], [mode])
        assert np.allclose(alone[0], expected[row], atol=1e-6)
    assert np.allclose(pooling.pool(states, sizes, [mode]), expected, atol=1e-6)


def test_activations_do_not_overflow() -> None:
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    assert pooling.softmax(logits).tolist() == [[1.0, 0.0, 0.0]]
    assert pooling.sigmoid(logits).tolist() == [[1.0, 0.0, 0.5]]
    assert np.isfinite(pooling.unit_length(np.zeros((1, 3), np.float32))).all()


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 40))
def test_halving_finds_exactly_the_bad_rows_whatever_fits(bad: list[bool], fits: int) -> None:
    def compute(items: np.ndarray[Any, Any]) -> list[int]:
        if len(items) > fits:
            raise RunFailed("out of memory")
        if any(bad[i] for i in items):
            raise RunFailed("bad row")
        return [int(i) for i in items]

    parts, refused = bisect(compute, np.arange(len(bad)), lambda: True)
    assert sorted(row for _, rows in parts for row in rows) == [i for i, is_bad in enumerate(bad) if not is_bad]
    assert refused == [(i, "engine_refused", "bad row") for i, is_bad in enumerate(bad) if is_bad]


def test_a_session_that_fails_for_everything_is_dead_and_no_row_is_blamed() -> None:
    def compute(items: np.ndarray[Any, Any]) -> None:
        raise RunFailed("CUDA error 700")

    with pytest.raises(EngineDead, match="CUDA error 700"):
        bisect(compute, np.arange(4), lambda: False)


def test_a_row_that_takes_too_long_says_nothing_of_the_session() -> None:
    def compute(items: np.ndarray[Any, Any]) -> list[int]:
        if 2 in items:
            raise RunTimedOut("the run took longer than row_timeout, 1 s")
        return [int(i) for i in items]

    # The sample would take as long as a row, and is not asked.
    parts, refused = bisect(compute, np.arange(4), lambda: False)
    assert sorted(row for _, rows in parts for row in rows) == [0, 1, 3]
    assert [(row, code) for row, code, _ in refused] == [(2, "timed_out")]


def test_what_the_end_of_a_pool_has_cancelled_is_not_waited_for() -> None:
    release, begun = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        release.wait()

    pool = ThreadPoolExecutor(1)
    futures = [pool.submit(work), pool.submit(work)]
    begun.wait()
    pool.shutdown(wait=False, cancel_futures=True)
    settled = threading.Thread(target=settle, args=(futures,))
    settled.start()
    assert not futures[0].done()
    release.set()
    settled.join(60)
    assert not settled.is_alive() and futures[0].done() and futures[1].cancelled()


def test_tensorrt_keeps_its_engines_where_the_operator_caches(tmp_path: Path) -> None:
    given: list[Any] = [(TENSORRT, {"trt_fp16_enable": "True", "trt_engine_cache_enable": "False"}), (CPU, {})]
    (name, settings), cpu = with_engine_cache(given, tmp_path / "a" / "b")
    assert (name, cpu) == (TENSORRT, (CPU, {}))
    assert settings["trt_engine_cache_path"] == str(tmp_path / "a" / "b") and (tmp_path / "a" / "b").is_dir()
    assert (settings["trt_fp16_enable"], settings["trt_engine_cache_enable"]) == ("True", "False")
    assert settings["trt_timing_cache_enable"] == "True"


@pytest.mark.parametrize(
    ("overflows", "given", "asked"),
    [(True, {}, "1"), (True, {PRECISE: "0"}, "0"), (False, {}, ""), (False, {PRECISE: "1"}, "1")],
)
def test_exact_products_of_8_bits_are_asked_for_where_they_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflows: bool, given: dict[str, str], asked: str
) -> None:
    monkeypatch.setattr(int8_overflow, "overflows", lambda runtime: overflows)
    x, y = value("x", FLOAT, ["N"]), value("y", FLOAT, ["N"])
    file = GraphFile(graph(tmp_path / "model.onnx", [helper.make_node("Neg", ["x"], ["y"])], [x], [y]))
    session = open_session(onnxruntime, file, onnx_options.parse({"session_config": given}), [(CPU, {})], 1)
    kept = ""
    with suppress(RuntimeError):  # when it has no such entry
        kept = session.get_session_options().get_session_config_entry(PRECISE)
    assert kept == asked


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 25))
def test_windows_keep_every_row_in_order(sizes: list[int], rows: int) -> None:
    total = sum(sizes)
    column = pa.record_batch({"x": np.arange(total)})
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    made = [RowBatch(np.arange(s, s + n) * 3, column.slice(s, n)) for s, n in zip(starts[:-1], sizes, strict=True)]
    found, values = [], []
    for ids, parts in windows(made, rows, 2**20):
        assert 0 < len(ids) <= rows and sum(part.num_rows for part in parts) == len(ids)
        found += ids.tolist()
        values += [value for part in parts for value in part.column("x").to_pylist()]
    assert found == [3 * i for i in range(total)] and values == list(range(total))


def test_windows_end_early_when_they_hold_many_bytes() -> None:
    column = pa.record_batch({"x": np.zeros(1000)})
    batches = [RowBatch(np.arange(1000) + 1000 * i, column) for i in range(4)]
    assert [len(ids) for ids, _ in windows(batches, 10_000, 10_000)] == [2000, 2000]
