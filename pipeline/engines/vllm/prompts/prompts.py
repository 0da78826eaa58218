"""From rows to prompts of token ids: templates rendered, chat templates applied, texts tokenized and checked.

The tokens are those of ``LLM.generate`` and ``LLM.chat`` for the same text and messages: vLLM's own renderer and
tokenizer make them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.engines import rendering
from pipeline.engines.arrow_text import values
from pipeline.engines.base import RowBatch, RowFailure
from pipeline.engines.generation import chat_messages
from pipeline.engines.input_columns import templates
from pipeline.engines.media.columns import Media
from pipeline.engines.vllm.prompts.lora import Adapters
from pipeline.engines.vllm.prompts.media import MediaInputs
from pipeline.engines.vllm.prompts.sampling_params import JobParams, Params
from pipeline.spec.error_codes import MESSAGE_LIMIT, RowErrorCode
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidModel, RowError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, ready for the engine. ``params`` where they are not the job's; ``adapter``: a ``LoRARequest``.

    ``make``, where there is one, makes vLLM's input in place of ``tokens``, or raises :class:`RowError`; until then it
    holds ``make_bytes`` bytes.
    """

    row: int
    tokens: list[int]
    params: Params | None = None
    adapter: Any = None
    make: Callable[[], Any] | None = None
    make_bytes: int | None = None


