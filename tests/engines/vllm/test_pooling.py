"""Embed, classify and score on vLLM: the numbers are those of ``LLM.embed``, ``LLM.classify`` and ``LLM.score``."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from examples.tiny_llama import CORPUS, SIZES, build_llama
from pipeline.engines.base import Cancellation, EngineContext, RowBatch, RowFailure
from pipeline.engines.testing import EngineContract, MakeBatch, run
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.models.model import Model
from pipeline.result_cache.cache import ResultCaches
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec, Task, parse
from storage.errors import InvalidJob, InvalidModel
from storage.objects.store import ObjectStore
from tests.engines.vllm import support
from tests.engines.vllm.reference import Question, Reference

pytestmark = pytest.mark.vllm

OPTIONS = {"dtype": "float32", "max_model_len": 64}
TEXTS = [
    "The parcel arrived, and it weighs 3.75 kilograms.",
    "Name three rivers.",
    "x",
    "中文 and \U0001f600",
    "the " * 20,
]
OTHERS = ["What does the parcel weigh?", "The Rhine and the Nile.", "x", "y", "winter"]
LONG = "the " * 500
LABELS = ["bad", "good", "neither"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pooling")
    build_llama(folder / "embed")
    build_classifier(folder / "classify", folder / "embed")
    build_cross_encoder(folder / "score")
    return folder


def build_classifier(path: Path, llama: Path) -> None:
    """A Llama with a head of three labels."""
    transformers: Any = importlib.import_module("transformers")
    torch: Any = importlib.import_module("torch")
    torch.manual_seed(3)
    config = transformers.LlamaConfig.from_pretrained(llama, num_labels=3, id2label=dict(enumerate(LABELS)))
    transformers.LlamaForSequenceClassification(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(path)


def build_cross_encoder(path: Path) -> None:
    """A BERT with one label, which tells the two texts of a pair apart by their token types."""
    transformers: Any = importlib.import_module("transformers")
    torch: Any = importlib.import_module("torch")
    tokenizers: Any = importlib.import_module("tokenizers")
    made = tokenizers.BertWordPieceTokenizer()
    made.train_from_iterator(CORPUS.splitlines(), vocab_size=300, show_progress=False)
    path.mkdir()
    made.save(str(path / "whole.json"))
    tokenizer = transformers.BertTokenizerFast(tokenizer_file=str(path / "whole.json"), model_max_length=64)
    tokenizer.save_pretrained(path)
    size = SIZES["tiny"]
    config = transformers.BertConfig(
        **size, vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=64, initializer_range=0.3
    )
    torch.manual_seed(4)
    transformers.BertForSequenceClassification(config).save_pretrained(path)


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    cut = {"tokenization_kwargs": {"truncate_prompt_tokens": -1}}
    asked: dict[str, list[Question]] = {
        "embed": [
            ("embed", [TEXTS], None, None),
            ("embed", [[LONG], cut], None, None),
            ("score", [TEXTS, OTHERS], None, None),
        ],
        "classify": [("classify", [TEXTS], None, None)],
        "score": [("score", [TEXTS, OTHERS], None, None), ("score", [[LONG], ["x"], cut], None, None)],
    }
    options = {**OPTIONS, "runner": "pooling"}
    engines = [(str(folder / name), options, questions) for name, questions in asked.items()]
    reference = Reference(tmp_path_factory.mktemp("reference"), engines)
    yield reference
    reference.close()


def make_spec(task: str, **fields: Any) -> JobSpec:
    given = {"input": "in.parquet", "output": "out", "model": "m", "engine_options": OPTIONS, "column": "text"}
    return parse({**given, "task": task, **fields})


def make_engine(folder: Path, task: Task, **options: Any) -> VllmEngine:
    model = support.model_at(folder / task)
    return VllmEngine(model, task, {**OPTIONS, **options}, EngineContext(folder / "cache"))


def loaded(folder: Path, task: Task) -> Iterator[VllmEngine]:
    engine = make_engine(folder, task)
    engine.load()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def embedder(folder: Path, reference: Reference) -> Iterator[VllmEngine]:
    yield from loaded(folder, Task.EMBED)


@pytest.fixture(scope="module")
def classifier(folder: Path, reference: Reference, embedder: VllmEngine) -> Iterator[VllmEngine]:
    yield from loaded(folder, Task.CLASSIFY)


@pytest.fixture(scope="module")
def cross_encoder(folder: Path, reference: Reference, classifier: VllmEngine) -> Iterator[VllmEngine]:
    yield from loaded(folder, Task.SCORE)


def rows(texts: list[Any], others: list[Any] | None = None) -> RowBatch:
    columns = {"text": pa.array(texts, pa.string())}
    if others is not None:
        columns["other"] = pa.array(others, pa.string())
    return RowBatch(np.arange(len(texts)), pa.RecordBatch.from_pydict(columns))


def answers(engine: VllmEngine, spec: JobSpec, batch: RowBatch) -> list[Any]:
    found = run(engine, spec, [batch])
    return [found[row] for row in range(len(batch.rows))]


class TestEmbed(EngineContract):
    @pytest.fixture
    def engine(self, embedder: VllmEngine) -> VllmEngine:  # type: ignore[override]
        return embedder

    @pytest.fixture
    def model(self, folder: Path) -> Model:
        return support.model_at(folder / Task.EMBED)

    @pytest.fixture
    def unloaded(self, folder: Path) -> VllmEngine:  # type: ignore[override]
        return make_engine(folder, Task.EMBED)

    @pytest.fixture
    def spec(self) -> JobSpec:
        return make_spec("embed")

    @pytest.fixture
    def make_batch(self) -> MakeBatch:
        return lambda first, n: support.texts(*(f"number {row}" for row in range(first, first + n)), first=first)


class TestScoreOfPairs(EngineContract):
    """A row is two requests."""

    many_rows = 20_000

    @pytest.fixture
    def engine(self, embedder: VllmEngine) -> VllmEngine:  # type: ignore[override]
        return embedder

    @pytest.fixture
    def model(self, folder: Path) -> Model:
        return support.model_at(folder / Task.EMBED)

    @pytest.fixture
    def unloaded(self, folder: Path) -> VllmEngine:  # type: ignore[override]
        return make_engine(folder, Task.EMBED)

    @pytest.fixture
    def spec(self) -> JobSpec:
        return make_spec("score", pair_column="other")

    @pytest.fixture
    def make_batch(self) -> MakeBatch:
        def make(first: int, n: int) -> RowBatch:
            numbers = range(first, first + n)
            texts = {"text": [f"number {row}" for row in numbers], "other": [f"parcel {row * 7}" for row in numbers]}
            return RowBatch(np.arange(first, first + n), pa.RecordBatch.from_pydict(texts))

        return make


def test_embeddings(embedder: VllmEngine, reference: Reference) -> None:
    wanted = reference.answers()[0][0]
    found = answers(embedder, make_spec("embed"), rows(TEXTS))
    for answer, known in zip(found, wanted, strict=True):
        assert answer["prompt_tokens"] == len(known["tokens"])
        np.testing.assert_allclose(answer["embedding"], known["value"], atol=1e-4)
        assert np.linalg.norm(answer["embedding"]) == pytest.approx(1, abs=1e-4)
    assert len({tuple(answer["embedding"]) for answer in found}) == len(TEXTS)


def test_what_is_kept_of_an_embedding(embedder: VllmEngine) -> None:
    whole = np.array([answer["embedding"] for answer in answers(embedder, make_spec("embed"), rows(TEXTS))])
    raw = np.array([a["embedding"] for a in answers(embedder, make_spec("embed", normalize=False), rows(TEXTS))])
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), whole, atol=1e-4)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
    short = np.array([a["embedding"] for a in answers(embedder, make_spec("embed", dimensions=16), rows(TEXTS))])
    cut = whole[:, :16]
    np.testing.assert_allclose(short, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-4)
    signs = answers(embedder, make_spec("embed", embedding_type="binary"), rows(TEXTS))
    np.testing.assert_array_equal([a["embedding"] for a in signs], np.packbits(whole > 0, axis=1))
    with pytest.raises(InvalidJob) as caught:
        answers(embedder, make_spec("embed", dimensions=10_000), rows(TEXTS))
    assert caught.value.field == "dimensions"


def test_texts_past_the_limit(embedder: VllmEngine, reference: Reference) -> None:
    (known,) = reference.answers()[0][1]
    (cut,) = answers(embedder, make_spec("embed"), rows([LONG]))
    assert cut["prompt_tokens"] == len(known["tokens"]) == OPTIONS["max_model_len"]
    np.testing.assert_allclose(cut["embedding"], known["value"], atol=1e-4)
    found = answers(embedder, make_spec("embed", overlong="error"), rows([LONG, "short"]))
    assert found[0].code == RowErrorCode.PROMPT_TOO_LONG
    assert "embedding" in found[1]


def test_scores_of_two_embeddings(embedder: VllmEngine, reference: Reference) -> None:
    wanted = reference.answers()[0][2]
    found = answers(embedder, make_spec("score", pair_column="other"), rows(TEXTS, OTHERS))
    np.testing.assert_allclose([a["score"] for a in found], [known["value"] for known in wanted], atol=1e-4)
    assert found[2]["score"] == pytest.approx(1, abs=1e-4)
    assert len({answer["score"] for answer in found}) == len(TEXTS)


def test_equal_texts_are_pooled_once(embedder: VllmEngine) -> None:
    def counted(spec: JobSpec, batch: RowBatch) -> tuple[list[Any], int, int]:
        before, found, after = embedder.stats(), answers(embedder, spec, batch), embedder.stats()
        rows = after["copied"]["rows"] - before["copied"]["rows"]
        return found, rows, after["tokens"]["prompt"] - before["tokens"]["prompt"]

    found, copied, tokens = counted(make_spec("embed"), rows(TEXTS * 3))
    assert copied == 2 * len(TEXTS)
    assert tokens == sum(answer["prompt_tokens"] for answer in found[: len(TEXTS)])
    assert found == found[: len(TEXTS)] * 3
    # One question and many documents, as a ranker is asked.
    spec = make_spec("score", pair_column="other")
    alone = [answers(embedder, spec, rows([TEXTS[0]], [other]))[0]["score"] for other in OTHERS]
    ranked, copied, _ = counted(spec, rows([TEXTS[0]] * len(OTHERS), OTHERS))
    np.testing.assert_allclose([answer["score"] for answer in ranked], alone, atol=1e-4)
    assert copied == (len(OTHERS) - 1) // 2  # of a row's two requests, one
    assert len(set(alone)) > 1


def test_classes(classifier: VllmEngine, reference: Reference) -> None:
    (wanted,) = reference.answers()[1]
    found = answers(classifier, make_spec("classify"), rows(TEXTS))
    for answer, known in zip(found, wanted, strict=True):
        values = [item["score"] for item in answer["scores"]]
        assert values == sorted(values, reverse=True)
        found_by_label = {item["label"]: item["score"] for item in answer["scores"]}
        np.testing.assert_allclose([found_by_label[label] for label in LABELS], known["value"], atol=1e-4)
        assert answer["label"] == LABELS[int(np.argmax(known["value"]))]
        assert answer["score"] == pytest.approx(max(known["value"]), abs=1e-4)
    best = answers(classifier, make_spec("classify", top_k=1), rows(TEXTS))
    assert [[item["label"] for item in answer["scores"]] for answer in best] == [[answer["label"]] for answer in found]


def test_scores_of_a_cross_encoder(cross_encoder: VllmEngine, reference: Reference) -> None:
    wanted, (long,) = reference.answers()[2]
    found = answers(cross_encoder, make_spec("score", pair_column="other"), rows([*TEXTS, LONG], [*OTHERS, "x"]))
    known = [answer["value"] for answer in (*wanted, long)]
    np.testing.assert_allclose([answer["score"] for answer in found], known, atol=1e-4)
    turned = answers(cross_encoder, make_spec("score", pair_column="other"), rows(OTHERS, TEXTS))
    assert turned[0]["score"] != pytest.approx(found[0]["score"], abs=1e-4), "the order of a pair matters"
    # One label is a probability of its own.
    (one,) = answers(cross_encoder, make_spec("classify"), rows(["x"]))
    assert one["label"] == "LABEL_0" and 0 <= one["score"] <= 1


def test_bad_rows_fail_alone(embedder: VllmEngine) -> None:
    spec = make_spec("score", pair_column="other")
    binary = pa.array([b"a", b"\xff", None, b"c"])
    batch = RowBatch(np.arange(4), pa.RecordBatch.from_pydict({"text": binary, "other": ["b", "b", "b", None]}))
    found = answers(embedder, spec, batch)
    assert not isinstance(found[0], RowFailure)
    assert [answer.code for answer in found[1:]] == [
        RowErrorCode.INVALID_UTF8,
        RowErrorCode.MISSING_VALUE,
        RowErrorCode.MISSING_VALUE,
    ]
    assert "'other'" in found[3].message


def test_models_that_do_not_do_the_task(
    folder: Path, embedder: VllmEngine, classifier: VllmEngine, cross_encoder: VllmEngine
) -> None:
    from pipeline.engines.vllm.pooling import Pooling

    for engine, task, words in [
        (embedder, Task.CLASSIFY, "it pools for embed"),
        (classifier, Task.EMBED, "it pools for classify"),
        (classifier, Task.SCORE, "one label; this one has 3"),
    ]:
        with pytest.raises(InvalidModel, match=words):
            Pooling(engine._loaded().running, task)


@pytest.mark.parametrize("kind", ["embed", "pairs", "classify", "score"])
def test_what_was_pooled_before_comes_back_to_the_bit(
    embedder: VllmEngine, classifier: VllmEngine, cross_encoder: VllmEngine, kind: str, tmp_path: Path
) -> None:
    engine = {"embed": embedder, "pairs": embedder, "classify": classifier, "score": cross_encoder}[kind]
    others = [*OTHERS, "x"] if kind in ("pairs", "score") else None
    more = {"pair_column": "other"} if others else {}
    task = "score" if kind == "pairs" else kind
    plain = engine._context
    try:
        engine._context = replace(plain, results=ResultCaches(ObjectStore(), str(tmp_path), 2**20))

        def counted(spec: JobSpec, batch: RowBatch) -> tuple[list[Any], int, int]:
            found: dict[int, Any] = {}
            sums = Counter[str]()
            for result in engine.infer(spec, iter([batch]), Cancellation()):
                sums.update({name: int(number) for name, number in result.measured.items()})
                if result.values is not None:
                    found |= dict(zip(result.rows.tolist(), result.values.to_pylist(), strict=True))
            return [found.get(row) for row in range(batch.columns.num_rows)], sums["cache_hits"], sums["cache_misses"]

        spec, batch = make_spec(task, cache=True, **more), rows([*TEXTS, "one"], others)
        one, *first = counted(spec, batch)
        two, *second = counted(spec, batch)
        n = len(TEXTS) + 1
        assert one == two and None not in one
        assert (first, second) == ([0, n], [n, 0])
        if kind == "embed":
            assert counted(make_spec(task, cache=True, normalize=False), batch)[1:] == (0, n)
            assert counted(make_spec(task, cache=True, embedding_type="binary"), batch)[1:] == (0, n)
        if others is not None:
            turned = rows(others, [*TEXTS, "one"])
            assert counted(spec, turned)[1] < n, "the order of a pair matters"
    finally:
        engine._context = plain
