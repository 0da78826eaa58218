"""From the name in a job to a model on disk: what is there, what kind it is, and its digest. Loads nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.models import external_data, module_folders
from pipeline.models.digest import digest
from pipeline.models.model import Model
from pipeline.spec import json_text
from storage.errors import InvalidModel

FAKE = "fake"
_FIELD = "model"
_BEST_GRAPHS = ("model.onnx", "onnx/model.onnx")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_SMALL_BYTES = 2**20
"""Larger JSON (a vocabulary) is read by libraries that limit its depth themselves."""
_GGUF = b"GGUF"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_NOT_THE_MODEL = (
    ".*",
    "__pycache__",
    "README*",
    "LICENSE*",
    "NOTICE*",
    "*.md",
    "*.png",
    "*.jpg",
    "*.jpeg",
    "*.gif",
    "*.svg",
    "*.pdf",
    "*.log",
    "*.tmp",
    "*.lock",
    # Left over from training, or the same weights for frameworks that no engine here loads.
    "events.out.tfevents.*",
    "training_args.bin",
    "trainer_state.json",
    "optimizer.*",
    "scheduler.*",
    "rng_state*",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "rust_model.ot",
    "openvino",
    "coreml",
)
"""Names of files and folders that do not change what a model computes: not part of the digest."""

BESIDE_A_GRAPH = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
)
"""What belongs to a text model whose graph was named as a file."""


def resolve(name: str, cache_dir: Path) -> Model:
    """The model of that name: ``fake``, a model directory or a ``.onnx`` file.

    ``cache_dir`` keeps the hashes of files that were seen before. Raises :class:`InvalidModel` when there is no such
    model, when it is neither a Transformers, a sentence-transformers nor an ONNX model, or when it is damaged.
    """
    if name == FAKE:
        return Model(name=FAKE, path=None, digest=hashlib.sha256(b"rowmill fake model 1").hexdigest())
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return _directory(name, path.resolve(), cache_dir)
        if path.is_file():
            return _file(name, path.absolute(), cache_dir)
    except OSError as error:
        raise InvalidModel(
            f"{error.filename or name} cannot be read: {error.strerror or error}", field=_FIELD
        ) from error
    except RuntimeError as error:  # from pathlib: a loop of symbolic links, or the home of an unknown user
        raise InvalidModel(f"{name} cannot be found: {error}", field=_FIELD) from error
    raise InvalidModel(_not_found(name, path), field=_FIELD)


def _not_found(name: str, path: Path) -> str:
    if _HUB_ID.match(name) and not path.parent.exists():
        return (
            f"{name!r} is not here. It looks like the name of a model on a hub, but models are given as local paths or "
            "registered names, and nothing is downloaded: fetch it yourself (such as with 'hf download "
            f"{name} --local-dir DIR') and give the directory"
        )
    return (
        f"no model {name!r}: there is no file or directory {path.absolute()}, and no model is registered under that "
        "name; give the path of a model directory (Transformers, sentence-transformers, ONNX) or of a .onnx file, "
        "or 'fake'"
    )


def _directory(name: str, root: Path, cache_dir: Path) -> Model:
    files = dict(_files_below(root))
    _check_files(root, files)
    config = _config(root, files)
    graphs = tuple(_with_weights(root / graph) for graph in sorted(_graphs(files), key=_preference))
    layers = {f"{folder.relative_to(root).as_posix()}/" for folder in module_folders.layers(root)}
    weights = tuple(
        files[file] for file in sorted(files) if _is_checkpoint(file) and not file.startswith(tuple(layers))
    )
    sentence_transformer = "modules.json" in files
    if not graphs and not weights:
        for file in files.values():
            _refuse_gguf(file)
    if config is None and not graphs and not sentence_transformer:
        raise InvalidModel(
            f"{root} is not a model directory: it has neither config.json (Transformers), modules.json "
            "(sentence-transformers) nor model.onnx or onnx/*.onnx",
            field=_FIELD,
        )
    for path in (*graphs, *weights):
        _refuse_pointer(path)
    for graph in [name for name in files if name.endswith(".onnx")]:
        files |= _beside(root, graph)
    return Model(
        name=name,
        path=root,
        digest=digest(files, cache_dir),
        content=files,
        architectures=_architectures(config or {}, root),
        config=config or {},
        onnx_files=graphs,
        weights=weights,
        sentence_transformer=sentence_transformer,
    )


def _file(name: str, path: Path, cache_dir: Path) -> Model:
    _refuse_gguf(path)
    if path.suffix != ".onnx":
        hint = "give its directory" if (path.parent / "config.json").is_file() else "give a .onnx file or a directory"
        raise InvalidModel(f"{path} is not a .onnx file; {hint}", field=_FIELD)
    _refuse_pointer(path)
    files = {path.name: path}
    graph = _with_weights(path)
    for location in _external(graph):
        files[location] = graph.parent / location
    # Exporters put the graph into onnx/, and leave tokenizer and configuration above it.
    root = path.parent
    if root.name == "onnx" and not (root / "tokenizer.json").exists():
        root = root.parent
    for pattern in BESIDE_A_GRAPH:
        files |= {f"./{file.relative_to(root)}": file for file in root.glob(pattern) if file.is_file()}
    for folder in module_folders.layers(root):
        made_of = (folder / "config.json", folder / module_folders.LAYER_WEIGHTS)
        files |= {f"./{file.relative_to(root)}": file for file in made_of if file.is_file()}
    config = _json(root / "config.json") if (root / "config.json").is_file() else {}
    return Model(
        name=name,
        path=path,
        digest=digest(files, cache_dir),
        content=files,
        architectures=_architectures(config, root),
        config=config,
        onnx_files=(graph,),
        sentence_transformer=(root / "modules.json").is_file(),
    )


def _external(path: Path) -> tuple[str, ...]:
    try:
        locations = external_data.locations(path)
    except ValueError as error:
        raise InvalidModel(f"{path} is not an ONNX graph: {error}", field=_FIELD) from error
    # As in ONNX Runtime, the weights of a graph that is a link (in a snapshot of a hub) may lie beside its target.
    allowed = (path.parent.resolve(), path.resolve().parent)
    for location in locations:
        if not any((path.parent / location).resolve().is_relative_to(folder) for folder in allowed):
            raise InvalidModel(f"{path} keeps weights in {location!r}, outside its own directory", field=_FIELD)
        if not (path.parent / location).is_file():
            raise InvalidModel(
                f"{path} keeps weights in {location!r}, which is not beside it; copy both files together", field=_FIELD
            )
    return locations


def _with_weights(graph: Path) -> Path:
    """The graph itself, or the file that the link ``graph`` leads to where only that one has its weights beside it."""
    if not graph.is_symlink():
        return graph
    locations, target = _locations(graph), graph.resolve()
    beside, there = ([(place.parent / name).is_file() for name in locations] for place in (graph, target))
    return target if not all(beside) and all(there) else graph


def _locations(graph: Path) -> tuple[str, ...]:
    try:
        return external_data.locations(graph)
    except ValueError:  # whoever loads it says so
        return ()


def _beside(root: Path, graph: str) -> dict[str, Path]:
    """The files that hold the graph's weights, whatever they are called: names passed over elsewhere count."""
    folder, source = Path(graph).parent, _with_weights(root / graph).parent
    found = {os.path.normpath(folder / location): source / location for location in _locations(root / graph)}
    return {Path(name).as_posix(): path for name, path in found.items() if path.is_file()}


