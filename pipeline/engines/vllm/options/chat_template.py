"""What a job may hand to a model's chat template: plain values that the template reads, and nothing that steers vLLM or
the tokenizer around it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pipeline.engines.generation.validators import FLAG, Check, is_number, refuse_wrong
from storage.errors import InvalidJob

FIELD = "chat_template_kwargs"

_NOT_OURS = "it is an argument of the tokenizer's, not a value that the template reads"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "chat_template": "the model's own template is used: put a chat_template.jinja into the model's directory",
        "conversation": "the messages are those of the row",
        "conversations": "the messages are those of the row",
        "messages": "the messages are those of the row",
        "tools": "set the job's 'tools'",
        "available_tools": "set the job's 'tools'",
        "documents": "put them into the messages",
        "tokenize": "the prompt is tokenized once, after the template",
        "chat_template_kwargs": _NOT_OURS,
        "load_audio_from_video": _NOT_OURS,
        "max_length": _NOT_OURS,
        "mm_processor_kwargs": _NOT_OURS,
        "padding": _NOT_OURS,
        "processor_kwargs": _NOT_OURS,
        "return_assistant_tokens_mask": _NOT_OURS,
        "return_dict": _NOT_OURS,
        "return_tensors": _NOT_OURS,
        "tokenizer_kwargs": _NOT_OURS,
        "truncation": _NOT_OURS,
    }
)
"""Arguments of ``apply_chat_template`` and of vLLM's renderers that are not a job's to set, and why. A test holds them
against the installed transformers."""
FLAGS = ("add_generation_prompt", "continue_final_message")
"""Those that are."""

_PLAIN: Check = (
    "text, a number, true, false or null",
    lambda value: value is None or isinstance(value, (str, bool)) or is_number(value),
)


def check(given: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob` for what is no plain value, or goes by a name that means something else."""
    for name, value in given.items():
        field = f"{FIELD}.{name}"
        if name in REFUSED:
            raise InvalidJob(f"not a job's to set: {REFUSED[name]}", field=field)
        if not name.isidentifier():
            raise InvalidJob("a template cannot read a value of that name", field=field)
        refuse_wrong(field, FLAG if name in FLAGS else _PLAIN, value)
