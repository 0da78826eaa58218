"""The fields of a job whose rows are requests of OpenAI's API, and the endpoints that such requests may have. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from pipeline.spec.values import Name

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TASK_OF: Mapping[str, str] = {CHAT: "chat", COMPLETIONS: "generate", EMBEDDINGS: "embed"}
"""Endpoint → task."""
CUSTOM_ID = "custom_id"
"""The column that holds a request's name, in the lines of a batch file."""
PER_REQUEST = frozenset({"n", "logprobs", "prompt_logprobs", "logprob_token_ids", "structured_outputs"})
"""Sampling parameters that change what a response holds: each request says them for itself."""


class RequestFields(BaseModel):
    """The fields of a job about rows that are requests."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    request_column: Name | None = None
    """A column whose rows are requests: the body that OpenAI's API takes at ``endpoint``, as JSON text or as structs.
    Each request has its own parameters; ``sampling`` says those that it leaves out."""
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"] | None = None
    """What the requests are for; by default the endpoint of ``task``. Without ``task``, this names it."""
    openai_lines: bool = False
    """Write the responses as the lines of OpenAI's batch API too: ``<output>/openai/output.jsonl`` and
    ``errors.jsonl``. The input needs a column ``custom_id``."""

    @model_validator(mode="before")
    @classmethod
    def _an_endpoint_names_its_task(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("task") is None and data.get("endpoint") in TASK_OF:
            return {**data, "task": TASK_OF[data["endpoint"]]}
        return data


def endpoint_of(task: str) -> str | None:
    """The endpoint whose requests the task answers; ``None`` where there is none."""
    return next((url for url, name in TASK_OF.items() if name == task), None)


NOT_BESIDE_REQUESTS = (
    *("prompt", "prompt_token_column", "messages", "column", "pair_column", "sampling_columns", "tools"),
    *("image_column", "audio_column", "video_column", "adapters", "adapter_column", "dimensions", "embedding_type"),
)
"""Fields that say what each request says for itself, or that no request can ask for."""


def check_requests(spec: Any) -> None:
    """Raise ``ValueError`` for fields of a ``JobSpec`` that do not go with requests as rows, or only with them."""
    if spec.request_column is None:
        alone = [name for name in ("endpoint", "openai_lines") if getattr(spec, name)]
        if alone:
            raise ValueError(f"{alone[0]} is for requests; name their column in request_column (--request-column)")
        return
    url = endpoint_of(spec.task)
    if url is None:
        raise ValueError(f"requests are answered by the tasks {', '.join(TASK_OF.values())}, not by '{spec.task}'")
    if spec.endpoint not in (None, url):
        raise ValueError(f"endpoint {spec.endpoint} is of task '{TASK_OF[spec.endpoint]}', not of '{spec.task}'")
    if given := [name for name in NOT_BESIDE_REQUESTS if getattr(spec, name) not in (None, {}, ())]:
        raise ValueError(f"{', '.join(given)} and request_column exclude each other: a request says it all itself")
    if given := sorted(PER_REQUEST & spec.sampling.keys()):
        raise ValueError(f"each request says {', '.join(given)} for itself; remove it from sampling")
    if spec.order == "prefix":
        raise ValueError("order 'prefix' reads a prompt, which requests hide; leave order at 'auto'")
    if spec.cache != "off":
        raise ValueError("responses to requests are not cached; leave cache off")
    if spec.openai_lines and spec.keep_columns is not None and CUSTOM_ID not in spec.keep_columns:
        raise ValueError(f"openai_lines needs the column {CUSTOM_ID!r}; name it in keep_columns too (--keep)")
