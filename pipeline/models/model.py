"""What is known of a model before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk.

    ``path`` is a directory or a ``.onnx`` file (``None`` for the built-in ``fake``); ``digest`` the SHA-256 (hex) of
    its content; ``architectures`` and ``config`` come from its ``config.json``, if any; ``onnx_files`` are the graphs
    found, best first; ``weights`` the PyTorch weight files; ``sentence_transformer``: there is a ``modules.json``;
    ``content`` every file that the digest covers, by its name relative to the directory.
    """

    name: str
    path: Path | None
    digest: str
    architectures: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    onnx_files: tuple[Path, ...] = ()
    weights: tuple[Path, ...] = ()
    sentence_transformer: bool = False
    content: Mapping[str, Path] = field(default_factory=dict)

    @property
    def autoregressive(self) -> bool:
        """True for decoder language models, whatever their modality."""
        return any(
            name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in self.architectures
        )
