"""The vLLM engine on a tiny Llama: the contract, vLLM's own answers, rows that fail, stops, deaths."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from examples.tiny_llama import build_llama
from pipeline.engines.base import Cancellation, Engine, RowBatch, RowFailure
from pipeline.engines.testing import EngineContract, MakeBatch, collect, results, run, stream
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.engines.vllm.process import cpu as vllm_cpu
from pipeline.engines.vllm.prompts.prompts import Prompts
from pipeline.engines.vllm.requests.admission import AdmissionLimit
from pipeline.host.cpu import one_of_each
from pipeline.models.model import Model
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage.errors import Blame, EngineDead, InvalidJob, InvalidModel
from tests.engines.vllm import support

pytestmark = pytest.mark.vllm
STOP = 60
"""Seconds after which a process that was told to end counts as living on."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return support.model_at(build_llama(tmp_path_factory.mktemp("models") / "llama"))


class Beside:
    """Processes of their own that run beside the first tests, since each takes as long to start as the engine."""

    def __init__(self, llama: Model, folder: Path) -> None:
        self._llama, self._folder = llama, folder
        self._running: list[subprocess.Popen[str]] = []
        self.scripts: dict[str, subprocess.Popen[str]] = {}
        self._reference = self._start("reference", support.REFERENCE, "found.json")
        question = [str(llama.path), support.OPTIONS, support.GREEDY, support.PROMPTS, support.CONVERSATIONS]
        assert self._reference.stdin is not None
        self._reference.stdin.write(json.dumps(question))
        self._reference.stdin.close()
        self._reference.stdin = None

    def start_scripts(self) -> None:
        for name in ("killed", "closed"):
            self.scripts[name] = self._start(name, support.USER_SCRIPT, str(self._llama.path))

    def reference(self) -> dict[str, Any]:
        """What ``LLM.generate`` and ``LLM.chat`` make of the prompts."""
        _, errors = self._reference.communicate()
        assert self._reference.returncode == 0, errors
        found: dict[str, Any] = json.loads((self._folder / "reference" / "found.json").read_text())
        return found

    def close(self) -> None:
        for process in self._running:
            family: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):  # its engine outlives it, and keeps its output open
                family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.communicate()

    def _start(self, name: str, code: str, *args: str) -> subprocess.Popen[str]:
        (self._folder / name).mkdir()
        process = support.start(self._folder / name, code, *args)
        self._running.append(process)
        return process


@pytest.fixture(scope="module")
def beside(llama: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    beside = Beside(llama, tmp_path_factory.mktemp("beside"))
    yield beside
    beside.close()


@pytest.fixture(scope="module")
def loaded(llama: Model, beside: Beside) -> Iterator[VllmEngine]:
    engine = support.make_engine(llama, support.make_spec())
    engine.load()
    beside.start_scripts()
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: VllmEngine) -> Iterator[VllmEngine]:
    """The module's engine; whatever the test did, nothing of it may be left inside."""
    yield loaded
    assert inside(loaded) == 0


def inside(engine: VllmEngine) -> int:
    running = engine._loaded().running
    assert running is not None
    return int(running.llm.get_num_unfinished_requests())


@pytest.mark.skipif(
    not vllm_cpu.few_cores() == len(one_of_each()) == vllm_cpu.PINNED_CORES,
    reason="not pinned: more or less than two cores",
)
def test_threads_of_the_model_stay_on_a_core_each(engine: VllmEngine) -> None:
    batch = support.texts(*support.PROMPTS)
    assert len(run(engine, support.make_spec(sampling=support.GREEDY), [batch])) == len(support.PROMPTS)
    (process,) = engine._loaded().running._processes.values()
    allowed = {}
    for thread in process.threads():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            allowed[thread.id] = sorted(os.sched_getaffinity(thread.id))
    alone = [cpus for cpus in allowed.values() if len(cpus) == 1]
    assert len(allowed[process.pid]) == 1
    assert sorted({cpu for (cpu,) in alone}) == one_of_each()
    # What the process did before goes where there is room.
    assert sorted(os.sched_getaffinity(0)) in allowed.values()


def failures(answers: dict[int, Any]) -> dict[int, str]:
    return {row: answer.code for row, answer in answers.items() if isinstance(answer, RowFailure)}


