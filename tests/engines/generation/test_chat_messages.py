"""Conversations in a column, as files have them: which types may hold them, and what is read from each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.engines import arrow_text, input_columns
from pipeline.engines.generation import chat_messages
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidInput

TEXT = [{"role": "user", "content": "hi"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
JSON = pa.array([json.dumps(TEXT), json.dumps(PARTS)])
SPEC = JobSpec(input=("in",), output="out", model="m", task=Task.CHAT, column="talk")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([TEXT]), [TEXT]),
        (pa.array([PARTS]), [PARTS]),
        (pa.array([PARTS[0]["content"]]), None),
        (pa.array([[{**PARTS[0], "name": None}]]), [PARTS]),
        (JSON, [TEXT, PARTS]),
        (JSON.dictionary_encode(), [TEXT, PARTS]),
        (pa.ExtensionArray.from_storage(pa.json_(pa.string()), JSON), [TEXT, PARTS]),
        (pa.array([1]), None),
        (pa.array([["a"]]), None),
    ],
)
def test_what_may_hold_messages(tmp_path: Path, column: Any, expected: Any) -> None:
    pq.write_table(pa.table({"talk": column}), tmp_path / "f.parquet")
    read = pq.read_table(tmp_path / "f.parquet")
    if expected is None:
        with pytest.raises(InvalidInput, match="messages are list"):
            input_columns.check_generation(SPEC, read.schema)
        return
    assert input_columns.check_generation(SPEC, read.schema) == ("talk",)
    found = arrow_text.values(read.column("talk").combine_chunks())
    assert [chat_messages.parse_messages(value) for value in found] == expected
    assert {chat_messages.text_of(message) for [message] in expected} == {"hi"}
