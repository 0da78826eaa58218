"""The fake engine: the contract for every task, its determinism, and each of its scripted faults."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.engines.base import Cancellation, EngineContext, RowBatch, RowFailure
from pipeline.engines.fake.engine import FakeEngine
from pipeline.engines.testing import EngineContract, cancel_when, results, run, stream
from pipeline.execution.completeness import BrokenEngine, PendingRows
from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from pipeline.spec.job_spec import JobSpec, Task, parse
from storage.errors import EngineDead, InvalidInput, InvalidJob, InvalidModel, TransientError

PERSONS = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
MODEL = resolve("fake", Path("unused"))


def make_spec(task: str, **fields: Any) -> JobSpec:
    return parse({"input": "in.parquet", "output": "out", "model": "fake", "task": task, **fields})


def make_engine(spec: JobSpec, options: dict[str, Any] | None = None) -> FakeEngine:
    engine = FakeEngine(MODEL, spec.task, spec.engine_options if options is None else options, EngineContext(Path("x")))
    engine.load()
    return engine


def texts(*values: str | None, first: int = 0) -> RowBatch:
    column = pa.array(values, pa.string())
    return RowBatch(np.arange(first, first + len(values)), pa.RecordBatch.from_arrays([column], ["text"]))


def numbered(first: int, n: int) -> RowBatch:
    rows = range(first, first + n)
    columns = {
        "text": pa.array([f"text {row}" for row in rows], pa.string()),
        "other": pa.array([f"other {row % 7}" for row in rows], pa.large_string()),
        "talk": pa.array([[{"role": "user", "content": f"hello {row}"}] for row in rows], PERSONS),
        "x": pa.array([float(row) for row in rows], pa.float64()),
        "y": pa.array([[row, 1] for row in rows], pa.list_(pa.int64(), 2)),
    }
    return RowBatch(np.arange(first, first + n), pa.RecordBatch.from_pydict(columns))


SPECS = {
    "generate": make_spec("generate", prompt="{text} and {other}", sampling={"max_tokens": 4}),
    "generate-n": make_spec("generate", prompt="{text}", sampling={"n": 2}),
    "chat-prompt": make_spec("chat", prompt="{text}"),
    "chat-messages": make_spec("chat", messages=[{"role": "user", "content": "{text}"}]),
    "chat-column": make_spec("chat", column="talk"),
    "embed": make_spec("embed", column="text"),
    "classify": make_spec("classify", column="text"),
    "score": make_spec("score", column="text", pair_column="other"),
    "tensor": make_spec("tensor", inputs={"a": "x", "b": "y"}),
    "shuffled": make_spec("generate", prompt="{text}", engine_options={"shuffle": True}),
}


@pytest.mark.parametrize("case", SPECS, scope="class")
class TestFake(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, case: str) -> JobSpec:
        return SPECS[case].model_copy(update={"engine": "fake"})

    @classmethod
    def columns(cls, first: int, n: int) -> pa.RecordBatch:
        return numbered(first, n).columns


def test_every_task_is_there() -> None:
    assert FakeEngine.tasks == set(Task) == {spec.task for spec in SPECS.values()}


# -- what it answers --------------------------------------------------------------------------------------------------


def test_generate_repeats_the_prompt_after_its_hash() -> None:
    spec = make_spec("generate", prompt="Say: {text}")
    assert run(make_engine(spec), spec, [texts("hello there")])[0] == {
        "output": "fake:fb327ffa Say: hello there",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 4,
    }


def test_max_tokens_cuts_the_answer() -> None:
    spec = make_spec("generate", prompt="Say: {text}", sampling={"max_tokens": 2})
    answer = run(make_engine(spec), spec, [texts("hello there")])[0]
    assert answer["output"] == "fake:fb327ffa Say:"
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 2)


def test_embeddings_have_unit_length() -> None:
    spec = make_spec("embed", column="text")
    answered = run(make_engine(spec), spec, [numbered(0, 50)])
    lengths = [np.linalg.norm(answer["embedding"]) for answer in answered.values()]
    np.testing.assert_allclose(lengths, 1.0, atol=1e-6)


def test_a_prefix_is_a_part_of_the_text() -> None:
    spec = make_spec("embed", column="text")
    plain = run(make_engine(spec), spec, [numbered(0, 5)])
    spec = make_spec("embed", column="text", prefix="query: ")
    prefixed = run(make_engine(spec), spec, [numbered(0, 5)])
    for row, answer in prefixed.items():
        assert answer["prompt_tokens"] == plain[row]["prompt_tokens"] + 1
        assert answer["embedding"] != plain[row]["embedding"]


def test_probabilities_sum_to_one_and_the_best_is_named() -> None:
    spec = make_spec("classify", column="text")
    for answer in run(make_engine(spec), spec, [numbered(0, 50)]).values():
        best = answer["scores"][0]
        assert answer["scores"] == sorted(answer["scores"], key=lambda item: -item["score"])
        assert (answer["label"], answer["score"]) == (best["label"], best["score"])
        assert sum(item["score"] for item in answer["scores"]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("column", "sums"),
    [
        (pa.array([1, None, 3], pa.int32()), [1, None, 3]),
        (pa.array([True, False, None]), [1, 0, None]),
        (pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2)), [3, None, 7]),
        (pa.array([[1, 2], [], None], pa.list_(pa.int8())), [3, 0, None]),
        (pa.array([[[1], [2, 3]], [[4, None]], [[]]], pa.list_(pa.list_(pa.int64()))), [6, None, 0]),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((3, 2, 2), np.float32)), [4, 4, 4]),
    ],
)
@pytest.mark.parametrize("sliced", [False, True])
def test_tensor_sums_the_numbers_of_a_row(column: Any, sums: list[float | None], sliced: bool) -> None:
    spec = make_spec("tensor")
    if sliced:
        column = pa.concat_arrays([column, column]).slice(2, 3)
        sums = (sums + sums)[2:5]
    batch = RowBatch(np.arange(3), pa.RecordBatch.from_arrays([column], ["x"]))
    assert FakeEngine.check(spec, MODEL, batch.columns.schema) == ("x",)
    answered = run(make_engine(spec), spec, [batch])
    found = [None if isinstance(answered[row], RowFailure) else answered[row]["output"] for row in range(3)]
    assert found == sums
    assert {answer.code for answer in answered.values() if isinstance(answer, RowFailure)} <= {"missing_value"}


# -- rows that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_bytes_that_are_not_utf8(kind: Any) -> None:
    spec = make_spec("generate", prompt="{text}")
    raw = pa.array([b"good", b"\xff\xfe", None], pa.large_binary() if kind == pa.large_string() else pa.binary())
    column = raw if kind == pa.binary() else pa.Array.from_buffers(kind, 3, raw.buffers())
    answered = run(make_engine(spec), spec, [RowBatch(np.arange(3), pa.RecordBatch.from_arrays([column], ["text"]))])
    assert answered[0]["output"].endswith(" good")
    assert (answered[1].code, answered[2].code) == ("invalid_utf8", "missing_value")


@pytest.mark.parametrize(
    ("talk", "code"),
    [
        ('[{"role": "user", "content": "hi"}]', None),
        ('[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]', None),
        ('[{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]', None),
        ('[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///a"}}]}]', "invalid_value"),
        ('[{"role": "user", "content": "\\ud800"}]', "invalid_utf8"),
        ('[{"role": "king", "content": "hi"}]', "invalid_value"),
        ('[{"role": "user"}]', "invalid_value"),
        ("[]", "invalid_value"),
        ("{", "invalid_value"),
        ("[1]", "invalid_value"),
        ('{"role": "user"}', "invalid_value"),
        (None, "missing_value"),
    ],
)
def test_conversations_in_a_column(talk: str | None, code: str | None) -> None:
    spec = make_spec("chat", column="text")
    answer = run(make_engine(spec), spec, [texts(talk)])[0]
    assert (answer.code if isinstance(answer, RowFailure) else None) == code


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[{"role": "user", "content": PARTS}]]),
        pa.array([[{"role": "user", "content": "one\ntwo"}]]),
        pa.ExtensionArray.from_storage(
            pa.json_(pa.string()), pa.array([json.dumps([{"role": "user", "content": PARTS}])])
        ),
        pa.array([json.dumps([{"role": "user", "content": PARTS}])]).dictionary_encode(),
    ],
    ids=["parts", "text", "json", "dictionary"],
)
def test_content_is_text_or_a_list_of_parts(column: pa.Array[Any]) -> None:
    spec = make_spec("chat", column="talk")
    batch = pa.RecordBatch.from_arrays([column], ["talk"])
    make_engine(spec).check(spec, MODEL, batch.schema)
    answered = run(make_engine(spec), spec, [RowBatch(np.arange(1), batch)])
    assert answered[0]["output"].endswith("user: one\ntwo")


def test_an_empty_prompt_is_refused() -> None:
    spec = make_spec("generate", prompt="{text}")
    answered = run(make_engine(spec), spec, [texts("", "x")])
    assert answered[0].code == "invalid_value"
    assert answered[1]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("task", "overlong", "fails"), [("generate", "auto", True), ("embed", "auto", False), ("embed", "error", True)]
)
def test_overlong_texts(task: str, overlong: str, fails: bool) -> None:
    reads = {"prompt": "{text}"} if task == "generate" else {"column": "text"}
    spec = make_spec(task, overlong=overlong, **reads)
    answer = run(make_engine(spec, {"max_prompt_tokens": 2}), spec, [texts("one two three")])[0]
    if fails:
        assert answer.code == "prompt_too_long"
    else:
        assert answer["prompt_tokens"] == 2


# -- what is refused before anything runs -----------------------------------------------------------------------------

_FIELDS: list[Any] = [
    pa.field("text", pa.string()),
    pa.field("n", pa.int64()),
    pa.field("nested", pa.list_(pa.binary())),
]
COLUMNS = pa.schema(_FIELDS)


@pytest.mark.parametrize(
    ("fields", "error", "field", "words"),
    [
        ({"task": "generate", "prompt": "{txt}"}, InvalidInput, "prompt", "no column 'txt'; it has text, n, nested"),
        ({"task": "generate", "prompt": "{nested}"}, InvalidInput, "prompt", "nested"),
        ({"task": "embed", "column": "n"}, InvalidInput, "column", "int64"),
        ({"task": "score", "column": "text", "pair_column": "x"}, InvalidInput, "pair_column", "no column 'x'"),
        ({"task": "chat", "column": "n"}, InvalidInput, "column", "struct<role: string, content: string>"),
        ({"task": "tensor", "inputs": {"a": "text"}}, InvalidInput, "inputs.a", "numbers"),
        (
            {"task": "generate", "prompt": "{text}", "sampling": {"max_token": 1}},
            InvalidJob,
            "sampling.max_token",
            "max_tokens",
        ),
        (
            {"task": "generate", "prompt": "{text}", "engine_options": {"die": "x"}},
            InvalidJob,
            "engine_options.die",
            "die_on",
        ),
        (
            {"task": "generate", "prompt": "{text}", "engine_options": {"die_times": 0}},
            InvalidJob,
            "engine_options.die_times",
            "greater than or equal to 1",
        ),
    ],
)
def test_check_refuses(fields: dict[str, Any], error: type[InvalidJob], field: str, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        FakeEngine.check(make_spec(**fields), MODEL, COLUMNS)
    assert caught.value.field == field


def test_check_returns_each_column_once() -> None:
    spec = make_spec("chat", messages=[{"role": r, "content": "{text} {n} {text}"} for r in ("system", "user")])
    assert FakeEngine.check(spec, MODEL, COLUMNS) == ("text", "n")


# -- scripted faults --------------------------------------------------------------------------------------------------

GENERATE = make_spec("generate", prompt="{text}")


@pytest.fixture
def mark() -> str:
    """Text of this test alone: strikes are counted per set of options in the whole process."""
    return f"mark-{uuid.uuid4().hex}"


def test_chosen_rows_fail(mark: str) -> None:
    engine = make_engine(GENERATE, {"fail_rows_matching": mark})
    answered = run(engine, GENERATE, [texts("a", f"b {mark}", "c")])
    assert [isinstance(answered[row], RowFailure) for row in range(3)] == [False, True, False]
    assert answered[1].code == "engine_refused"


@pytest.mark.parametrize(("fault", "error"), [("die", EngineDead), ("transient", TransientError)])
def test_it_dies_as_often_as_it_is_told(fault: str, error: type[Exception], mark: str) -> None:
    options = {f"{fault}_on": mark, f"{fault}_times": 2}
    for _ in range(2):
        found = results(make_engine(GENERATE, options), GENERATE, [texts("a"), texts(mark, first=1)])
        assert next(found).rows.tolist() == [0]
        with pytest.raises(error, match=mark):
            next(found)
    assert sorted(run(make_engine(GENERATE, options), GENERATE, [texts("a", mark)])) == [0, 1]


def test_strikes_are_counted_in_a_directory(mark: str, tmp_path: Path) -> None:
    options = {"die_on": mark, "counts_dir": str(tmp_path)}
    (tmp_path / "die").write_bytes(b".")  # as if another process had died already
    assert sorted(run(make_engine(GENERATE, options), GENERATE, [texts(mark)])) == [0]


def test_load_can_be_refused() -> None:
    with pytest.raises(InvalidModel, match="no such weights"):
        make_engine(GENERATE, {"refuse_load": "no such weights"})


def test_the_gate_holds_until_the_file_exists(tmp_path: Path, mark: str) -> None:
    gate, reached = tmp_path / "gate", tmp_path / f"reached-{mark}"
    options = {"gate_file": str(gate), "gate_after_rows": 4, "touch_after_rows": [4, str(reached)]}
    engine = make_engine(GENERATE, options)
    found = results(engine, GENERATE, stream(numbered, 8, 2))
    assert [next(found).rows.tolist(), next(found).rows.tolist()] == [[0, 1], [2, 3]]
    assert not reached.exists()  # two rows are counted: the last ones may still be on their way
    opener = threading.Thread(target=lambda: _when(reached, gate.touch))
    opener.start()
    assert [result.rows.tolist() for result in found] == [[4, 5], [6, 7]]
    opener.join()


def _when(path: Path, act: Any) -> None:
    polls = threading.Event()
    while not path.exists():
        polls.wait(0.005)
    act()


@pytest.mark.parametrize("options", [{"gate_file": "/nonexistent/gate"}, {"delay_ms_per_batch": 60_000}])
def test_waiting_ends_when_cancelled(options: dict[str, Any]) -> None:
    cancel, begun = Cancellation(), threading.Event()

    def batches() -> Iterator[RowBatch]:
        begun.set()
        yield texts("a")

    thread = cancel_when(begun, cancel)
    assert run(make_engine(GENERATE, options), GENERATE, batches(), cancel) == {}
    thread.join()


_CRASHING = """
import json, sys
from pathlib import Path
from tests.engines.fake.test_fake import GENERATE, make_engine, numbered
from pipeline.engines.testing import results, stream
for result in results(make_engine(GENERATE, json.loads(sys.argv[1])), GENERATE, stream(numbered, 100, 10)):
    print(*result.rows, flush=True)
