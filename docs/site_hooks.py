"""What `make site` adds to the pages: the client's reference comes from its docstrings, by mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

CLIENT = """
::: pipeline.client.client.Client

::: pipeline.client.handle.JobHandle
"""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In the place of the tables that a reader of the repository has: every call with its types."""
    if page.file.src_uri == "reference/client.md":
        return markdown.partition("\n## ")[0] + "\n" + CLIENT
    return markdown


class Roles(griffe.Extension):
    """Docstrings as Markdown: what a Sphinx role names becomes code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = text.replace("``", "`")