def _files_below(root: Path) -> Iterator[tuple[str, Path]]:
    """Relative name and path of every file that makes the model, behind links too."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        here = Path(folder)
        folders[:] = [name for name in folders if not is_ignored(name) and not _leads_back(root, here / name)]
        safetensors = any(name.endswith(".safetensors") for name in names)
        for name in names:
            path = Path(folder) / name
            # The same weights again, in the older format: nothing loads them when there are safetensors.
            duplicate = safetensors and fnmatch(name, "pytorch_model*.bin*")
            if not is_ignored(name) and not duplicate and (path.is_file() or path.is_symlink()):
                yield path.relative_to(root).as_posix(), path


def _leads_back(root: Path, folder: Path) -> bool:
    """Whether a link leads to a folder that it lies in."""
    if not folder.is_symlink():
        return False
    inside = [above for above in folder.parents if above.is_relative_to(root)]
    return any(folder.samefile(above) for above in inside)


def is_ignored(name: str) -> bool:
    """Whether a file or folder of that name, wherever it lies, is no part of a model."""
    return any(fnmatch(name, pattern) for pattern in _NOT_THE_MODEL)


def _graphs(files: dict[str, Path]) -> list[str]:
    return [name for name in files if name.endswith(".onnx") and name.rpartition("/")[0] in ("", "onnx")]


def _preference(graph: str) -> tuple[int, str]:
    return (_BEST_GRAPHS.index(graph) if graph in _BEST_GRAPHS else len(_BEST_GRAPHS)), graph


def _is_checkpoint(name: str) -> bool:
    return name.endswith(".safetensors") or fnmatch(name.rpartition("/")[2], "pytorch_model*.bin")


def _config(root: Path, files: dict[str, Path]) -> dict[str, Any] | None:
    """``config.json``, wherever a sentence-transformers folder keeps that of its Transformers module."""
    if "config.json" in files:
        return _json(root / "config.json")
    below = [name for name in sorted(files) if name.endswith("Transformer/config.json") and name.count("/") == 1]
    if "modules.json" in files and below:
        return _json(root / below[0])
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json_text.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidModel(f"{path} is damaged: {error}; copy or download the model again", field=_FIELD) from error
    if not isinstance(content, dict):
        raise InvalidModel(f"{path} is damaged: it holds no JSON object", field=_FIELD)
    return content


def _check_files(root: Path, files: dict[str, Path]) -> None:
    """Refuse what Transformers and others would trip over: names that are not UTF-8, JSON that is nested too deeply."""
    for name, path in files.items():
        try:
            json_text.check_text(name)
            if name.endswith(".json") and path.is_file() and path.stat().st_size <= _SMALL_BYTES:
                json_text.loads(path.read_bytes())
        except json_text.TooDeep as error:
            raise InvalidModel(f"{path} is damaged: it is {error}", field=_FIELD) from None
        except ValueError as error:
            if not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                raise InvalidModel(f"a file's name in {root}: {error}", field=_FIELD) from None


def _architectures(config: dict[str, Any], root: Path) -> tuple[str, ...]:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidModel(f"{root / 'config.json'} is damaged: architectures is no list of names", field=_FIELD)
    return tuple(names)


def _refuse_gguf(path: Path) -> None:
    """GGUF holds weights for llama.cpp: no engine here takes them, and vLLM notices only after 20 s."""
    named = path.suffix.lower() == ".gguf"
    if path.is_file() and (named or path.suffix == ""):
        with path.open("rb") as file:
            named = named or file.read(len(_GGUF)) == _GGUF
    if named:
        raise InvalidModel(
            f"{path} is a GGUF file (llama.cpp), which no engine here reads; give a directory with the model's "
            "config.json and safetensors, which most hubs have beside it",
            field=_FIELD,
        )


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InvalidModel(
                f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in that repository", field=_FIELD
            )
