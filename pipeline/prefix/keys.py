"""What a row's prompt begins with, as bytes to sort by, made from columns alone: no tokenizer, no model.

What templates say between the columns is the same in every row, so it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pipeline.spec.job_spec import JobSpec, Task
from pipeline.spec.prompt_template import Template

KEY_BYTES = 16 * 2**10
"""Only this much of a longer prompt is looked at: about 4,000 tokens of English text."""


def key_columns(spec: JobSpec) -> tuple[str, ...]:
    """The columns whose values a prompt begins with, in their order in it; none where all prompts are the same."""
    if spec.task not in (Task.GENERATE, Task.CHAT):
        return ()
    # Rows of different adapters have no cache in common.
    names = [spec.adapter_column] if spec.adapter_column is not None else []
    if spec.prompt_token_column is not None:
        names.append(spec.prompt_token_column)
    elif spec.column is not None:
        names.append(spec.column)
    else:
        texts = [spec.prompt] if spec.prompt is not None else [message.content for message in spec.messages or ()]
        names += [name for text in texts for name in Template(text).fields]
    return tuple(dict.fromkeys(names))


def keys(batch: pa.RecordBatch) -> list[bytes]:
    """The key of each row of a batch of :func:`key_columns`: prompts that begin alike have keys that do."""
    columns = [_bytes_of(column) for column in batch.columns]
    if len(columns) == 1:
        return [value[:KEY_BYTES] for value in columns[0]]
    return [b"\0".join(row)[:KEY_BYTES] for row in zip(*columns, strict=True)]


def _bytes_of(column: Any) -> list[bytes]:
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    kind = column.type
    if _is_text(kind):
        return [value or b"" for value in column.cast(pa.large_binary()).to_pylist()]
    if _is_list(kind) and pa.types.is_integer(kind.value_type):
        return [_tokens(row) for row in column]
    return [_any(row, _messages if _is_list(kind) else _text) for row in column]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _tokens(row: Any) -> bytes:
    """Token ids, as many as a key takes. A null or a number that no token has sorts as any other."""
    if not row.is_valid:
        return b""
    ids = row.values.slice(0, KEY_BYTES // 8).cast(pa.int64(), safe=False).fill_null(0)
    return bytes(ids.to_numpy(zero_copy_only=False).astype(">i8").tobytes())


def _any(row: Any, convert: Callable[[Any], bytes]) -> bytes:
    """A value without a Python form (text that is no UTF-8, a date past year 9999) is the engine's to refuse."""
    try:
        value = row.as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        return b""
    return b"" if value is None else convert(value)


def _messages(value: list[Any]) -> bytes:
    parts: list[str] = []
    for message in value:
        parts += (
            [str(message.get("role")), str(message.get("content"))] if isinstance(message, dict) else [str(message)]
        )
    return _text("\0".join(parts))


def _text(value: Any) -> bytes:
    return str(value).encode(errors="surrogatepass")
