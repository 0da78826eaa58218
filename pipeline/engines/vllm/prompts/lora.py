"""LoRA adapters in vLLM: checked at submit, made known to the engine, and chosen by row."""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.engines.vllm.process.output import first_lines
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.models.adapters import WEIGHTS, digest, directory
from pipeline.spec import json_text
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage.errors import EngineDead, InvalidJob, RowError

RANK = 16
"""vLLM's default of ``max_lora_rank``."""
_LINEAR = ("q_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "o_proj", "up_proj", "fc1")
"""Names of linear layers, of which every decoder has one."""


def check(spec: JobSpec) -> None:
    """Raise :class:`InvalidJob` for adapters that are not there, or that the engine is not started for."""
    if not spec.adapters:
        return
    highest = max(_rank(name, directory(name, folder)) for name, folder in spec.adapters.items())
    most = spec.engine_options.get("max_lora_rank", RANK)
    if not spec.engine_options.get("enable_lora") or (isinstance(most, int) and highest > most):
        rank = f", max_lora_rank={highest}" if highest > RANK else ""
        options = " ".join(f"--set {option.strip()}" for option in f"enable_lora=true{rank}".split(","))
        raise InvalidJob(
            f"an engine takes adapters only when it was started for them: set enable_lora=true{rank} ({options})",
            field="engine_options",
        )


def _rank(name: str, folder: Path) -> int:
    field = f"adapters.{name}"
    try:
        config = json_text.loads((folder / "adapter_config.json").read_bytes())
        kind, rank = config.get("peft_type"), config.get("r")
    except FileNotFoundError:
        raise InvalidJob(f"{folder} is no adapter: it holds no adapter_config.json", field=field) from None
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidJob(f"{folder / 'adapter_config.json'} cannot be read: {error}", field=field) from None
    if kind != "LORA" or not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InvalidJob(f"{folder} is a {kind} adapter of rank {rank}; LoRA adapters are supported", field=field)
    if not (folder / WEIGHTS).is_file():
        raise InvalidJob(f"{folder} holds no {WEIGHTS} (pickled weights are not loaded)", field=field)
    return rank


class LoadedAdapters:
    """The adapters that one engine knows, by their content: vLLM keeps weights, and cached prefixes, by name.

    On a CPU, vLLM 0.32 gives requests without an adapter the one in its last slot (its PyTorch kernels index with -1).
    There they get an adapter of zeros, which changes nothing: docs/adr/0016.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._known: dict[str, Any] = {}
        self._zeros: tempfile.TemporaryDirectory[str] | None = None

    def load(self, running: RunningVllm, name: str, folder: Path) -> Any:
        """The ``LoRARequest`` of an adapter, loaded now if need be. Raises :class:`InvalidJob` when vLLM cannot."""
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        content = digest(name, folder, self._cache_dir)
        with self._lock:
            # vLLM drops adapters for others, and reads them again from where they were: it must be this content still.
            known = self._known.get(content)
            if known is None or (
                known.lora_path != str(folder) and not self._holds(name, Path(known.lora_path), content)
            ):
                request = LoRARequest(content, next(self._numbers), str(folder))
                try:
                    running.ask(running.llm.add_lora(request))
                except EngineDeadError:
                    raise running.death() from None
                except EngineDead:
                    raise
                except Exception as error:
                    if running.dead:
                        raise running.death() from error
                    raise InvalidJob(f"vLLM cannot load it: {first_lines(error)}", field=f"adapters.{name}") from error
                self._known[content] = request
            return self._known[content]

    def _holds(self, name: str, folder: Path, content: str) -> bool:
        try:
            return digest(name, folder, self._cache_dir) == content
        except InvalidJob:
            return False

    def none(self, running: RunningVllm) -> Any:
        """What requests without an adapter must have: ``None``, or the ``LoRARequest`` of an adapter of zeros.

        Raises :class:`InvalidJob` when there can be none for this model.
        """
        config = running.config
        if config.lora_config is None or config.device_config.device_type != "cpu":
            return None
        with self._lock:
            if self._zeros is None:
                self._zeros = tempfile.TemporaryDirectory(prefix="rowmill-adapter-")
                _write_zeros(Path(self._zeros.name), Path(config.model_config.model))
        return self.load(running, "none", Path(self._zeros.name))


def _write_zeros(folder: Path, model: Path) -> None:
    """An adapter of rank one that adds nothing to one linear layer of the model."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                module = name.removesuffix(".weight")
                if module == name or not module.endswith(_LINEAR):
                    continue
                wide, narrow = weights.get_slice(name).get_shape()
                stem = f"base_model.model.{module}"
                zeros = {"lora_A": torch.zeros(1, narrow), "lora_B": torch.zeros(wide, 1)}
                save_file({f"{stem}.{part}.weight": tensor for part, tensor in zeros.items()}, folder / WEIGHTS)
                target = module.rpartition(".")[2]
                config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [target], "bias": "none"}
                (folder / "adapter_config.json").write_text(json.dumps(config))
                return
    raise InvalidJob(
        "on a CPU, vLLM cannot keep adapters away from rows without one in this model; leave it out",
        field="engine_options.enable_lora",
    )


class Adapters:
    """The adapters of one job."""

    def __init__(self, running: RunningVllm, spec: JobSpec, loaded: LoadedAdapters) -> None:
        self._requests = {
            name: loaded.load(running, name, Path(folder).expanduser()) for name, folder in spec.adapters.items()
        }
        self._none = loaded.none(running)
        self._column = spec.adapter_column
        self.columns = () if self._column is None else (self._column,)

    def of(self, row: Mapping[str, Any]) -> Any:
        """The row's ``LoRARequest``, or ``None``. Raises :class:`RowError` for a name that the job does not have."""
        if self._column is None:
            return next(iter(self._requests.values()), self._none)
        name = row[self._column]
        if name is None:
            return self._none
        if name not in self._requests:
            known = ", ".join(self._requests)
            raise RowError(RowErrorCode.INVALID_VALUE, f"there is no adapter {name!r}; the job has {known}")
        return self._requests[name]
