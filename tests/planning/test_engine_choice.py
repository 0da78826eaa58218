"""Which engine runs what, and the reasons given when nothing can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines import registry
from pipeline.engines.fake.engine import FakeEngine
from pipeline.models.model import Model
from pipeline.models.tasks import tasks_of
from pipeline.planning import engine_choice
from pipeline.spec.job_spec import Task
from storage.errors import EngineMissing, InvalidJob, InvalidModel

GRAPH = (Path("m/model.onnx"),)
WEIGHTS = (Path("m/model.safetensors"),)


def model(*architectures: str, **fields: Any) -> Model:
    return Model(name="m", path=Path("m"), digest="0", architectures=architectures, **fields)


LLAMA = model("LlamaForCausalLM", weights=WEIGHTS)
BERT = model("BertModel", weights=WEIGHTS)
CLASSIFIER = model("BertForSequenceClassification", weights=WEIGHTS)
BARE = Model(name="g.onnx", path=Path("g.onnx"), digest="0", onnx_files=(Path("g.onnx"),))
FAKE = Model(name="fake", path=None, digest="0")
EMBED = "task 'embed' needs an encoder;"

CAN: list[tuple[str, Model, str]] = [
    ("causal", LLAMA, "generate chat"),
    ("causal, weights not there yet", model("LlamaForCausalLM"), "generate chat"),
    (
        "causal, with a graph",
        model("LlamaForCausalLM", weights=WEIGHTS, onnx_files=GRAPH),
        "generate chat embed tensor",
    ),
    ("causal, only a graph", model("GPT2LMHeadModel", onnx_files=GRAPH), "embed tensor"),
    (
        "causal, made for embedding",
        model("Qwen3ForCausalLM", weights=WEIGHTS, sentence_transformer=True),
        "generate chat embed",
    ),
    ("decoder without a head, made for embedding", model("Qwen3Model", weights=WEIGHTS), "embed"),
    ("vision-language", model("LlavaForConditionalGeneration", weights=WEIGHTS), "generate chat"),
    ("encoder", BERT, "embed"),
    ("encoder with a graph", model("BertModel", onnx_files=GRAPH), "embed tensor"),
    ("masked language model", model("BertForMaskedLM", weights=WEIGHTS), "embed"),
    ("classifier", CLASSIFIER, "classify score"),
    ("classifier with a graph", model("BertForSequenceClassification", onnx_files=GRAPH), "classify score tensor"),
    ("causal classifier", model("LlamaForSequenceClassification", weights=WEIGHTS), "classify score"),
    ("tagger", model("BertForTokenClassification", weights=WEIGHTS), ""),
    ("tagger with a graph", model("BertForTokenClassification", onnx_files=GRAPH), "tensor"),
    ("bare graph", BARE, "embed classify score tensor"),
    ("configuration that does not say", model(weights=WEIGHTS), "embed classify score"),
    ("a folder of sentence-transformers alone", model(sentence_transformer=True), "embed"),
    ("configuration without weights and graph", model(), ""),
]


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize(("kind", "what", "can"), CAN, ids=[kind for kind, _, _ in CAN])
def test_a_model_does_what_fits_it(kind: str, what: Model, can: str, task: Task) -> None:
    if task in can.split():
        decodes = "made for embedding" in kind and task is Task.EMBED
        expected = "vllm" if task in (Task.GENERATE, Task.CHAT) or decodes else "onnx"
        assert engine_choice.choose(task, "auto", what) == expected
        assert engine_choice.choose(task, expected, what) == expected
        return
    with pytest.raises(InvalidModel) as caught:
        engine_choice.choose(task, "auto", what)
    assert caught.value.field == "model"
    assert f"task '{task}' needs" in caught.value.message
    for fitting in can.split():
        assert fitting in caught.value.message.partition(": ")[2]


@pytest.mark.parametrize(
    ("task", "what", "message"),
    [
        (
            Task.GENERATE,
            BERT,
            "task 'generate' needs an autoregressive model with its weights; m is a BertModel: it can embed",
        ),
        (
            Task.EMBED,
            LLAMA,
            (
                f"{EMBED} m is a LlamaForCausalLM: it can generate and chat; "
                "engine 'vllm' does embed with it if you name it"
            ),
        ),
        (Task.TENSOR, BERT, "task 'tensor' needs an ONNX graph; m is a BertModel: it can embed"),
        (
            Task.CHAT,
            BARE,
            (
                "task 'chat' needs an autoregressive model with its weights; g.onnx is an ONNX graph: "
                "it can embed, classify, score and tensor"
            ),
        ),
        (
            Task.EMBED,
            model("AlbertForQuestionAnswering"),
            f"{EMBED} m is an AlbertForQuestionAnswering: none of the tasks fits it",
        ),
        (
            Task.EMBED,
            model(),
            (
                f"{EMBED} m is a model whose config.json names no architecture, without weights and without a graph: "
                "none of the tasks fits it"
            ),
        ),
        (
            Task.GENERATE,
            model("GPT2LMHeadModel", onnx_files=GRAPH),
            (
                "task 'generate' needs an autoregressive model with its weights; m is a GPT2LMHeadModel, as an "
                "ONNX graph only: it can embed and tensor"
            ),
        ),
    ],
)
def test_the_reason_names_the_kind_and_what_fits(task: Task, what: Model, message: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        engine_choice.choose(task, "auto", what)
    assert caught.value.message == message


@given(st.sampled_from(Task))
def test_fake_does_everything(task: Task) -> None:
    assert task in FakeEngine.tasks
    assert engine_choice.choose(task, "auto", FAKE) == engine_choice.choose(task, "fake", FAKE) == "fake"
    assert engine_choice.choose(task, "fake", BERT) == "fake", "a model on disk can be faked"


@pytest.mark.parametrize("engine", ["vllm", "onnx", "other"])
def test_the_fake_model_runs_nowhere_else(engine: str) -> None:
    with pytest.raises(InvalidJob, match="model 'fake' runs on engine 'fake' only") as caught:
        engine_choice.choose(Task.EMBED, engine, FAKE)
    assert caught.value.field == "engine"


@pytest.mark.parametrize(("engine", "task"), [("vllm", Task.TENSOR), ("onnx", Task.GENERATE), ("onnx", Task.CHAT)])
def test_an_engine_that_does_not_do_the_task(engine: str, task: Task) -> None:
    with pytest.raises(InvalidJob, match=f"engine '{engine}' does .*, not {task}") as caught:
        engine_choice.choose(task, engine, LLAMA)
    assert caught.value.field == "engine"


@pytest.mark.parametrize(
    ("what", "can"),
    [
        (LLAMA, "generate chat embed classify score"),
        (BERT, "embed score"),
        (CLASSIFIER, "classify score"),
        (model("GPT2LMHeadModel", onnx_files=GRAPH), ""),
        (model("BertForTokenClassification", weights=WEIGHTS), ""),
    ],
)
def test_vllm_pools_where_it_is_asked_to(what: Model, can: str) -> None:
    for task in registry.engine_class("vllm").tasks:
        if task in can.split():
            assert engine_choice.choose(task, "vllm", what) == "vllm"
        elif task not in tasks_of(what):
            with pytest.raises(InvalidModel):
                engine_choice.choose(task, "vllm", what)


class Plugged(FakeEngine):
    """An engine of another distribution, which fits models of one kind."""

    name = "plugged"
    tasks = frozenset({Task.GENERATE, Task.TENSOR})

    @classmethod
    def fits(cls, task: Task, model: Model) -> bool:
        return task in cls.tasks and model.path is not None


class Silent(FakeEngine):
    name = "silent"
    tasks = frozenset({Task.GENERATE})

    @classmethod
    def fits(cls, task: Task, model: Model) -> bool:
        return False


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines of other distributions, and one that cannot be imported."""
    inner, more = registry.engine_class, {"plugged": Plugged, "silent": Silent}

    def found(name: str) -> Any:
        if name == "gone":
            raise EngineMissing("it cannot be imported", field="engine")
        return more[name] if name in more else inner(name)

    monkeypatch.setattr(registry, "names", lambda: (*registry.BUILT_IN, "gone", *more))
    monkeypatch.setattr(registry, "engine_class", found)


