"""What a job may not make the worker do: run code, fetch an address, read other files."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import Settings
from pipeline.engines import registry
from pipeline.engines.base import EngineContext, Permissions
from pipeline.engines.generation import sampling, structured_output
from pipeline.engines.generation.chat_messages import parse_messages
from pipeline.engines.pool import EnginePool
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.engines.vllm.options.engine_args import CHAT_TEMPLATE, ENGINE
from pipeline.process import permissions
from pipeline.spec.job_spec import Task
from storage.errors import InvalidJob, RowError
from tests.engines.vllm.options.test_check import LLAMA, SCHEMA, make_spec

REFUSED: list[dict[str, Any]] = [
    {"trust_remote_code": True},
    {"worker_cls": "evil.Worker"},
    {"worker_extension_cls": "evil.Worker"},
    {"scheduler_cls": "evil.Scheduler"},
    {"logits_processors": ["evil.Processor"]},
    {"reasoning_parser_plugin": "/tmp/evil.py"},
    {"structured_outputs_config": {"backend": "xgrammar", "reasoning_parser_plugin": "/tmp/evil.py"}},
    {"kv_transfer_config": {"kv_connector": "Evil", "kv_connector_module_path": "evil"}},
    {"allowed_local_media_path": "/"},
    {"load_format": "pt"},
    {"load_format": "runai_streamer"},
    {"distributed_executor_backend": "evil.Executor"},
    {"speculative_config": {"model": "/models/other", "num_speculative_tokens": 2}},
    {"compilation_config": {"backend": "evil.compile"}},
    {"hf_overrides": {"auto_map": {"AutoModel": "evil.Model"}}},
    {"generation_config": "/etc"},
]
HARMLESS: dict[str, Any] = {
    "trust_remote_code": False,
    "load_format": "safetensors",
    "distributed_executor_backend": "mp",
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    "compilation_config": {"cudagraph_mode": "FULL"},
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "hf_overrides": {"max_position_embeddings": 4096},
    "generation_config": "vllm",
    "max_num_seqs": 8,
}


def checked(options: dict[str, Any], settings: Settings) -> None:
    registry.check_permissions("vllm", options, permissions.granted(settings))


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: next(iter(options)))
def test_what_runs_code_or_reaches_elsewhere_is_the_operators_to_allow(options: dict[str, Any], tmp_path: Path) -> None:
    [name] = options
    with pytest.raises(InvalidJob, match="allowed_engine_options must name") as caught:
        checked(options, Settings(data_dir=tmp_path))
    assert caught.value.field == f"engine_options.{name}"
    checked(options, Settings(data_dir=tmp_path, allowed_engine_options=(name,)))
    # The worker that would load it is asked as well: it may be another host.
    engines = EnginePool(EngineContext(tmp_path, permissions=Permissions(own_machine=True)))
    with (
        pytest.raises(InvalidJob, match="allowed_engine_options"),
        engines.lease("vllm", LLAMA, Task.GENERATE, options),
    ):
        pass


def test_the_harmless_ones_pass(tmp_path: Path) -> None:
    checked(HARMLESS, Settings(data_dir=tmp_path))


@pytest.mark.parametrize("fields", [{"engine_options": {"tokenizer": "/models/b"}}, {"adapters": {"a": "/models/a"}}])
def test_directories_are_ones_own_only_without_a_fleet(fields: dict[str, Any], tmp_path: Path) -> None:
    spec = make_spec(**fields)

    def check(settings: Settings) -> None:
        checked(spec.engine_options, settings)
        permissions.check_adapters(spec, permissions.granted(settings))

    check(Settings(data_dir=tmp_path))
    fleet = Settings(data_dir=tmp_path, broker_url="redis://localhost")
    with pytest.raises(InvalidJob, match="allowed_engine_options"):
        check(fleet)
    check(fleet.model_copy(update={"allowed_engine_options": ("tokenizer", "adapters")}))


def test_a_table_says_only_what_is_read() -> None:
    """A misspelt key would leave out a refusal without a word."""
    value = {"type", "min", "above", "max", "null"}
    of_engine = {"choices", "refused", "meaning", "unknown", "cache", "directory"}
    risk = {"operator", "harmless", "harmless_keys", "risky_word"}
    for table, keys in (
        (ENGINE, value | of_engine | risk),
        (CHAT_TEMPLATE, {"type", "refused"}),
        (sampling.TABLE, value | {"refused", "column"}),
        (structured_output.TABLE, {"type", "null", "constraint", "column"}),
    ):
        assert {key for entry in table.entries.values() for key in entry} == keys
    entries = ENGINE.entries.values()
    assert all("operator" in entry for entry in entries if {"harmless", "risky_word"} & entry.keys())


def test_the_names_are_vllms() -> None:
    known = {*ENGINE.having("operator"), *ENGINE.having("harmless_keys"), *ENGINE.having("directory")}
    # The tool parser's is an option of vLLM's server only, so far.
    assert known & ENGINE.having("unknown").keys() == {"tool_parser_plugin"}
    assert not known & ENGINE.having("refused").keys()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "x", "uuid": "u", "image_url": "http://169.254.169.254/latest"},
        {"type": "text", "text": "x", "audio_url": {"url": "file:///etc/passwd"}},
        {"type": "text", "text": "x", "cache_control": {}},
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
        {"text": "x"},
    ],
)
def test_a_part_of_a_message_is_text_and_nothing_else(part: dict[str, Any]) -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "fine", "image_url": None}, part]}]
    with pytest.raises(RowError, match="message 0"):
        parse_messages(json.dumps(talk))
    del talk[0]["content"][1]  # type: ignore[attr-defined]
    assert parse_messages(json.dumps(talk)) == [{"role": "user", "content": [{"type": "text", "text": "fine"}]}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"chat_template": "{{ 'a' * 10**11 }}"}, "the model's own template"),
        ({"tokenize": True}, "tokenized once"),
        ({"conversation": []}, "those of the row"),
        ({"documents": [{"text": "x"}]}, "into the messages"),
        ({"tools": []}, "'tools'"),
        ({"return_dict": True}, "argument of the tokenizer"),
        ({"rows": [1, 2]}, "text, a number"),
        ({"a b": 1}, "cannot read"),
        ({"add_generation_prompt": "no"}, "true or false"),
    ],
)
def test_a_chat_template_is_handed_plain_values_only(given: dict[str, Any], words: str) -> None:
    spec = make_spec("chat", column="talk", chat_template_kwargs=given)
    with pytest.raises(InvalidJob, match=words) as caught:
        VllmEngine.check(spec, LLAMA, SCHEMA)
    assert caught.value.field == f"chat_template_kwargs.{next(iter(given))}"


def test_plain_values_reach_the_template() -> None:
    given = {
        "enable_thinking": False,
        "reasoning_effort": "low",
        "budget": 3,
        "continue_final_message": True,
        "x": None,
    }
    VllmEngine.check(make_spec("chat", column="talk", chat_template_kwargs=given), LLAMA, SCHEMA)


@pytest.mark.vllm
def test_no_argument_of_the_tokenizers_is_left_out() -> None:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    ours = {*CHAT_TEMPLATE.entries, "self", "kwargs"}
    for kind in (PreTrainedTokenizerBase, ProcessorMixin):
        assert set(inspect.signature(kind.apply_chat_template).parameters) <= ours
