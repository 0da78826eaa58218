"""Answers kept across jobs (``cache``): what is kept, under which key, and that nothing else comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.tiny_llama import build_llama
from pipeline.engines.base import Cancellation, EngineContext, RowBatch, RowFailure
from pipeline.engines.vllm import benchmark, cached_rows
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.engines.vllm.options.engine_args import ENGINE
from pipeline.models.model import Model
from pipeline.result_cache.cache import ResultCaches
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidJob
from storage.objects.store import ObjectStore
from tests.engines.vllm import support
from tests.engines.vllm.models.tiny_adapter import build_adapter

LORA: dict[str, Any] = {**support.OPTIONS, "enable_lora": True}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return support.model_at(build_llama(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def loaded(llama: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """One engine for all tests: it takes adapters, so that they can be told apart."""
    engine = VllmEngine(llama, support.make_spec().task, LORA, EngineContext(tmp_path_factory.mktemp("cache")))
    engine.load()
    yield engine
    engine.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def engine(loaded: VllmEngine, root: Path) -> VllmEngine:
    return keeping_at(loaded, str(root))


def keeping_at(engine: VllmEngine, root: str, store: ObjectStore | None = None) -> VllmEngine:
    """As another process would: it knows of nothing that is kept there yet."""
    caches = ResultCaches(store or ObjectStore(retry_seconds=1), root, 2**20)
    engine._context = replace(engine._context, results=caches)
    return engine


def spec_of(**fields: Any) -> JobSpec:
    return support.make_spec(**{"engine_options": dict(LORA), "cache": "on", **fields})


class Ran:
    """What a call gave: row → values, row → failure, and the sums of what was measured."""

    def __init__(self, engine: VllmEngine, spec: JobSpec, batches: list[RowBatch]) -> None:
        self.values: dict[int, dict[str, Any]] = {}
        self.failures: dict[int, RowFailure] = {}
        self.measured: dict[str, float] = {}
        for batch in engine.infer(spec, iter(batches), Cancellation()):
            for failure in batch.failures:
                assert failure.row not in self.failures
                self.failures[failure.row] = failure
            found = [] if batch.values is None else batch.values.to_pylist()
            assert len(found) == len(batch.rows) and not self.values.keys() & set(batch.rows.tolist())
            self.values |= dict(zip(batch.rows.tolist(), found, strict=True))
            for name, number in batch.measured.items():
                self.measured[name] = self.measured.get(name, 0) + number

    def counted(self, *names: str) -> tuple[int, ...]:
        return tuple(int(self.measured.get(f"cache_{name}", 0)) for name in names)

    def answers(self) -> dict[int, dict[str, Any]]:
        """Without what a cached result says of its own: that no token of its prompt was computed."""
        return {
            row: {name: value for name, value in found.items() if name != "cached_tokens"}
            for row, found in sorted(self.values.items())
        }


def prompts(*, first: int = 0) -> RowBatch:
    return support.texts(*support.PROMPTS, first=first)


@pytest.mark.vllm
def test_what_was_answered_before_comes_back_token_for_token(engine: VllmEngine, root: Path) -> None:
    alone = Ran(engine, spec_of(cache="off"), [prompts()])
    assert not root.exists() and "cache_misses" not in alone.measured
    one = Ran(engine, spec_of(), [prompts()])
    n = len(support.PROMPTS)
    assert one.counted("hits", "misses", "writes", "failures") == (0, n, n, 0)
    two = Ran(engine, spec_of(), [prompts()])
    assert two.counted("hits", "misses", "writes", "failures") == (n, 0, 0, 0)
    assert alone.answers() == one.answers() == two.answers()
    # Nothing went through the engine, and the row says so as a copied one does.
    assert not two.measured.get("prompt_tokens") and not two.measured.get("completion_tokens")
    assert all(found["cached_tokens"] == found["prompt_tokens"] for found in two.values.values())
    assert two.measured["cache_hit_completion_tokens"] == one.measured["completion_tokens"]
    # Another order, other neighbours, and another process.
    keeping_at(engine, str(root))
    mixed = [*reversed(support.PROMPTS), "a new prompt"]
    three = Ran(engine, spec_of(), [support.texts(*mixed)])
    assert three.counted("hits", "misses", "writes") == (n, 1, 1)
    texts = {prompt: one.answers()[row] for row, prompt in enumerate(support.PROMPTS)}
    assert all(three.answers()[row] == texts[prompt] for row, prompt in enumerate(mixed[:-1]))


@pytest.mark.vllm
def test_duplicates_within_a_shard_are_kept_once_and_come_back_each(engine: VllmEngine) -> None:
    rows = support.texts("same", "same", "other", "same", None)
    one = Ran(engine, spec_of(), [rows])
    assert one.counted("hits", "misses", "writes") == (0, 4, 2) and one.measured["copied_rows"] == 2
    two = Ran(engine, spec_of(), [rows])
    assert two.counted("hits", "misses", "writes") == (4, 0, 0)
    assert one.answers() == two.answers() and sorted(two.failures) == [4]  # a failed row is not kept


DIFFERENT: list[dict[str, Any]] = [
    {"tenant": "other"},
    {"sampling": {"temperature": 0, "max_tokens": 11}},
    {"sampling": {**support.GREEDY, "stop": "a"}},
    {"sampling": {**support.GREEDY, "logprobs": 1}},
    {"sampling": {**support.GREEDY, "seed": 1, "temperature": 1}},
    {"engine_options": {**LORA, "max_model_len": 255}},
    {"prompt": "{text}!"},
    {"task": "chat", "prompt": "{text}"},
]


@pytest.mark.vllm
@pytest.mark.parametrize("other", DIFFERENT, ids=lambda fields: " ".join(map(str, fields.values()))[:40])
def test_whatever_changes_an_answer_changes_its_key(engine: VllmEngine, other: dict[str, Any]) -> None:
    rows = [support.texts("one", "two")]
    assert Ran(engine, spec_of(), rows).counted("writes") == (2,)
    assert Ran(engine, spec_of(**other), rows).counted("hits", "misses") == (0, 2)
    assert Ran(engine, spec_of(**other), rows).counted("hits", "misses") == (2, 0)
    assert Ran(engine, spec_of(), rows).counted("hits", "misses") == (2, 0)


@pytest.mark.vllm
def test_what_only_says_how_fast_does_not(engine: VllmEngine) -> None:
    rows = [support.texts("one", "two")]
    Ran(engine, spec_of(), rows)
    same = spec_of(
        engine_options={**LORA, "max_num_seqs": 3, "window": 2, "kv_cache_memory_bytes": 2**27},
        sampling={**support.GREEDY, "stop": None},
        order="input",
        output="elsewhere",
        prompt="{text}",
        metadata={"a": "b"},
    )
    assert Ran(engine, same, rows).counted("hits", "misses") == (2, 0)


@pytest.mark.vllm
def test_another_model_or_another_release_of_vllm_is_another_namespace(engine: VllmEngine, llama: Model) -> None:
    rows = [support.texts("one")]
    Ran(engine, spec_of(), rows)
    versions = engine._versions
    try:
        engine._model = replace(llama, digest="1" * 64)
        assert Ran(engine, spec_of(), rows).counted("hits") == (0,)
        engine._model = llama
        engine._versions = {**versions, "vllm": "0.33.0"}
        assert Ran(engine, spec_of(), rows).counted("hits") == (0,)
    finally:
        engine._model, engine._versions = llama, versions
    assert Ran(engine, spec_of(), rows).counted("hits") == (1,)


@pytest.mark.vllm
def test_rows_with_sampling_of_their_own(engine: VllmEngine) -> None:
    table = pa.record_batch(
        {"text": ["a", "b", "c", "d"], "t": [0.0, 0.0, 1.0, 1.0], "s": [None, None, None, 7], "m": [3, 4, 3, 3]},
        schema=pa.schema({"text": pa.string(), "t": pa.float64(), "s": pa.int64(), "m": pa.int64()}),
    )
    rows = [RowBatch(support.texts(*"abcd").rows, table)]
    spec = spec_of(sampling={}, sampling_columns={"temperature": "t", "seed": "s", "max_tokens": "m"})
    one, two = Ran(engine, spec, rows), Ran(engine, spec, rows)
    # Row 2 is drawn at random: it is neither kept nor looked up.
    assert one.counted("misses", "writes", "passed") == (3, 3, 1)
    assert two.counted("hits", "misses", "passed") == (3, 0, 1)
    del one.values[2], two.values[2]
    assert one.answers() == two.answers()
    other = [RowBatch(rows[0].rows, table.set_column(3, "m", pa.array([4, 4, 3, 3])))]
    assert Ran(engine, spec, other).counted("hits", "misses") == (2, 1)


@pytest.mark.vllm
def test_draws_at_random_come_again_only_when_asked(engine: VllmEngine) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 12}
    with pytest.raises(InvalidJob, match="drawn at random"):
        cached_rows.check(spec_of(sampling=sampling))
    spec = spec_of(sampling=sampling, cache="sampled")
    cached_rows.check(spec)
    one, two = Ran(engine, spec, [prompts()]), Ran(engine, spec, [prompts()])
    assert two.counted("hits", "misses") == (len(support.PROMPTS), 0)
    assert one.answers() == two.answers()
    assert Ran(engine, spec_of(sampling=sampling, cache="off"), [prompts()]).answers() != one.answers()


@pytest.mark.vllm
def test_several_answers_log_probabilities_and_schemas(engine: VllmEngine) -> None:
    several = spec_of(sampling={"n": 3, "seed": 5, "max_tokens": 6, "logprobs": 2})
    one, two = Ran(engine, several, [prompts()]), Ran(engine, several, [prompts()])
    assert two.counted("hits", "misses") == (len(support.PROMPTS), 0) and one.answers() == two.answers()
    assert two.values[0]["logprobs"] and len(two.values[0]["outputs"]) == 3
    # Of these answers some are cut off before they are JSON: row errors, which are not kept.
    schema = spec_of(sampling={**support.GREEDY, "max_tokens": 9, "structured_outputs": {"json": SCHEMA}})
    three, four = Ran(engine, schema, [prompts()]), Ran(engine, schema, [prompts()])
    assert four.counted("hits", "misses") == (len(three.values), len(three.failures))
    assert three.answers() == four.answers() and three.failures.keys() == four.failures.keys()
    assert all(json.loads(found["output"])["a"] in (1, 2) for found in four.values.values())


@pytest.mark.vllm
def test_an_adapter_is_known_by_its_content(engine: VllmEngine, tmp_path: Path) -> None:
    names = {name: str(build_adapter(tmp_path / name, seed=at)) for at, name in enumerate(("a", "b"))}
    rows = [support.texts("one", "two", "three")]

    def counted(**adapters: str) -> tuple[int, ...]:
        return Ran(engine, spec_of(adapters=adapters), rows).counted("hits", "misses")

    assert counted() == (0, 3)
    assert counted(x=names["a"]) == (0, 3)
    assert counted(x=names["b"]) == (0, 3)
    assert counted(y=names["a"]) == (3, 0)  # the same weights under another name
    assert counted() == (3, 0)


@pytest.mark.vllm
@pytest.mark.parametrize("damage", ["empty", "torn", "flipped", "other", "moved", "folder"])
def test_damaged_segments_cost_answers_and_nothing_else(engine: VllmEngine, root: Path, damage: str) -> None:
    one = Ran(engine, spec_of(), [prompts()])
    (segment,) = root.rglob("*.parquet")
    content = segment.read_bytes()
    if damage == "empty":
        segment.write_bytes(b"")
    elif damage == "torn":
        segment.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        chunk = pq.ParquetFile(segment).metadata.row_group(0).column(2)
        at = chunk.dictionary_page_offset + chunk.total_compressed_size // 2
        segment.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
    elif damage == "other":
        pq.write_table(pa.table({"a": list(range(len(support.PROMPTS)))}), segment)
    elif damage == "moved":
        # Another tenant's answers, put where these are looked for.
        Ran(engine, spec_of(tenant="other"), [prompts()])
        (theirs,) = (path for path in root.rglob("*.parquet") if path != segment)
        segment.write_bytes(theirs.read_bytes())
    else:
        segment.unlink()
        segment.mkdir()
    keeping_at(engine, str(root))
    two = Ran(engine, spec_of(), [prompts()])
    assert two.counted("hits", "misses", "failures") == (0, len(support.PROMPTS), 0)
    assert one.answers() == two.answers()
    assert Ran(engine, spec_of(), [prompts()]).counted("hits") == (len(support.PROMPTS),)


@pytest.mark.vllm
def test_a_place_that_is_no_folder_is_done_without(engine: VllmEngine, root: Path) -> None:
    root.write_text("in the way")
    said: list[str] = []
    caches = ResultCaches(ObjectStore(retry_seconds=1), str(root), 2**20, said.append)
    engine._context = replace(engine._context, results=caches)
    for failures in (1, 0):  # the second time it is left alone
        ran = Ran(engine, spec_of(), [prompts()])
        assert len(ran.values) == len(support.PROMPTS) and ran.counted("hits", "writes") == (0, 0)
        assert ran.counted("failures")[0] == failures
    (once,) = said
    assert "cached results cannot be" in once and str(root) in once


@pytest.mark.vllm
def test_answers_that_vanish_while_they_are_looked_up_are_computed(engine: VllmEngine, root: Path) -> None:
    one = Ran(engine, spec_of(), [prompts()])
    (segment,) = root.rglob("*.parquet")

    def batches() -> Iterator[RowBatch]:
        segment.unlink()
        yield prompts()

    found: dict[int, Any] = {}
    for batch in engine.infer(spec_of(), batches(), Cancellation()):
        found |= dict(zip(batch.rows.tolist(), batch.values.to_pylist() if batch.values else [], strict=True))
    assert {row: value["output"] for row, value in found.items()} == {
        row: value["output"] for row, value in one.values.items()
    }


@pytest.mark.vllm
def test_the_engine_measures_itself(loaded: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"SECONDS": 0.01, "REPEATS": 1, "CONCURRENCIES": (1, 4), "_MATRIX": 64, "_BLOCK": (2**16, 2**20)}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    found = loaded.benchmark(support.make_spec(engine_options=LORA), iter(()))
    assert found is not None and json.dumps(found)
    rows = found["speeds"]
    assert {row["what"] for row in rows} == {"prefill", "decode"}
    assert all(row["tokens_per_second"] > 0 and row["limit"] > 0 for row in rows)
    assert all(row["prompt_tokens"] < support.CONTEXT for row in rows)
    assert found["kv_cache_tokens"] > support.CONTEXT and found["startup_seconds"] > 0
    assert found["weights"]["n_bytes"] == 4 * found["weights"]["parameters"]
    assert found["machine"]["bandwidth"] > 0 and found["settings"]["max_num_seqs"] > 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sampling": {"temperature": 0.5}}, "drawn at random"),
        ({"sampling": {}}, "drawn at random"),
        ({"image_column": "image"}, "images"),
        ({"audio_column": "sound"}, "sounds"),
        ({"video_column": "video"}, "videos"),
        ({"engine_options": {"tokenizer": "elsewhere"}}, "'tokenizer'"),
        ({"engine_options": {"model_loader_extra_config": {"tensorizer_uri": "x"}}}, "'model_loader_extra_config'"),
        ({"engine_options": {"speculative_config": {"model": "elsewhere"}}}, "'speculative_config'"),
    ],
)
def test_what_cannot_be_kept_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidJob, match=said) as raised:
        cached_rows.check(support.make_spec(**{"cache": True, **fields}))
    assert raised.value.field == "cache"


def test_every_option_that_is_left_out_of_a_key_exists() -> None:
    assert cached_rows.SPEED - cached_rows.OWN_OPTIONS.keys() <= set(ENGINE.settable)
    assert set(ENGINE.having("cache").values()) == {"speed", "outside"}
