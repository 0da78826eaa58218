"""What a model's tokenizer and chat template make of a job's prompts that its user will hardly have meant.

Reads JSON and the template's text only. These are notices: a job with such prompts runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.engines.model_config.json_files import read_json
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidModel

# A comment, or an expression or statement; marks within its strings do not end it.
_BLOCK = re.compile(
    r"""\{\#.*?\#\} | \{[{%] ( (?: '(?:\\.|[^'\\])*' | "(?:\\.|[^"\\])*" | [^'"] )*? ) [%}]\}""", re.DOTALL | re.VERBOSE
)
_STRING = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
_NAME = re.compile(r"(?<![.\w])[A-Za-z_]\w*")


def notices(spec: JobSpec, model: Model) -> Iterator[str]:
    """One sentence for each thing. Files that cannot be read say nothing here: loading the model will."""
    if model.path is None:
        return
    folder = model.path if model.path.is_dir() else model.path.parent
    with suppress(InvalidModel, OSError, UnicodeDecodeError):
        template = chat_template(folder, with_tools=bool(spec.tools)) if spec.task is Task.CHAT else None
        if template is not None and spec.tools and "tools" not in _names(template):
            yield "tools: the model's chat template ignores them, so that the model will not know of them"
        yield from _doubled(spec, folder, template)


def chat_template(folder: Path, *, with_tools: bool) -> str | None:
    """The text of the template that Transformers renders a chat with; ``None`` without one.

    Raises :class:`~storage.errors.InvalidModel` and ``OSError`` for files that cannot be read.
    """
    found: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        given = read_json(folder / name).get("chat_template")
        if isinstance(given, str):
            found["default"] = given
        elif isinstance(given, list):
            named = [each for each in given if isinstance(each, Mapping)]
            found |= {str(each.get("name")): each.get("template") for each in named}
    files = [folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")]
    for path in files:
        if path.is_file():
            name = "default" if path.parent == folder else path.stem
            found[name] = path.read_text(encoding="utf-8")
    text = found.get("tool_use") if with_tools and "tool_use" in found else found.get("default")
    return text if isinstance(text, str) else None


def leading_token(folder: Path) -> str | None:
    """The special token that the tokenizer puts before a text; ``None`` where it puts none, or no file tells.

    Raises :class:`~storage.errors.InvalidModel` for files that cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        config = read_json(folder / "tokenizer_config.json")
        return _content(config.get("bos_token")) if config.get("add_bos_token") else None
    # Its rule stands, whatever add_bos_token says beside it.
    post = read_json(folder / "tokenizer.json").get("post_processor")
    steps = post.get("processors") if isinstance(post, Mapping) and post.get("type") == "Sequence" else [post]
    for step in steps if isinstance(steps, list) else ():
        match step:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
                return token
            case {"type": "BertProcessing" | "RobertaProcessing", "cls": [str(token), *_]}:
                return token
    return None


def _doubled(spec: JobSpec, folder: Path, template: str | None) -> Iterator[str]:
    """Texts of the job that begin with a token which they are given anyway."""
    if spec.task is Task.CHAT:
        token = _content(read_json(folder / "tokenizer_config.json").get("bos_token"))
        if token is None or template is None or not ("bos_token" in _names(template) or token in template):
            return
        who = "the model's chat template"
    else:
        token, who = leading_token(folder), "the model's tokenizer"
        # Models of sounds and images have rules of their own for what stands before a text.
        if token is None or spec.image_column or spec.audio_column or spec.video_column:
            return
    texts = {"prompt": spec.prompt, "prefix": spec.prefix}
    texts |= {f"messages.{at}.content": message.content for at, message in enumerate(spec.messages or ())}
    for field, text in texts.items():
        if text is not None and text.lstrip().startswith(token):
            yield f"{field}: it begins with {token}, which {who} adds: it will be there twice; leave it out"


def _content(token: Any) -> str | None:
    """The text of a special token, which stands in ``tokenizer_config.json`` as text or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def _names(template: str) -> set[str]:
    """The names in a template's expressions and statements; those in its text, strings and comments are left out."""
    blocks = (match[1] or "" for match in _BLOCK.finditer(template))
    return {name for block in blocks for name in _NAME.findall(_STRING.sub("''", block))}
