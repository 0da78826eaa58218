"""A PyTorch checkpoint directory to an ONNX graph: exported once, checked against PyTorch, kept in a cache.

The TorchScript exporter comes first: on all-MiniLM-L6-v2 its graph ran 13% faster than the dynamo exporter's and took
2 s instead of 6 s to make (torch 2.13). Where it fails, or its graph disagrees with PyTorch, the dynamo exporter is
used.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.models import cache_entry
from pipeline.spec import json_text
from storage.errors import EngineMissing, InvalidModel

Kind = Literal["encoder", "classifier"]
"""``encoder``: gives token states, ``last_hidden_state`` [n, s, d]; ``classifier``: gives ``logits`` [n, labels]."""

LAYOUT = 2
"""Raised when what is exported, or what it is compared with, changes: older cache entries are not used any more."""
TOLERANCE = 1e-3
"""Largest absolute difference from PyTorch's float32 result that an exported graph may show."""
OPSET = 18
REPORT = "export.json"
GRAPH = "model.onnx"

WITHOUT_GRAPH = {
    **dict.fromkeys(("longformer", "led"), "its attention windows follow the length of a text"),
    "funnel": "how it pools tokens follows the length of a text",
    "perceiver": "it takes bytes instead of tokens",
    "reformer": "it hashes tokens into buckets",
}
"""Model types that are refused before a job begins: both exporters fail, or their graphs differ from PyTorch at some
length. Tried with torch 2.13 and transformers 5 on tiny checkpoints of the text encoders that Transformers has."""

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_LONGEST = 1100
_SHAPES = ((1, 1), (1, 2), (1, 5), (3, 17), (2, 63), (2, 300), (2, _LONGEST))
"""Rows and tokens that a graph is tried with. What looks at a window or at blocks of tokens, 64 to 512 in most models,
computes something else for a text that is longer than several of them."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported graph in the cache. ``max_abs_diff`` is its largest difference from PyTorch; ``tokenizer`` is set
    when the checkpoint had none that the Rust tokenizer reads, and one was converted."""

    graph: Path
    tokenizer: Path | None
    exporter: str
    max_abs_diff: float
    versions: dict[str, str]
    from_cache: bool


def check_exportable(folder: Path) -> None:
    """Raise :class:`~storage.errors.InvalidModel` when ``folder`` holds no checkpoint that can be exported: weights in
    safetensors, never pickled ones, of an architecture that has a graph."""
    if not (folder / "config.json").is_file():
        raise InvalidModel(f"{folder} holds neither an ONNX graph nor a Transformers checkpoint (no config.json)")
    kind = json_text.loads((folder / "config.json").read_bytes()).get("model_type")
    if kind in WITHOUT_GRAPH:
        raise InvalidModel(
            f"{folder} is of the architecture {kind!r}, which PyTorch cannot export to ONNX: {WITHOUT_GRAPH[kind]}. "
            "Use a model of another architecture (docs/reference/architectures.md lists some)",
            field="model",
        )
    if any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)):
        raise InvalidModel(
            f"{folder} holds its weights only in {pickled[0]}, a pickle, which can run code when it is loaded; "
            "convert it to model.safetensors (in Transformers: save_pretrained) and try again"
        )
    raise InvalidModel(f"{folder} holds no weights: neither an .onnx file nor a .safetensors file")


def exported(
    folder: Path,
    kind: Kind,
    digest: str,
    cache_dir: Path,
    notify: Callable[[str], None],
    *,
    name: str | None = None,
    tokenizer: bool = False,
) -> Exported:
    """The graph for the checkpoint in ``folder``, from the cache or exported now.

    ``digest`` (hex) names the checkpoint's content and is the key, with the kind and the exporter's versions. Two
    processes that export at once end with the same entry: the second waits for the first. With ``tokenizer``, a
    ``tokenizer.json`` is converted beside the graph. ``name`` is what the model is called in the message.

    Raises :class:`~storage.errors.EngineMissing` without torch and transformers (unless another version's export is in
    the cache), :class:`~storage.errors.InvalidModel` when the checkpoint cannot be loaded or exported, or when the
    graph differs from PyTorch by more than ``TOLERANCE``.
    """
    check_exportable(folder)
    home = cache_dir / "onnx"
    stem = f"{digest[:32]}-{kind}-"
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        older = sorted(home.glob(f"{stem}*-v{LAYOUT}/{REPORT}"), key=lambda path: path.stat().st_mtime)
        if older:
            return _read(older[-1].parent)
        raise EngineMissing(
            f"{folder} holds no ONNX graph, and exporting one needs {' and '.join(missing)}: install rowmill[export]"
        )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    key = (
        stem
        + "-".join(re.sub(r"[^\w.]", "_", f"{name}{version}") for name, version in versions.items())
        + f"-v{LAYOUT}"
    )
    final = home / key

    def make(work: Path) -> None:
        notify(f"exporting {name or folder.name} to ONNX (once; cached at {final})")
        _export(folder, kind, work, versions, convert_tokenizer=tokenizer)

    made = cache_entry.made_once(final, REPORT, make)
    return _read(final, from_cache=not made)


