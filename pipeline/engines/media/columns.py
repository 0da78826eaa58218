"""Columns of images, sounds and videos: which types they may have, and what a row has in them.

The values stay in Arrow's memory until they are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.engines.arrow_text import is_bytes, is_list, is_string, is_text
from pipeline.engines.media import inline as inline_media
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidInput, RowError

FIELDS: Mapping[str, str] = {"image": "image_column", "video": "video_column", "audio": "audio_column"}
"""vLLM's name of the modality → the job's field. In this order they go before the text of a chat message."""
WORDS: Mapping[str, str] = {"image": "images", "video": "videos", "audio": "sounds"}
_FILES = "bytes, URIs, struct<bytes, path>"


@dataclass(frozen=True, slots=True)
class Media:
    """What one row has: Arrow scalars, by modality. ``in_frames``: those of the video are images, its frames;
    ``n_bytes``: of all in memory."""

    items: Mapping[str, tuple[Any, ...]]
    in_frames: bool
    n_bytes: int


def columns_of(spec: JobSpec) -> dict[str, str]:
    """Modality → column, of those that the job reads."""
    return {kind: name for kind, field in FIELDS.items() if (name := getattr(spec, field)) is not None}


def check_column(spec: JobSpec, modality: str, kind: Any, name: str) -> None:
    """Raise :class:`InvalidInput` unless the column holds what the modality is made of."""
    inner = kind.value_type if is_list(kind) else kind
    if modality == "audio":
        if is_samples(inner) or is_samples(kind):
            if spec.audio_sampling_rate is None:
                raise InvalidInput(
                    f"column {name!r} is {kind}; samples that are numbers need audio_sampling_rate",
                    field="audio_sampling_rate",
                )
            return
        if is_sampled(inner) or is_image(inner):
            return
        raise InvalidInput(
            f"column {name!r} is {kind}; sounds are {_FILES}, lists of numbers (with audio_sampling_rate), "
            "struct<array, sampling_rate>, or lists of these",
            field="audio_column",
        )
    if not is_image(inner):
        what = f"images are {_FILES} or lists of these"
        if modality == "video":
            what = f"videos are {_FILES}, or lists of images, which are their frames"
        raise InvalidInput(f"column {name!r} is {kind}; {what}", field=FIELDS[modality])


def is_image(kind: Any) -> bool:
    """True for what an image column may be: bytes, strings (URIs), or ``struct<bytes, path>`` of ``datasets``."""
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(at).name for at in range(kind.num_fields)}:
        return is_bytes(kind.field("bytes").type) and is_string(kind.field("path").type)
    return is_text(kind)


def is_samples(kind: Any) -> bool:
    """True for a list of numbers."""
    return is_list(kind) and pa.types.is_floating(kind.value_type)


def is_sampled(kind: Any) -> bool:
    """True for ``struct<array, sampling_rate>``, as the library ``datasets`` has sounds that it has decoded."""
    if not pa.types.is_struct(kind):
        return False
    parts = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
    return (
        {"array", "sampling_rate"} <= parts.keys()
        and is_samples(parts["array"])
        and pa.types.is_integer(parts["sampling_rate"])
    )


def media_of(columns: Mapping[str, str], batch: pa.RecordBatch, row: int) -> Media:
    """What the row has. Raises :class:`RowError` ``missing_value`` for a null or an empty list."""
    found: dict[str, tuple[Any, ...]] = {}
    in_frames = False
    for modality, name in columns.items():
        value = batch.column(batch.schema.get_field_index(name))[row]
        if isinstance(value, pa.DictionaryScalar):
            value = value.value
        several = is_list(value.type) and not is_samples(value.type)
        items = tuple(value.values) if several and value.is_valid else (value,)
        if several and value.is_valid and not items:
            raise RowError(RowErrorCode.MISSING_VALUE, f"column {name!r} holds an empty list")
        if any(is_lacking(item) for item in items):
            among = " among others" if several and len(items) > 1 else ""
            raise RowError(RowErrorCode.MISSING_VALUE, f"column {name!r} is null{among}")
        found[modality] = items
        in_frames = in_frames or (several and modality == "video")
    return Media(found, in_frames, sum(_size(item) for items in found.values() for item in items))


def is_lacking(item: Any) -> bool:
    """Whether a scalar of such a column holds nothing: a null, or a struct of nulls."""
    if not item.is_valid:
        return True
    if is_sampled(item.type):
        return not item["array"].is_valid
    return pa.types.is_struct(item.type) and not (item["bytes"].is_valid or item["path"].is_valid)


def _size(item: Any) -> int:
    if is_samples(item.type):
        return 4 * len(item.values)
    if pa.types.is_struct(item.type):
        return _size(item["array"] if is_sampled(item.type) else _file(item))
    return len(item.as_buffer() or b"")


def _file(item: Any) -> Any:
    """Bytes or URI of what may be a struct of both."""
    if not pa.types.is_struct(item.type):
        return item
    return item["bytes"] if item["bytes"].is_valid else item["path"]


def read(item: Any, fetch: Callable[[str], bytes] | None) -> bytes:
    """The encoded file. ``fetch`` reads a URI. Raises :class:`RowError`: ``unreadable_uri``, ``invalid_utf8``."""
    item = _file(item)
    data = bytes(item.as_buffer())
    if is_bytes(item.type):
        return data
    try:
        uri = data.decode()
    except UnicodeDecodeError as error:
        raise RowError(RowErrorCode.INVALID_UTF8, f"not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        inline = inline_media.content(uri)
        if inline is None and fetch is not None:
            inline = fetch(uri)
    except InvalidInput as error:
        raise RowError(RowErrorCode.UNREADABLE_URI, str(error)) from None
    if inline is None:
        raise RowError(RowErrorCode.UNREADABLE_URI, "nothing here reads URIs of a row")
    return inline
