"""The engine options and chat-template arguments that a job may set: ``options.toml``, read and applied.

What only vLLM can judge is judged by vLLM when the engine starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.engines.generation.validators import TYPES, OptionTable, refuse_wrong
from storage.errors import InvalidJob

_FILE = Path(__file__).with_name("options.toml")
ENGINE = OptionTable(_FILE, "engine_options", "engine options")
CHAT_TEMPLATE = OptionTable(_FILE, "chat_template_kwargs", "arguments of chat templates")
OWN_OPTIONS: Mapping[str, str] = ENGINE.having("meaning")
"""Engine options of Rowmill's own → what they are, for people. (The defaults of media's stand in
:mod:`pipeline.engines.media.limits`.)"""


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob` for an engine option that neither vLLM nor this engine has, or a wrong value."""
    for name, value in options.items():
        ENGINE.check(name, value, f"engine_options.{name}")


def check_chat_template(given: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob` for what is no plain value, or goes by a name that steers vLLM or the tokenizer."""
    for name, value in given.items():
        field = f"chat_template_kwargs.{name}"
        if name in CHAT_TEMPLATE.entries:
            CHAT_TEMPLATE.check(name, value, field)
        elif not name.isidentifier():
            raise InvalidJob("a template cannot read a value of that name", field=field)
        else:
            refuse_wrong(field, TYPES["plain"], value)
