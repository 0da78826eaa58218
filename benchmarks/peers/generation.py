"""Ray Data LLM and Daft as contenders of ``benchmarks.llm``, each in an environment of its own beside this vLLM.

``python generation.py KIND MODEL OPTIONS FOLDER``, with the protocol of ``llm_contenders.py``; nothing of Rowmill is
imported. Both start an engine for every dataset, so their seconds begin when it is ready, and what came before (reading
too, which they do meanwhile) is ``startup``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from process_tree import Clock, end_tree

Run = Callable[[Path, Path, dict[str, Any]], dict[str, Any]]
"""Input, output, sampling parameters → ``began``, by ``time.time``, and what else is worth saying."""


def ray(model: str, options: dict[str, Any], folder: Path) -> Run:
    """``build_processor`` with a vLLM engine on the CPU, in batches of 32, eight at a time: its defaults."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

    stamp = folder / "started"

    class Noted(vLLMEngineStageUDF):
        """Its stage, which says when its engine was ready."""

        def __init__(self, *values: Any, **named: Any) -> None:
            super().__init__(*values, **named)
            stamp.write_text(repr(time.time()))

    # The dashboard and its metrics are left out. Two processors more than there are, for its other stages: the engine
    # computes on all of them anyway.
    cores = len(os.sched_getaffinity(0))
    ray.init(num_cpus=cores + 2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(source: Path, target: Path, sampling: dict[str, Any]) -> dict[str, Any]:
        config = vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs=dict(options),
            placement_group_config={"bundles": [{"CPU": 1}]},
            log_engine_metrics=False,
            # vLLM does both; as stages they are two more processes that load Transformers.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            concurrency=1,
        )
        processor = build_processor(
            config,
            preprocess=lambda row: {"id": row["id"], "prompt": row["text"], "sampling_params": dict(sampling)},
            postprocess=lambda row: {
                "id": row["id"],
                "text": row["prompt"],
                "output": row["generated_text"],
                "completion_tokens": row["num_generated_tokens"],
            },
        )
        # Past its setter, which would derive the stage's resources anew and then ask for a GPU.
        processor.get_stage_by_name("vLLMEngineStage").__dict__["fn"] = Noted
        processor(ray.data.read_parquet(str(source))).write_parquet(str(target))
        return {"began": float(stamp.read_text())}

    return run


def daft(model: str, options: dict[str, Any], folder: Path) -> Run:
    """``prompt`` with the provider ``vllm-prefix-caching``: buffers prompts, sorts them, and puts them in by bucket."""
    import daft
    from daft.execution.vllm import LocalVLLMExecutor
    from daft.functions.ai import prompt
    from vllm import SamplingParams

    started: list[tuple[float, Any]] = []
    make = LocalVLLMExecutor.__init__

    def noted(self: Any, *values: Any, **named: Any) -> None:
        make(self, *values, **named)
        started.append((time.time(), self.llm))

    LocalVLLMExecutor.__init__ = noted
    daft.set_runner_native()

    def run(source: Path, target: Path, sampling: dict[str, Any]) -> dict[str, Any]:
        from daft.ai.vllm.provider import VLLMPrefixCachingProvider

        answer = prompt(
            daft.col("text"),
            provider=VLLMPrefixCachingProvider(),
            model=model,
            engine_args=dict(options),
            generate_args={"sampling_params": SamplingParams(**sampling)},
            gpus_per_actor=0,
        )
        daft.read_parquet(str(source)).with_column("output", answer).write_parquet(str(target))
        ((began, engine),) = started
        started.clear()
        engine.shutdown()  # it would stay beside the next one
        return {"began": began}

    return run


CONTENDERS = {"ray": ray, "daft": daft}


def attempt(kind: str, model: str) -> None:
    """One row through it all, or its error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pq.write_table(pa.table({"id": [0], "text": ["one row"]}), folder / "in.parquet")
        options = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True, "kv_cache_memory_bytes": 2**28}
        run = CONTENDERS[kind](model, options, folder)
        run(folder / "in.parquet", folder / "out", {"temperature": 0, "max_tokens": 2})
        assert pq.read_table(folder / "out").num_rows == 1


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1"}
    kind, model = sys.argv[1], sys.argv[2]
    if sys.argv[3:] == ["--try"]:
        attempt(kind, model)
        end_tree()
    options, folder = json.loads(sys.argv[3]), Path(sys.argv[4])
    # The protocol has the output to itself; whatever else is printed goes where it can be read.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run, clock = CONTENDERS[kind](model, options, folder), Clock()
    print("ready", file=lines, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        target = Path(asked["output"])
        shutil.rmtree(target, ignore_errors=True)
        asked_at = time.time()
        found = run(Path(asked["input"]), target, asked["sampling"])
        ended = time.time()
        began = found.pop("began")
        found |= {"seconds": ended - began, "startup": began - asked_at, "cpu": clock.since(began)}
        print(json.dumps(found), file=lines, flush=True)
    end_tree()


if __name__ == "__main__":
    main()
