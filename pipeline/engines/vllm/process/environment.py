"""What vLLM and its processes are given: environment variables, a main module of ours, default arguments."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.spawn
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.engines.vllm.process import child
from pipeline.host.memory import memory_bytes
from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)

GIB = 2**30


class _ToOurLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log.info("vllm: %s", record.getMessage(), exc_info=record.exc_info, action=Action.ENGINE_OUTPUT)


def prepare_environment() -> None:
    """Set, before vLLM is imported, what it reads from the environment; what the user has set there stands.

    Its messages go to our log, as information: it warns of much that is its own default. Whoever sets one of its
    logging variables has vLLM log by itself, to standard error. Nothing is looked up on a model hub, since models are
    local directories, and no usage statistics are sent.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    asked = {"VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH"} & os.environ.keys()
    if not asked:
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    logger = logging.getLogger("vllm")
    if os.environ.get("VLLM_CONFIGURE_LOGGING") == "0" and not logger.handlers:
        logger.addHandler(_ToOurLog())
        logger.setLevel(logging.WARNING)
        logger.propagate = False


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def settled_children() -> Iterator[None]:
    """Makes processes that this thread spawns meanwhile run :mod:`.child` first, and not our main module."""
    original, thread = multiprocessing.spawn.get_preparation_data, threading.get_ident()

    def prepared(name: str) -> dict[str, Any]:
        data = original(name)
        if threading.get_ident() == thread:
            data.pop("init_main_from_path", None)
            data["init_main_from_name"] = child.__name__
        return data

    multiprocessing.spawn.get_preparation_data = prepared
    try:
        yield
    finally:
        multiprocessing.spawn.get_preparation_data = original


def engine_arguments(model: str, options: Mapping[str, Any], *, cpu: bool) -> dict[str, Any]:
    """Our defaults under the user's options. The batch sizes are vLLM's own for offline use, by hardware.

    On a CPU: eager mode, which starts in 10 s rather than 30 (``enforce_eager=False`` pays off over long jobs); and a
    KV cache of 4 GiB, or a quarter of the memory where that is less, instead of most of the machine.
    """
    arguments: dict[str, Any] = {"disable_log_stats": True, "use_tqdm_on_load": False}
    if cpu:
        arguments["enforce_eager"] = True
        sized = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"} & options.keys()
        if not sized and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            arguments["kv_cache_memory_bytes"] = min(4 * GIB, memory_bytes() // 4)
    return arguments | dict(options) | {"model": model}
