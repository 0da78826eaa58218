"""The prompts of a sentence-transformers folder: what stands before every text, and which one a job chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.engines.model_config.json_files import read_json
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidJob, InvalidModel

_FILE = "config_sentence_transformers.json"
_ALWAYS_THERE = ("query", "document")
"""sentence-transformers knows these names in every model; they are empty where the folder does not set them."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """``texts``: name → text; ``default``: what is used where a job names none."""

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str = ""

    def of(self, spec: JobSpec) -> str:
        """What stands before every text of the job, as ``encode(prompt=…)`` and ``encode(prompt_name=…)`` have it.

        Raises :class:`~storage.errors.InvalidJob` for a name that the model does not have.
        """
        if spec.prefix is not None:
            return spec.prefix
        if spec.prompt_name is None:
            return self.default
        if spec.prompt_name not in self.texts:
            there = ", ".join(sorted(self.texts)) or "none"
            raise InvalidJob(
                f"the model has no prompt {spec.prompt_name!r}; it has {there} (prefix gives a text of yours)",
                field="prompt_name",
            )
        return self.texts[spec.prompt_name]


NONE = Prompts()


def read(root: Path) -> Prompts:
    """The prompts of the folder; none where it has no such file. Raises :class:`~storage.errors.InvalidModel`."""
    config = read_json(root / _FILE)
    texts = config.get("prompts") or {}
    if not isinstance(texts, dict) or not all(text is None or isinstance(text, str) for text in texts.values()):
        raise InvalidModel(f"{root / _FILE} is damaged: prompts is no object of texts")
    named = {str(name): text or "" for name, text in texts.items()}
    default = config.get("default_prompt_name")
    if default is None:
        return Prompts(named)
    if default not in named and default not in _ALWAYS_THERE:
        raise InvalidModel(
            f"{root / _FILE} names the default prompt {default!r}, and has {', '.join(sorted(named)) or 'none'}"
        )
    return Prompts(named, named.get(default, ""))