SPECS = {
    "generate": support.make_spec(prompt="Row {text}", sampling={**support.GREEDY, "max_tokens": 4}),
    "chat": support.make_spec("chat", prompt="{text}", sampling={**support.GREEDY, "max_tokens": 4}),
    "small window": support.make_spec(sampling={**support.GREEDY, "max_tokens": 2}),
}


@pytest.mark.parametrize("case", SPECS)
class TestVllm(EngineContract):
    @pytest.fixture
    def spec(self, case: str) -> JobSpec:
        return SPECS[case]

    @pytest.fixture
    def engine(self, engine: VllmEngine, case: str, monkeypatch: pytest.MonkeyPatch) -> Engine:  # type: ignore[override]
        if case == "small window":
            loaded = replace(engine._loaded(), window=AdmissionLimit(3, 10**6))
            monkeypatch.setattr(engine, "_loaded", lambda: loaded)
        return engine

    @pytest.fixture
    def model(self, llama: Model) -> Model:
        return llama

    @pytest.fixture
    def unloaded(self, llama: Model, spec: JobSpec) -> Engine:
        return support.make_engine(llama, spec)

    @pytest.fixture
    def make_batch(self) -> MakeBatch:
        return lambda first, n: support.texts(*(f"number {row}" for row in range(first, first + n)), first=first)

    def same(self, left: Any, right: Any) -> bool:
        # How much of a prompt was cached depends on what ran before it.
        if isinstance(left, dict):
            left, right = ({k: v for k, v in side.items() if k != "cached_tokens"} for side in (left, right))
        return super().same(left, right)


# ---- what it answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["generate", "chat"])
def test_answers_are_those_of_vllm_itself(engine: VllmEngine, beside: Beside, task: str) -> None:
    expected = beside.reference()[task]
    if task == "generate":
        spec, batch = support.make_spec(), support.texts(*support.PROMPTS)
    else:
        spec = support.make_spec("chat", column="talk")
        kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
        batch = support.column(pa.array(support.CONVERSATIONS, kind), "talk")
    prompts = [p for ready, _ in Prompts(engine._loaded().running.llm, spec, room=1).read(batch, 5) for p in ready]
    assert [prompt.tokens for prompt in prompts] == [tokens for tokens, *_ in expected]
    answers = run(engine, spec, [batch])
    for row, (tokens, text, made, reason) in enumerate(expected):
        answer = answers[row]
        assert answer.pop("cached_tokens") <= len(tokens)
        assert answer == {
            "output": text,
            "finish_reason": reason,
            "prompt_tokens": len(tokens),
            "completion_tokens": made,
        }


def test_ways_to_write_the_same_chat(engine: VllmEngine) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a lake."}]
    as_list = pa.array([turns], pa.list_(pa.struct({"role": pa.string(), "name": pa.string(), "content": pa.string()})))
    parts = [turns[0], {"role": "user", "content": [{"type": "text", "text": "Name a lake."}]}]
    as_json = pa.array([json.dumps(turns), json.dumps(parts)])
    templates = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a {text}."}]
    found = [
        *run(engine, support.make_spec("chat", column="t"), [support.column(as_list, "t")]).values(),
        *run(engine, support.make_spec("chat", column="t"), [support.column(as_json, "t")]).values(),
        *run(engine, support.make_spec("chat", messages=templates), [support.texts("lake")]).values(),
    ]
    assert len(found) == 4
    assert len({(answer["output"], answer["prompt_tokens"]) for answer in found}) == 1
    alone = run(engine, support.make_spec("chat", prompt="Name a {text}."), [support.texts("lake")])
    assert 0 < alone[0]["prompt_tokens"] < found[0]["prompt_tokens"]