@pytest.mark.usefixtures("plugged")
def test_auto_asks_other_engines_after_its_own() -> None:
    assert engine_choice.choose(Task.GENERATE, "auto", LLAMA) == "vllm"
    assert engine_choice.choose(Task.GENERATE, "auto", BERT) == "plugged"
    assert engine_choice.choose(Task.TENSOR, "auto", BERT) == "plugged"
    assert engine_choice.choose(Task.GENERATE, "auto", model()) == "plugged"
    with pytest.raises(InvalidModel, match="none of the tasks fits it"):
        engine_choice.choose(Task.CHAT, "auto", model("AlbertForQuestionAnswering"))


@pytest.mark.usefixtures("plugged")
def test_an_engine_asked_by_name_judges_the_model_for_itself() -> None:
    assert engine_choice.choose(Task.GENERATE, "silent", BERT) == "silent"
    with pytest.raises(InvalidJob, match="engine 'silent' does generate, not embed"):
        engine_choice.choose(Task.EMBED, "silent", BERT)


def test_an_engine_that_nobody_knows() -> None:
    with pytest.raises(InvalidJob, match="there is no engine 'nobodys'"):
        engine_choice.choose(Task.GENERATE, "nobodys", BERT)


def test_engines_say_how_many_shards_they_like_at_a_time() -> None:
    assert registry.default_slots("vllm", 1) == 2
    assert registry.default_slots("onnx", 1) == 1
    assert registry.default_slots("not-here", 3) == 3
