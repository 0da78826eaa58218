"""What prompts begin with, from columns alone."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.prefix.keys import KEY_BYTES, key_columns, keys
from pipeline.spec.job_spec import JobSpec, parse


def spec(**fields: Any) -> JobSpec:
    base = {"input": "in", "output": "out", "model": "m", "task": "generate", "order": "prefix"}
    return parse(base | fields)


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"prompt": "Read {doc}. {question} Again: {doc}"}, ("doc", "question")),
        ({"prompt": "no column at all"}, ()),
        ({"prompt_token_column": "ids"}, ("ids",)),
        ({"task": "chat", "column": "messages"}, ("messages",)),
        (
            {
                "task": "chat",
                "messages": [
                    {"role": "system", "content": "You know {doc}"},
                    {"role": "user", "content": "{question}"},
                ],
            },
            ("doc", "question"),
        ),
        ({"prompt": "{doc}", "adapters": {"a": "x"}, "adapter_column": "who"}, ("who", "doc")),
        ({"task": "embed", "column": "text"}, ()),
    ],
)
def test_columns_in_the_order_of_the_prompt(fields: dict[str, Any], columns: tuple[str, ...]) -> None:
    assert key_columns(spec(**fields)) == columns


MESSAGES = [
    [{"role": "system", "content": "Doc."}, {"role": "user", "content": "A?"}],
    [{"role": "system", "content": "Doc."}, {"role": "user", "content": "B?"}],
]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["Doc. A", "Doc. B", None]),
        pa.array(["Doc. A", "Doc. B", None], pa.large_string()),
        pa.array(["Doc. A", "Doc. B", None]).dictionary_encode(),
        pa.array([[11, 12, 13, 14], [11, 12, 13, 99], None], pa.list_(pa.int32())),
        pa.array([[11, 12, 13, 14], [11, 12, 13, 99], None], pa.list_(pa.int64(), 4)),
        pa.array([*MESSAGES, None]),
        pa.array([1.5, 1.25, None]),
    ],
    ids=lambda column: str(column.type),
)
def test_rows_that_begin_alike_have_keys_that_do(column: Any) -> None:
    first, second, missing = keys(pa.RecordBatch.from_arrays([column], names=["column"]))
    assert first != second
    assert first[0] == second[0]
    assert missing == b""


def test_columns_follow_each_other_and_long_prompts_are_cut() -> None:
    batch = pa.RecordBatch.from_pydict({"doc": ["d", "é", "x" * (2 * KEY_BYTES)], "n": [1, None, 3]})
    assert keys(batch) == [b"d\x001", "é".encode() + b"\0", b"x" * KEY_BYTES]


def test_tokens_sort_as_they_are_read() -> None:
    found = keys(pa.RecordBatch.from_pydict({"ids": [[1, 300], [1, 2], [2]]}))
    assert sorted(found) == [found[1], found[0], found[2]]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1, None, 3]], pa.list_(pa.int64())),
        pa.array([[2**63 + 5]], pa.list_(pa.uint64())),
        pa.array([b"\xff\xfe"], pa.binary()).cast(pa.binary()).view(pa.string()),
        pa.StructArray.from_arrays([pa.array([b"\xff"], pa.binary()).view(pa.string())], ["content"]),
        pa.array([1], pa.timestamp("ns")),
        pa.array([2**31 - 1], pa.int32()).view(pa.date32()),
    ],
    ids=["null token", "uint64", "bytes", "messages", "nanoseconds", "date"],
)
def test_whatever_a_row_holds_has_a_key(column: Any) -> None:
    """That it is no prompt is the engine's to say, of that row alone."""
    assert len(keys(pa.RecordBatch.from_arrays([column], names=["a"]))) == 1