class Prompts:
    """Turns row batches into prompts, for one job on one engine. Not to be shared between threads.

    ``llm`` is vLLM's ``AsyncLLM``; ``room`` the tokens of the context to leave for the answer when a prompt is cut;
    ``params``, ``adapters`` and ``media`` say what a row has of its own.
    """

    def __init__(
        self,
        llm: Any,
        spec: JobSpec,
        room: int,
        params: JobParams | None = None,
        adapters: Adapters | None = None,
        media: MediaInputs | None = None,
    ) -> None:
        self._renderer = llm.renderer
        self._tokenizer = llm.get_tokenizer()
        self._context: int = llm.model_config.max_model_len
        self._room = room
        self._params, self._adapters, self._media = params, adapters, media
        self._truncate = spec.overlong == "truncate"
        self._column, self._token_column = spec.column, spec.prompt_token_column
        self._templates = [template for _, template in templates(spec)]
        self._fields = list(dict.fromkeys(name for template in self._templates for name in template.fields))
        self._chat = spec.task is Task.CHAT
        # The roles of templated messages; ``prompt`` is the one message of a user.
        self._roles = [message.role for message in spec.messages] if spec.messages is not None else ["user"]
        defaults = self._renderer.default_chat_tok_params if self._chat else self._renderer.default_cmpl_tok_params
        self._lower_case = bool(defaults.do_lower_case)
        # As LLM.chat does: a chat template writes the special tokens itself.
        self._special_tokens = False if self._chat else bool(defaults.add_special_tokens)
        self._chat_params = self._chat_params_of(spec.tools, spec.chat_template_kwargs)

    def _chat_params_of(self, tools: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> Any:
        """vLLM's ``ChatParams``. The arguments are those of LLM.chat, so that the text is, too."""
        from vllm.renderers import ChatParams
        from vllm.renderers.params import merge_kwargs
        from vllm.utils.mistral import is_mistral_tokenizer

        own = {
            "add_generation_prompt": True,
            "continue_final_message": False,
            "tools": [dict(tool) for tool in tools] or None,
            "tokenize": is_mistral_tokenizer(self._tokenizer),
        }
        return ChatParams(chat_template_kwargs=merge_kwargs(own, dict(template)))

    def check_chat_template(self) -> None:
        """Raise :class:`InvalidModel` when the model has no chat template, or one that cannot be read at all."""
        from vllm.renderers.chat_utils import ChatTemplateResolutionError

        try:
            self._renderer.render_messages([{"role": "user", "content": "hello"}], self._chat_params)
        except ChatTemplateResolutionError:
            raise InvalidModel(
                "the model has no chat template; use task 'generate' with a prompt that says it all, or add a "
                "chat_template.jinja to the model's directory",
                field="task",
            ) from None
        except ValueError:
            # A template may refuse this very message; each row will say so for itself.
            return

    def read(self, batch: RowBatch, chunk: int) -> Iterator[tuple[list[Prompt], list[RowFailure]]]:
        """The prompts of a batch, ``chunk`` rows at a time, and the rows that cannot be one."""
        make, rows = self._row_reader(batch), batch.rows.tolist()
        for start in range(0, len(rows), chunk):
            failures: list[RowFailure] = []
            ready: list[tuple[Prompt, str | None]] = []
            for at in range(start, min(start + chunk, len(rows))):
                try:
                    ready.append(make(at))
                except RowError as error:
                    failures.append(RowFailure(rows[at], error.code, error.message[:MESSAGE_LIMIT]))
            yield self._tokenize(ready, failures), failures

    def _row_reader(self, batch: RowBatch) -> Callable[[int], tuple[Prompt, str | None]]:
        """A function from a row's position to its prompt, and to the text that still has to become its tokens. It
        raises :class:`RowError`."""

        def column(name: str) -> Any:
            return batch.columns.column(batch.columns.schema.get_field_index(name))

        needed = [name for name in (self._column, self._token_column) if name is not None]
        read: dict[str, list[Any]] = {name: values(column(name)) for name in needed}
        if not needed:
            read = {name: list(rendering.texts(column(name), name)) for name in self._fields}
        names = [*(self._params.columns if self._params else ()), *(self._adapters.columns if self._adapters else ())]
        own = {name: values(column(name)) for name in names}

        def make(at: int) -> tuple[Prompt, str | None]:
            media = self._media.of(batch.columns, at) if self._media else None
            made = self._render({name: found[at] for name, found in read.items()}, media)
            row = {name: found[at] for name, found in own.items()}
            params = self._params.of(row) if self._params else None
            prompt = Prompt(int(batch.rows[at]), [], params, self._adapters.of(row) if self._adapters else None)
            if isinstance(made, str):
                return prompt, made
            if callable(made):
                return replace(prompt, make=made, make_bytes=media.n_bytes if media else None), None
            return replace(prompt, tokens=made), None

        return make

    def _render(self, row: Mapping[str, Any], media: Media | None) -> str | list[int] | Callable[[], Any]:
        """The text of one row's prompt; its tokens, where a column or a chat template has them; or, with media, what
        makes vLLM's input."""
        for name, value in row.items():
            if value is None:
                raise RowError(RowErrorCode.MISSING_VALUE, f"column {name!r} is null")
            if isinstance(value, RowError):
                raise RowError(value.code, value.message)
            if isinstance(value, bytes):
                raise RowError(RowErrorCode.INVALID_UTF8, f"column {name!r} holds bytes that are not UTF-8")
        if self._token_column is not None:
            return self._given_tokens(row[self._token_column])
        if not self._chat:
            text = self._templates[0].render(row)
        else:
            if self._column is not None:
                messages = chat_messages.parse_messages(row[self._column])
            else:
                texts = [template.render(row) for template in self._templates]
                messages = [{"role": r, "content": t} for r, t in zip(self._roles, texts, strict=True)]
                if not any(texts):
                    raise RowError(RowErrorCode.INVALID_VALUE, "the messages are empty")
            if self._media is not None and media is not None:
                return functools.partial(self._media.chat, messages, media, self._chat_params)
            made = self._apply_chat_template(messages, self._chat_params)
            if not isinstance(made, str):
                return made
            text = made
        if not text:
            raise RowError(RowErrorCode.INVALID_VALUE, "the prompt is empty")
        try:
            text.encode()  # JSON can hold half of a surrogate pair
        except UnicodeEncodeError as error:
            raise RowError(RowErrorCode.INVALID_UTF8, f"the text is not valid Unicode: {error.reason}") from None
        text = text.lower() if self._lower_case else text
        if self._media is not None and media is not None:
            return functools.partial(self._media.completion, text, media)
        return text

    def _given_tokens(self, tokens: list[int | None]) -> list[int]:
        name = self._token_column
        if not tokens:
            raise RowError(RowErrorCode.INVALID_VALUE, f"column {name!r} holds no token")
        given = [token for token in tokens if token is not None]
        if len(given) < len(tokens):
            raise RowError(RowErrorCode.INVALID_VALUE, f"column {name!r} holds a null among the tokens")
        return self._valid(given, f"column {name!r}")

    def _valid(self, tokens: list[int], what: str) -> list[int]:
        from vllm.exceptions import VLLMClientError

        try:
            # Behind an embedding's last row is other memory.
            self._renderer.validate_token_ids(tokens)
        except VLLMClientError as error:
            raise RowError(RowErrorCode.INVALID_VALUE, f"{what}: {error}") from None
        return tokens

    def _apply_chat_template(self, messages: list[dict[str, Any]], params: Any) -> str | list[int]:
        from vllm.exceptions import VLLMClientError

        try:
            _, prompt = self._renderer.render_messages(messages, params)
        # What vLLM and a template's raise_exception raise for messages that they do not take.
        except (VLLMClientError, ValueError, TypeError, KeyError) as error:
            raise RowError(RowErrorCode.INVALID_VALUE, f"the chat template refuses the messages: {error}") from None
        if "prompt_token_ids" in prompt:
            return list(prompt["prompt_token_ids"])
        return str(prompt["prompt"])

    def _tokenize(self, ready: Sequence[tuple[Prompt, str | None]], failures: list[RowFailure]) -> list[Prompt]:
        """``ready``: prompts, those with a text still without their tokens."""
        # A text this long cannot fit, whatever its tokens are; it is not worth finding out how many there are.
        most = self._context * self._tokenizer.max_chars_per_token
        texts = {p.row: text for p, text in ready if text is not None and (self._truncate or len(text) <= most)}
        # All at once: the tokenizer works on them in parallel, without Python.
        tokens = dict(zip(texts, self._encode(list(texts.values())) if texts else (), strict=True))
        prompts = []
        for prompt, text in ready:
            made = prompt.tokens if text is None else tokens.get(prompt.row)
            if made is not None and len(made) < self._context:
                prompts.append(replace(prompt, tokens=made))
            elif made is not None and self._truncate:
                limit = max(1, self._context - self._room)
                cut = made[:limit] if text is None else self._encode([text], limit)[0]
                prompts.append(replace(prompt, tokens=cut))
            else:
                size = f"{len(text or '')} characters" if made is None else f"at least {len(made)} tokens"
                message = f"the prompt has {size}; with one more to generate it must fit into {self._context} tokens"
                failures.append(RowFailure(prompt.row, RowErrorCode.PROMPT_TOO_LONG, message))
        return prompts

    def _encode(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        """The tokens of each text, ``limit`` at most. A cut falls on the side that the tokenizer is set to, and leaves
        the special tokens."""
        made = self._tokenizer(
            texts,
            add_special_tokens=self._special_tokens,
            truncation=True,
            # One more than fits is enough to see that it does not.
            max_length=limit or self._context + 1,
        )
        return list(made["input_ids"])