def _read(entry: Path, *, from_cache: bool = True) -> Exported:
    report = json.loads((entry / REPORT).read_text(encoding="utf-8"))
    converted = entry / "tokenizer.json"
    return Exported(
        graph=entry / GRAPH,
        tokenizer=converted if converted.is_file() else None,
        exporter=report["exporter"],
        max_abs_diff=report["max_abs_diff"],
        versions=report["versions"],
        from_cache=from_cache,
    )


def _export(folder: Path, kind: Kind, work: Path, versions: dict[str, str], *, convert_tokenizer: bool) -> None:
    with _quiet_transformers():
        model = _load(folder, kind)
        if convert_tokenizer:
            _convert_tokenizer(folder, work / "tokenizer.json")
    output = "last_hidden_state" if kind == "encoder" else "logits"
    wrapped, inputs = _wrap(model, output)
    notes = []
    for exporter in ("torchscript", "dynamo"):
        for old in work.glob(f"{GRAPH}*"):
            old.unlink()
        try:
            _trace(wrapped, inputs, output, work / GRAPH, exporter)
            difference = _difference(wrapped, inputs, work / GRAPH, masked=kind == "encoder")
        except Exception as error:  # whatever an exporter raises means: try the other one, or give up with its words
            notes.append(f"{exporter}: {type(error).__name__}: {_first_line(str(error))}")
            continue
        if difference <= TOLERANCE:
            report: dict[str, Any] = {"exporter": exporter, "max_abs_diff": difference, "tolerance": TOLERANCE}
            report |= {
                "versions": versions,
                "kind": kind,
                "inputs": inputs,
                "outputs": [output],
                "opset": OPSET,
                "notes": notes,
            }
            (work / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            return
        notes.append(f"{exporter}: differs from PyTorch by {difference:.2e}, more than {TOLERANCE:.0e}")
    raise InvalidModel(f"{folder} cannot be exported to ONNX: {'; '.join(notes)}")


def _first_line(text: str) -> str:
    """Of an exporter's message, without the colours that PyTorch puts in for a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip().partition("\n")[0]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as chatter

    shown = chatter.is_progress_bar_enabled()
    level = chatter.get_verbosity()
    chatter.disable_progress_bar()  # type: ignore[no-untyped-call]
    chatter.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if shown:
            chatter.enable_progress_bar()  # type: ignore[no-untyped-call]


_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}
"""Model type of an encoder-decoder → its encoder alone, which is what sentence-transformers embeds with."""


def _loader(folder: Path, kind: Kind) -> Any:
    import transformers

    if kind == "classifier":
        return transformers.AutoModelForSequenceClassification
    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    return getattr(transformers, _ENCODERS.get(config.model_type, "AutoModel"))


def _load(folder: Path, kind: Kind) -> Any:
    import torch
    from safetensors import SafetensorError

    try:
        loader = _loader(folder, kind)
        model, info = loader.from_pretrained(
            str(folder),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="eager",  # its operators are what ONNX Runtime fuses
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidModel(f"{folder} cannot be loaded by Transformers: {error}") from error
    # Token states need no pooler, which a masked-language-model checkpoint does not have.
    absent = sorted(name for name in info["missing_keys"] if kind == "classifier" or "pooler" not in name)
    if absent:
        raise InvalidModel(
            f"{folder} lacks weights of {type(model).__name__}: {', '.join(absent[:5])}"
            + (" …" if len(absent) > 5 else "")
        )
    return model.eval()


def _convert_tokenizer(folder: Path, path: Path) -> None:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
        tokenizer.backend_tokenizer.save(str(path))
    except Exception as error:  # a dozen converters, each with exceptions of its own
        raise InvalidModel(f"the tokenizer in {folder} cannot be converted to tokenizer.json: {error}") from error


def _wrap(model: Any, output: str) -> tuple[Any, tuple[str, ...]]:
    import torch

    accepted = inspect.signature(model.forward).parameters
    config = model.config
    names = [name for name in _INPUTS if name in accepted]
    if int(getattr(config, "type_vocab_size", 0) or 0) < 2:
        names = [name for name in names if name != "token_type_ids"]
    cache = {"use_cache": False} if "use_cache" in accepted else {}

    class Wrapped(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        """Positional inputs, one output."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return getattr(self.model(**dict(zip(names, inputs, strict=True)), **cache, return_dict=True), output)

    # The exporter puts back the mode that it finds: a wrapper left in training mode would turn the dropout on.
    return Wrapped().eval(), tuple(names)


def _samples(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs of several shapes, with and without padding, none of them the traced one."""
    import torch

    config = model.model.config
    generator = torch.Generator().manual_seed(0)
    for rows, length in sorted({(rows, min(length, longest(config))) for rows, length in _SHAPES}):
        mask = torch.ones(rows, length, dtype=torch.long)
        if rows > 1:
            mask[1:, max(1, length // 2) :] = 0
        yield {
            "input_ids": _ids(config, rows, length, generator),
            "attention_mask": mask,
            "token_type_ids": (torch.arange(length) >= length // 2).long().expand(rows, length).contiguous(),
        }


def longest(config: Any) -> int:
    """Most tokens of a sample: what the model takes, as far as its configuration says."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return max(1, int(positions) - 2) if positions and int(positions) > 2 else _LONGEST


def _ids(config: Any, rows: int, length: int, generator: Any) -> Any:
    import torch

    # Not the padding id, from which some models derive positions.
    ids = torch.randint(0, int(config.vocab_size), (rows, length), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    return torch.where(ids == pad, (ids + 1) % int(config.vocab_size), ids) if pad is not None else ids


def _trace(wrapped: Any, inputs: tuple[str, ...], output: str, path: Path, exporter: str) -> None:
    import torch

    config = wrapped.model.config
    ids = _ids(config, 2, 9, torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    example = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    arguments = tuple(example[name] for name in inputs)
    dynamic = {name: {0: "batch", 1: "sequence"} for name in inputs}
    kinds: dict[str, Any]
    if exporter == "torchscript":
        shape = {0: "batch", 1: "sequence"} if output == "last_hidden_state" else {0: "batch"}
        kinds = {"dynamo": False, "dynamic_axes": {**dynamic, output: shape}}
    else:
        kinds = {"dynamo": True, "dynamic_shapes": (tuple(dynamic.values()),), "verbose": False}
    with warnings.catch_warnings(), torch.no_grad(), _quiet_exporter():
        warnings.simplefilter("ignore")  # deprecation and tracing notes; the result is compared below
        torch.onnx.export(
            wrapped,
            arguments,
            str(path),
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            **kinds,
        )


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs a warning for each torchvision operator that is not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _difference(wrapped: Any, inputs: tuple[str, ...], path: Path, *, masked: bool) -> float:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: telemetry starts a thread that forks do not survive
    import onnxruntime
    import torch

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    worst = 0.0
    for sample in _samples(wrapped):
        with torch.inference_mode():
            expected = wrapped(*(sample[name] for name in inputs)).numpy()
        found = session.run(None, {name: sample[name].numpy() for name in inputs})[0]
        if found.shape != expected.shape:
            raise ValueError(f"the graph gives shape {list(found.shape)}, PyTorch {list(expected.shape)}")
        difference = np.abs(found - expected)
        if masked:  # what a model gives for padding means nothing
            difference = difference[sample["attention_mask"].numpy().astype(bool)]
        largest = float(difference.max())
        worst = max(worst, largest) if np.isfinite(largest) else float("inf")
    return worst