def test_several_answers_to_a_row(engine: VllmEngine) -> None:
    spec = support.make_spec(sampling={"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 6, "ignore_eos": True})
    answers = run(engine, spec, [support.texts("one", "two")])
    for answer in answers.values():
        assert len(answer["outputs"]) == 3
        assert len(set(answer["outputs"])) > 1
        assert answer["completion_tokens"] == 18
        assert answer["finish_reason"] == "length"
        assert "output" not in answer


def test_sampling_reaches_vllm(engine: VllmEngine) -> None:
    def answer(**sampling: Any) -> dict[str, Any]:
        spec = support.make_spec(sampling={"temperature": 0, **sampling})
        return dict(run(engine, spec, [support.texts("Name a river.")])[0])

    chosen = answer(structured_outputs={"choice": ["the Rhine", "the Nile"]}, max_tokens=20)
    assert chosen["output"] in ("the Rhine", "the Nile")
    assert chosen["finish_reason"] == "stop"
    plain = answer(max_tokens=8)
    assert plain["completion_tokens"] == 8
    assert answer(max_tokens=8, stop=plain["output"][2])["output"] == plain["output"][:2]
    token = engine._loaded().running.llm.get_tokenizer()("a", add_special_tokens=False)["input_ids"][0]
    # As JSON has it: the token is text.
    assert answer(max_tokens=4, logit_bias={str(token): 100})["output"] == "aaaa"
    assert answer(max_tokens=None, ignore_eos=True)["finish_reason"] == "length"


def test_columns_of_every_kind(engine: VllmEngine) -> None:
    columns = {
        "i": pa.array([7], pa.int32()),
        "f": pa.array([0.5]),
        "b": pa.array([True]),
        "d": pa.array([decimal.Decimal("1.50")]),
        "t": pa.array([datetime.date(2026, 3, 14)]),
        "ns": pa.array([1], pa.timestamp("ns")),
        "w": pa.array(["é"]).dictionary_encode(),
        "v": pa.array(["view"], pa.string_view()),
        "raw": pa.array(["ü".encode()], pa.binary()),
    }
    batch = RowBatch(np.arange(1), pa.RecordBatch.from_pydict(columns))
    given = "7|0.5|true|1.50|2026-03-14|1970-01-01 00:00:00.000000001|é|view|ü"
    templated = run(engine, support.make_spec(prompt="|".join(f"{{{name}}}" for name in columns)), [batch])
    plain = run(engine, support.make_spec(prompt=given), [batch])
    assert templated[0]["prompt_tokens"] == plain[0]["prompt_tokens"]
    assert templated[0]["output"] == plain[0]["output"]


def test_stats_count_tokens_and_cached_prefixes(engine: VllmEngine) -> None:
    before = engine.stats()
    # Blocks of the cache are 128 tokens long: only a prefix that fills one can be found again.
    spec = support.make_spec(prompt="The parcel arrived, and its number is the following. " * 12 + "{text}")
    first = run(engine, spec, [support.texts("1")])[0]
    second = run(engine, spec, [support.texts("2", None)])[0]
    assert first["prompt_tokens"] > 128
    assert second["cached_tokens"] == 128
    after = engine.stats()
    assert after["tokens"]["prompt"] - before["tokens"]["prompt"] == first["prompt_tokens"] + second["prompt_tokens"]
    assert after["tokens"]["completion"] - before["tokens"]["completion"] == 24
    assert after["rows"]["succeeded"] - before["rows"]["succeeded"] == 2
    assert after["rows"]["failed"] - before["rows"]["failed"] == 1
    assert 0 < after["prefix_hit_rate"] < 1
    # vLLM's sizes for offline use on a CPU, not those for serving.
    assert after["settings"]["max_num_seqs"] == 256
    assert after["settings"]["max_num_batched_tokens"] == 4096
    assert after["settings"]["window"] == 512
    assert after["settings"]["enable_prefix_caching"] is True
    assert after["settings"]["kv_blocks"] > 0


# ---- what runs, and in which order -------------------------------------------------------------------------------


def measured(engine: VllmEngine, spec: JobSpec, batches: list[RowBatch]) -> tuple[dict[int, Any], dict[str, float]]:
    """Answers by row, and the sums of what the call measured."""
    found = list(engine.infer(spec, batches, Cancellation()))
    sums = {name: sum(batch.measured.get(name, 0) for batch in found) for batch in found for name in batch.measured}
    return collect(found), sums


def test_the_same_prompt_is_run_once(engine: VllmEngine) -> None:
    words = ["one", "two", "one", "three", "one", "two"]
    answers, sums = measured(
        engine, support.make_spec(), [support.texts(*words[:4]), support.texts(*words[4:], first=4)]
    )
    assert sorted(answers) == list(range(6))
    for row, word in enumerate(words):
        first = words.index(word)
        assert answers[row]["output"] == answers[first]["output"]
        assert answers[row]["completion_tokens"] == answers[first]["completion_tokens"] == 12
        if row != first:
            # Nothing of it was computed for this row.
            assert answers[row]["cached_tokens"] == answers[row]["prompt_tokens"]
    assert sums["copied_rows"] == 3
    assert sums["copied_completion_tokens"] == sums["completion_tokens"] == 36
    # What is drawn at random is drawn for each row.
    drawn = support.make_spec(sampling={"temperature": 1.0, "max_tokens": 12, "ignore_eos": True})
    answers, sums = measured(engine, drawn, [support.texts(*["one"] * 8)])
    assert sums["copied_rows"] == 0
    assert len({answer["output"] for answer in answers.values()}) > 1
    # A seed settles it.
    seeded = support.make_spec(sampling={"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "seed": 7})
    answers, sums = measured(engine, seeded, [support.texts(*["one"] * 8)])
    assert sums["copied_rows"] == 7
    assert len({answer["output"] for answer in answers.values()}) == 1


@pytest.mark.parametrize("order", ["auto", "input"])
def test_prompts_that_begin_alike_run_together(engine: VllmEngine, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are put into vLLM in that order; the answers are the same, whatever the order."""
    llm = engine._loaded().running.llm
    added: list[int] = []
    original = llm.add_request

    def recorded(name: str, *args: Any, **more: Any) -> Any:
        added.append(int(name.rpartition("-")[2]))
        return original(name, *args, **more)

    monkeypatch.setattr(llm, "add_request", recorded)
    # Blocks of the cache are 128 tokens long.
    prefixes = [f"{number}: " + "The parcel arrived, and its number is the following. " * 12 for number in range(4)]
    rows = [f"{prefixes[row % 4]} {row}" for row in range(16)]
    spec = support.make_spec(order=order, sampling={**support.GREEDY, "max_tokens": 4})
    answers, sums = measured(engine, spec, [support.texts(*rows)])
    assert not failures(answers)
    assert sorted(answers) == sorted(added) == list(range(16))
    if order == "input":
        assert added == list(range(16))
    else:
        assert [row % 4 for row in added] == sorted(row % 4 for row in added)
    alone = run(engine, spec, [support.texts(rows[5], first=5)])
    assert alone[5]["output"] == answers[5]["output"]
    assert sums["engine_steps"] > 0
    assert 0 < sums["running_requests"] <= 16 * sums["engine_steps"]
    assert 0 < sums["kv_cache_use"] < sums["engine_steps"]
    assert sums["render_seconds"] > 0


def test_a_source_that_is_slow_does_not_keep_rows_back(engine: VllmEngine) -> None:
    """What is there runs, although more could come that would be worth waiting for."""
    answered = threading.Event()

    def batches() -> Iterator[RowBatch]:
        yield support.texts("one", "two")
        assert answered.wait(STOP)
        yield support.texts("three", first=2)

    rows = []
    for result in engine.infer(support.make_spec(), batches(), Cancellation()):
        rows += result.rows.tolist()
        if len(rows) == 2:
            answered.set()
    assert sorted(rows) == [0, 1, 2]


# ---- rows that fail ----------------------------------------------------------------------------------------------


def test_bad_rows_fail_alone(engine: VllmEngine) -> None:
    bad = pa.array([b"good", b"\xff\xfe", None, b"", b"word " * 2000, b"fine"], pa.binary())
    answers = run(engine, support.make_spec(), [support.column(bad)])
    assert failures(answers) == {
        1: RowErrorCode.INVALID_UTF8,
        2: RowErrorCode.MISSING_VALUE,
        3: RowErrorCode.INVALID_VALUE,
        4: RowErrorCode.PROMPT_TOO_LONG,
    }
    assert answers[0]["completion_tokens"] == answers[5]["completion_tokens"] == 12


def test_a_string_column_may_hold_bytes_that_are_not_utf8(engine: VllmEngine) -> None:
    for kind in (pa.string(), pa.large_string()):
        binary = pa.array([b"good", b"\xc3\x28"], pa.large_binary() if kind == pa.large_string() else pa.binary())
        broken = pa.Array.from_buffers(kind, 2, binary.buffers())
        answers = run(engine, support.make_spec(), [support.column(broken)])
        assert failures(answers) == {1: RowErrorCode.INVALID_UTF8}


def test_the_longest_prompt_that_fits(engine: VllmEngine) -> None:
    """One token must be left for the answer; an answer that has no more room than that is cut."""
    word = " the"  # one token
    fits = word * (support.CONTEXT - 2)  # and <s> before it
    answers = run(engine, support.make_spec(), [support.texts(fits, fits + word)])
    assert answers[0]["prompt_tokens"] == support.CONTEXT - 1
    # An answer of exactly one token may still be ended by vLLM for either reason; it is the context's end here.
    assert (answers[0]["completion_tokens"], answers[0]["finish_reason"]) == (1, "length")
    assert failures(answers) == {1: RowErrorCode.PROMPT_TOO_LONG}
    assert f"must fit into {support.CONTEXT} tokens" in answers[1].message


@pytest.mark.parametrize(("asked", "kept"), [(12, support.CONTEXT - 12), (10_000, support.CONTEXT // 2)])
def test_overlong_prompts_are_cut_when_asked(engine: VllmEngine, asked: int, kept: int) -> None:
    spec = support.make_spec(overlong="truncate", sampling={**support.GREEDY, "max_tokens": asked, "ignore_eos": True})
    answers = run(engine, spec, [support.texts("short", "the " * 5000)])
    assert not failures(answers)
    assert answers[1]["prompt_tokens"] == kept
    assert answers[1]["completion_tokens"] == support.CONTEXT - kept


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ("not json", "not JSON"),
        ("[]", "at least one message"),
        ('{"role": "user", "content": "x"}', "list"),
        ("[7]", "message 0: must be an object"),
        ('[{"role": "user", "content": "x"}, {"role": "boss", "content": "x"}]', "message 1: role must be one of"),
        ('[{"role": "user"}]', "content must be text"),
        (
            '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]',
            "other than text",
        ),
        ('[{"role": "tool", "content": "x", "tool_call_id": "1"}]', "system, user and assistant messages only"),
    ],
)
def test_messages_that_cannot_be_one(engine: VllmEngine, talk: str, words: str) -> None:
    good = '[{"role": "user", "content": "hello"}]'
    answers = run(engine, support.make_spec("chat", column="t"), [support.column(pa.array([talk, good]), "t")])
    assert failures(answers) == {0: RowErrorCode.INVALID_VALUE}
    assert words in answers[0].message


def test_half_a_surrogate_pair_is_not_text(engine: VllmEngine) -> None:
    talk = pa.array(['[{"role": "user", "content": "\\ud83d"}]'])
    answers = run(engine, support.make_spec("chat", column="t"), [support.column(talk, "t")])
    assert failures(answers) == {0: RowErrorCode.INVALID_UTF8}


# ---- jobs that vLLM refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"temperature": 5}, "sampling.temperature"),
        ({"stop_token_ids": [10**6]}, "sampling.stop_token_ids"),
        ({"structured_outputs": {"regex": "("}}, "sampling"),
    ],
)
def test_what_only_vllm_can_judge_is_refused_before_the_first_row(
    engine: VllmEngine, sampling: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidJob) as caught:
        run(engine, support.make_spec(sampling=sampling), stream(lambda *_: pytest.fail("a row was read"), 5, 5))
    assert caught.value.field == field
    assert "vLLM refuses it" in caught.value.message


def test_a_model_without_a_chat_template(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._loaded().running.llm.get_tokenizer(), "chat_template", None)
    prompts = Prompts(engine._loaded().running.llm, support.make_spec("chat", prompt="{text}"), room=1)
    with pytest.raises(InvalidModel, match="no chat template"):
        prompts.check_chat_template()


# ---- stopping and dying ------------------------------------------------------------------------------------------


def test_cancel_and_close_take_the_requests_out_of_vllm(engine: VllmEngine) -> None:
    long = support.make_spec(sampling={"max_tokens": 60, "ignore_eos": True, "n": 2})
    cancel = Cancellation()
    with closing(results(engine, long, support.endless(), cancel)) as found:
        next(found)
        assert inside(engine) > 0
        cancel.cancel("test")
        assert list(found) == []
        assert inside(engine) == 0
    with closing(results(engine, long, support.endless())) as found:
        next(found)
    assert inside(engine) == 0
    # Not even in the engine's own process: an answer comes at once only when nothing runs before it.
    assert len(run(engine, support.make_spec(), [support.texts("a")])) == 1


def test_rows_that_take_too_long_are_aborted(engine: VllmEngine) -> None:
    long = support.make_spec(sampling={"max_tokens": 60, "ignore_eos": True}, request_timeout=0.001)
    rows = support.texts("a", "b")
    with closing(results(engine, long, [rows])) as found:
        failures = [failure for batch in found for failure in batch.failures]
    assert [(failure.row, failure.code) for failure in sorted(failures, key=lambda f: f.row)] == [
        (0, "request_timeout"),
        (1, "request_timeout"),
    ]
    assert inside(engine) == 0
    patient = support.make_spec(request_timeout=3600.0)
    assert len(run(engine, patient, [rows])) == 2


def children_of(script: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a script that has loaded an engine and has rows in it."""
    assert script.stdin is not None and script.stdout is not None and script.stderr is not None
    script.stdin.write("\n")
    script.stdin.flush()
    assert script.stdout.readline() == "the script runs\n", script.stderr.read()
    children = [psutil.Process(pid) for pid in json.loads(script.stdout.readline())]
    assert {"VLLM::EngineCore", "VLLM::EngineCor"} & {child.name() for child in children}
    return children


@pytest.fixture
def script(loaded: VllmEngine, beside: Beside, request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    """A script without a ``__main__`` guard, which prints little; the engine must not print or need more."""
    return beside.scripts[request.param]


@pytest.mark.parametrize("script", ["killed"], indirect=True)
def test_kill_9_leaves_no_process(script: subprocess.Popen[str]) -> None:
    children = children_of(script)
    script.kill()
    try:
        out, _ = script.communicate()
        _, alive = psutil.wait_procs(children, timeout=STOP)
        assert not alive
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    assert out == ""


@pytest.mark.parametrize("script", ["closed"], indirect=True)
def test_closing_under_a_call(script: subprocess.Popen[str]) -> None:
    """The call raises, the processes end, and nobody has said anything."""
    assert script.stdin is not None and script.stdout is not None
    # multiprocessing keeps one of its own for the life of the program.
    children = [child for child in children_of(script) if "resource_tracker" not in " ".join(child.cmdline())]
    script.stdin.write("\n")
    script.stdin.flush()
    assert script.stdout.readline() == "the vLLM engine was closed while rows were in it\n"
    _, alive = psutil.wait_procs(children, timeout=STOP)
    assert not alive
    out, errors = script.communicate("\n")
    assert script.returncode == 0
    assert (out, errors) == ("", "")


def test_models_that_vllm_cannot_load(llama: Model, tmp_path: Path) -> None:
    """The reason is vLLM's own, and nothing is left running: neither of a refusal here nor of one in its process."""
    assert llama.path is not None
    before = set(psutil.Process().children(recursive=True))

    def reason(options: dict[str, Any]) -> str:
        spec = support.make_spec(engine_options={**support.OPTIONS, **options})
        engine = support.make_engine(support.model_at(tmp_path), spec)
        with pytest.raises(InvalidModel) as caught:
            engine.load()
        engine.close()
        assert set(psutil.Process().children(recursive=True)) <= before
        assert "\n" not in caught.value.message
        return caught.value.message

    for file in llama.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "max_model_len" in reason({"max_model_len": 10**6})
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    assert "weights were not initialized from checkpoint" in reason({})
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaOfMyOwnForCausalLM"))
    assert "LlamaOfMyOwnForCausalLM" in reason({})


def test_a_dead_engine_process(loaded: VllmEngine) -> None:
    """Calls that wait raise, later calls raise, and closing leaves nothing. The last test: it kills the engine."""
    running = loaded._loaded().running
    assert running is not None
    (core,) = running.pids
    family = [
        psutil.Process(core),
        *psutil.Process(core).children(recursive=True),
        psutil.Process(running._guardian.pid),
    ]
    # Of two jobs: the second shard of one would wait for the end of the first.
    specs = [support.make_spec(sampling={"max_tokens": n, "ignore_eos": True}) for n in (200, 199)]
    begun = threading.Barrier(3)

    def call(spec: JobSpec) -> EngineDead:
        found = loaded.infer(spec, support.endless(), Cancellation())
        next(found)
        begun.wait()
        with pytest.raises(EngineDead) as caught:
            for _ in found:
                pass
        return caught.value

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(call, spec) for spec in specs]
        begun.wait()
        os.kill(core, signal.SIGKILL)
        for waiting in calls:
            assert "vLLM's engine process has ended" in str(waiting.result())
            assert waiting.result().blame is Blame.OWN
    with pytest.raises(EngineDead) as caught:
        run(loaded, specs[0], [support.texts("a")])
    assert caught.value.blame is Blame.OTHERS
    loaded.close()
    loaded.close()
    _, alive = psutil.wait_procs(family, timeout=STOP)
    assert not alive
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vllm-")]
    with pytest.raises(EngineDead, match="not loaded"):
        run(loaded, specs[0], [support.texts("a")])
