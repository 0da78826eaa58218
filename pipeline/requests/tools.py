"""Functions that a chat request offers to the model, and what it demands of their calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.requests.faults import invalid, unsupported

_CALL = '{"type": "function", "function": {"name": …, "parameters": …}}'


@dataclass(frozen=True, slots=True)
class Tools:
    """``offered``: as the request has them; ``choice``: ``none``, ``auto``, ``required``, or the name of a function
    (``named``) that must be called."""

    offered: tuple[Mapping[str, Any], ...] = ()
    choice: str = "none"
    named: bool = False

    @property
    def demanded(self) -> bool:
        return self.named or self.choice == "required"

    def form(self) -> dict[str, Any]:
        """``structured_outputs`` that the text of a demanded call keeps to, as ``vllm serve`` has it: the arguments of
        the named function, or a list of calls."""
        functions = [tool["function"] for tool in self.offered]
        if self.named:
            return {"json": next(_parameters(each) for each in functions if each["name"] == self.choice)}
        calls = [
            {
                "properties": {"name": {"type": "string", "enum": [each["name"]]}, "parameters": _parameters(each)},
                "required": ["name", "parameters"],
            }
            for each in functions
        ]
        return {"json": {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}}}


def tools_of(body: Mapping[str, Any]) -> Tools:
    """The tools of a chat request. Raises :class:`RequestError`."""
    offered, choice = body.get("tools"), body.get("tool_choice")
    if offered is None or offered == []:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "needs tools")
        return Tools()
    if not isinstance(offered, Sequence) or isinstance(offered, str):
        raise invalid("tools", f"must be a list of {_CALL}")
    for at, tool in enumerate(offered):
        _check(at, tool)
    names = [tool["function"]["name"] for tool in offered]
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function":
            raise unsupported("tool_choice", 'an object must be {"type": "function", "function": {"name": …}}')
        if name not in names:
            raise invalid("tool_choice", f"{name!r} is none of the tools")
        return Tools(tuple(offered), str(name), named=True)
    if choice not in (None, "none", "auto", "required"):
        raise invalid("tool_choice", "must be none, auto, required, or an object that names a function")
    return Tools(tuple(offered), choice or "auto")


def calls_of(text: str, named: str | None) -> list[tuple[str, str]] | None:
    """Name and arguments (JSON text) of the demanded calls in an answer; ``None`` where it was cut off within them."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if named is not None:
        return [(named, text)]
    return [(call["name"], json.dumps(call["parameters"], ensure_ascii=False)) for call in found]


def _check(at: int, tool: Any) -> None:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if isinstance(tool, Mapping) and tool.get("type") not in (None, "function"):
        raise unsupported("tools", f"tool {at} is of type {tool['type']!r}; only functions are supported")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise invalid("tools", f"tool {at} must be {_CALL}")
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise invalid("tools", f"parameters of tool {at} must be a JSON Schema")


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return dict(function.get("parameters") or {"type": "object", "properties": {}})
