"""The sampling parameters that a job may set: ``sampling.toml``, read and applied.

What only vLLM can judge (a range that depends on the model, a grammar that does not compile) is judged by vLLM before
the first row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.engines.generation import structured_output
from pipeline.engines.generation.validators import OptionTable
from storage.errors import InvalidJob

TABLE = OptionTable(Path(__file__).with_name("sampling.toml"), "sampling", "sampling parameters")
SAMPLING = frozenset(TABLE.settable)
"""The fields of vLLM's ``SamplingParams`` that a job may set, by vLLM's own names."""


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidJob` for a name that vLLM does not have, or a value that it could not take."""
    for name, value in sampling.items():
        check_parameter(name, value)
    least, most = sampling.get("min_tokens", 0), sampling.get("max_tokens", 16)
    if most is not None and least > most:
        raise InvalidJob(f"{least} is more than max_tokens, which is {most}", field="sampling.min_tokens")
    if sampling.get("n", 1) > 1 and sampling.get("temperature", 1) == 0:
        raise InvalidJob("at temperature 0 there is not more than one answer to a prompt", field="sampling.n")


def check_parameter(name: str, value: Any) -> None:
    """Raise :class:`InvalidJob` unless vLLM has a parameter of that name that could take the value."""
    TABLE.check(name, value, f"sampling.{name}")
    if name == "structured_outputs" and value is not None:
        structured_output.check(value)