"""


def test_the_process_crashes_after_some_rows(tmp_path: Path) -> None:
    options = json.dumps({"crash_after_rows": 25, "crash_times": 1, "counts_dir": str(tmp_path)})
    command = [sys.executable, "-c", _CRASHING, options]
    root = Path(__file__).resolve().parents[3]
    first = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert first.returncode == 137, first.stderr
    assert first.stdout.split() == [str(row) for row in range(30)], "what was handed over before the crash"
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert len(again.stdout.split()) == 100


def test_shuffle_mixes_the_same_way_every_time() -> None:
    def order() -> list[int]:
        engine = make_engine(GENERATE, {"shuffle": True})
        return [row for result in results(engine, GENERATE, stream(numbered, 100, 10)) for row in result.rows.tolist()]

    assert order() == order()
    assert order() != list(range(100))
    assert sorted(order()) == list(range(100))


@pytest.mark.parametrize(("fault", "words"), [("drop_row", "unanswered"), ("double_row", "already answered")])
def test_broken_engines_are_noticed(fault: str, words: str, mark: str) -> None:
    engine = make_engine(GENERATE, {fault: mark})
    pending = PendingRows(range(3))
    with pytest.raises(BrokenEngine, match=words):
        for result in results(engine, GENERATE, [texts("a", mark, "c")]):
            pending.accept(result)
        pending.check_complete()


def test_stats_count_rows_and_tokens(mark: str) -> None:
    engine = make_engine(GENERATE, {"fail_rows_matching": mark})
    run(engine, GENERATE, [texts("one two", mark, None)])
    assert engine.stats() == {"rows": 3, "failed_rows": 2, "prompt_tokens": 2, "completion_tokens": 3}


def test_a_model_on_disk_can_be_faked() -> None:
    model = Model(name="m", path=Path("m"), digest="0")
    assert FakeEngine.check(GENERATE, model, COLUMNS) == ("text",)
