"""Images of a row for a multimodal model: read, decoded by vLLM's own loader, and put with the prompt.

That takes a processor's time and a tensor's memory, so it is done when a request is started, not when its row is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.engines import arrow_text
from pipeline.engines.images import is_image
from pipeline.engines.vllm_process import RunningVllm, first_lines
from pipeline.job_spec import JobSpec
from pipeline.row_errors import MESSAGE_LIMIT, RowErrorCode
from storage.errors import InvalidInput, InvalidJob, RowError


def check_column(kind: Any, name: str) -> None:
    """Raise :class:`InvalidInput` unless the column holds images, or lists of them."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not is_image(kind.value_type if any(test(kind) for test in lists) else kind):
        raise InvalidInput(
            f"column {name!r} is {kind}; images are bytes, URIs, struct<bytes, path> or lists of these",
            field="image_column",
        )


class Images:
    """The images of one job. ``fetch`` reads a URI that the operator allows, or raises :class:`InvalidInput`.

    Raises :class:`InvalidJob` for a model that takes none.
    """

    def __init__(self, running: RunningVllm, spec: JobSpec, fetch: Callable[[str], bytes] | None) -> None:
        from vllm.multimodal.media.image import ImageMediaIO

        if not running.config.model_config.is_multimodal_model:
            raise InvalidJob("this model takes text only", field="image_column")
        assert spec.image_column is not None
        self.column = spec.image_column
        self._renderer = running.llm.renderer
        self._context: int = running.config.model_config.max_model_len
        self._fetch = fetch
        self._loader = ImageMediaIO()

    def values(self, column: pa.Array[Any]) -> list[Any]:
        """What each row of the column has: bytes, a URI, a mapping of both, a list of these, or ``None``."""
        return arrow_text.plain(column)

    def of(self, value: Any) -> list[Any]:
        """The images of a row. Raises :class:`RowError` where there is none."""
        if value is None:
            raise RowError(RowErrorCode.MISSING_VALUE, f"column {self.column!r} is null")
        found = list(value) if isinstance(value, list) else [value]
        for image in found:
            path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else image
            if path is None:
                raise RowError(RowErrorCode.MISSING_VALUE, f"column {self.column!r} holds a null among the images")
        return found

    def completion(self, text: str, images: Sequence[Any]) -> Any:
        """vLLM's input for a text, which names the places of its images as the model wants them named."""
        prompt = {"prompt": text, "multi_modal_data": {"image": self._loaded(images)}}
        return self._made(lambda: self._renderer.render_cmpl([prompt], skip_mm_cache=True)[0])

    def chat(self, messages: Sequence[dict[str, Any]], images: Sequence[Any], chat_params: Any) -> Any:
        """vLLM's input for messages; the images go before the text of the last message of a user."""
        talk = [dict(message) for message in messages]
        at = max((index for index, message in enumerate(talk) if message["role"] == "user"), default=None)
        if at is None:
            raise RowError(RowErrorCode.INVALID_VALUE, "no message is a user's, to put the images into")
        content = talk[at]["content"]
        text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        talk[at]["content"] = [{"type": "image_pil", "image_pil": image} for image in self._loaded(images)] + text
        tokens = self._renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
        return self._made(lambda: self._renderer.render_chat([talk], chat_params, tokens, skip_mm_cache=True)[1][0])

    def _loaded(self, images: Sequence[Any]) -> list[Any]:
        found = []
        for image in images:
            data = self._bytes(image)
            try:
                found.append(self._loader.load_bytes(data))
            except Exception as error:  # Pillow's decoders raise nearly anything for broken files
                reason = f"column {self.column!r}: {first_lines(error)} ({len(data)} bytes)"
                raise RowError(RowErrorCode.INVALID_IMAGE, reason[:MESSAGE_LIMIT]) from None
        return found

    def _bytes(self, image: Any) -> bytes:
        if isinstance(image, Mapping):
            image = image["path"] if image.get("bytes") is None else image["bytes"]
        if isinstance(image, bytes):
            return image
        if self._fetch is None:
            raise RowError(RowErrorCode.UNREADABLE_URI, f"column {self.column!r}: nothing here reads URIs of a row")
        try:
            return self._fetch(image)
        except InvalidInput as error:
            raise RowError(RowErrorCode.UNREADABLE_URI, f"column {self.column!r}: {error}"[:MESSAGE_LIMIT]) from None

    def _made(self, render: Callable[[], Any]) -> Any:
        from vllm.exceptions import VLLMClientError

        try:
            made = render()
        except (VLLMClientError, ValueError, TypeError, KeyError) as error:
            long = str(getattr(error, "parameter", "")).startswith("input_")
            code = RowErrorCode.PROMPT_TOO_LONG if long else RowErrorCode.INVALID_VALUE
            raise RowError(code, first_lines(error, MESSAGE_LIMIT)) from None
        if (size := len(made["prompt_token_ids"])) >= self._context:
            message = f"the prompt has {size} tokens with its images; with one more it must fit into {self._context}"
            raise RowError(RowErrorCode.PROMPT_TOO_LONG, message)
        return made
