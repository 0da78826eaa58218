"""Tools that a template ignores, and beginnings of prompts that are added anyway: read from a model's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.model_config.prompt_notices import chat_template, leading_token, notices
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec

TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
READS = PLAIN + "{%- if tools is defined %}{{ tools | tojson }}{% endif %}"


def said(folder: Path, task: str, **fields: Any) -> list[str]:
    spec = JobSpec(input=("i",), output="o", model="m", task=task, **fields)  # type: ignore[arg-type]
    return list(notices(spec, Model("m", folder, "0", (), {})))


def template(folder: Path, text: str, **more: Any) -> Path:
    (folder / "chat_template.jinja").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **more}))
    return folder


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        (PLAIN, False),
        (READS, True),
        ("{% set tools = tools or none %}{{ '}}' ~ tools }}", True),
        ("{{ '}}' }}{%- for tool in\ntools -%}{{ tool }}{% endfor %}", True),
        ("Use tools. {# tools #}{{ 'tools' }}{{ m.tools }}{{ builtin_tools }}{{ m['tools'] }}", False),
        ("{{ \"it's\" }}{{ tools }}{{ 'a' }}", True),
    ],
)
def test_tools_that_a_template_ignores(tmp_path: Path, text: str, reads: bool) -> None:
    found = said(template(tmp_path, text), "chat", prompt="{t}", tools=TOOLS)
    assert [notice.split(":")[0] for notice in found] == ([] if reads else ["tools"])
    assert said(tmp_path, "chat", prompt="{t}") == []


def test_the_template_that_is_rendered_is_the_one_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]})
    )
    assert [chat_template(tmp_path, with_tools=tools) for tools in (False, True)] == ["d", "t"]
    (tmp_path / "chat_template.jinja").write_text("file")
    assert [chat_template(tmp_path, with_tools=tools) for tools in (False, True)] == ["file", "t"]
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("more")
    assert [chat_template(tmp_path, with_tools=tools) for tools in (False, True)] == ["file", "more"]
    (tmp_path / "empty").mkdir()
    assert chat_template(tmp_path / "empty", with_tools=True) is None


SPECIAL = [("<s>", 1), ("</s>", 2)]
POST = {
    "none": None,
    "begin": processors.TemplateProcessing(single="<s> $A", special_tokens=SPECIAL),
    "end": processors.TemplateProcessing(single="$A </s>", special_tokens=SPECIAL),
    "several": processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A </s>", special_tokens=SPECIAL)]
    ),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
}


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
@pytest.mark.parametrize("post", POST)
def test_the_leading_token_is_the_one_of_transformers(tmp_path: Path, post: str, config: dict[str, bool]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "<s>": 1, "</s>": 2, "?": 3}, unk_token="?"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if POST[post] is not None:
        tokenizer.post_processor = POST[post]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    first = PreTrainedTokenizerFast.from_pretrained(tmp_path)("x")["input_ids"][0]
    assert leading_token(tmp_path) == {0: None, 1: "<s>"}[first]
    doubled = ["prompt"] if first == 1 else []
    assert [notice.split(":")[0] for notice in said(tmp_path, "generate", prompt="<s>[INST] {t}")] == doubled
    assert said(tmp_path, "generate", prompt="[INST] {t} <s>") == []
    assert [notice.split(":")[0] for notice in said(tmp_path, "embed", column="t", prefix=" <s>query")] == (
        ["prefix"] if doubled else []
    )


def test_without_a_fast_tokenizer_its_settings_tell(tmp_path: Path) -> None:
    for adds in (True, False):
        template(tmp_path, PLAIN, add_bos_token=adds)
        assert leading_token(tmp_path) == ("<s>" if adds else None)


def test_a_chat_has_what_its_template_writes(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "<s>{t}"}]
    bos: dict[str, Any] = {"add_bos_token": True}
    assert said(template(tmp_path, "{{ messages[0].content }}", **bos), "chat", messages=messages) == []
    for text in (PLAIN, "<s>{{ messages[0].content }}"):
        (found,) = said(template(tmp_path, text, bos_token={"content": "<s>"}), "chat", messages=messages)
        assert found.startswith("messages.1.content: it begins with <s>, which the model's chat template adds")


@pytest.mark.parametrize("damaged", ["{", "[]", '{"chat_template": 3, "bos_token": 4}', "\udcff"])
def test_files_that_cannot_be_read_say_nothing(tmp_path: Path, damaged: str) -> None:
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes(damaged.encode(errors="surrogateescape"))
    assert said(tmp_path, "generate", prompt="<s>{t}") == []
    said(tmp_path, "chat", prompt="<s>{t}")


def test_the_user_is_told_at_submit_once(settings: Settings, tmp_path: Path) -> None:
    """By the engine's word, before anything is loaded; the job is not refused."""
    (tmp_path / "model").mkdir()
    model = template(tmp_path / "model", PLAIN)
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (model / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    pq.write_table(pa.table({"t": ["a"]}), tmp_path / "in.parquet")
    job = {"input": str(tmp_path / "in.parquet"), "model": str(model), "task": "chat", "tools": list(TOOLS)}
    heard: list[str] = []
    with Client(settings=settings) as client:
        client.on_notice(heard.append)
        client.submit(output=str(tmp_path / "out"), prompt="<s>{t}", start=False, **job)
    assert [notice.split(":")[0] for notice in heard] == ["tools", "prompt"]
