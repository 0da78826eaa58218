"""Scripts for the tests of the vLLM engine, run as processes of their own, and the rows and jobs that they share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engines.base import EngineContext, RowBatch
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec, parse

ROOT = Path(__file__).parents[3]
CONTEXT = 256
# In bfloat16, which vLLM takes for float32 weights otherwise, two tokens may tie, and the batch decides between them.
OPTIONS: Mapping[str, Any] = {"dtype": "float32", "max_model_len": CONTEXT}
GREEDY: Mapping[str, Any] = {"temperature": 0, "max_tokens": 12}

PROMPTS = [
    "Summarise in one line: the quick brown fox jumps over the lazy dog.",
    "x",
    " leading and trailing spaces ",
    "Línea con acentos, 中文, \U0001f600 and a\ttab\nand lines",
    "<s> a special token in the text </s>",
    "Question: what is 12 times 7? " * 8,
    *(f"The parcel with number {number} weighs {number / 7:.3f} kilograms." for number in range(24)),
]
CONVERSATIONS = [
    [{"role": "user", "content": "Is this review positive or negative? It broke."}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is the capital of Norway?"}],
    [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Rhine."},
        {"role": "user", "content": "And a mountain?"},
    ],
]

# What vLLM itself makes of them, all at once.
REFERENCE = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams

def main():
    model, options, sampling, prompts, conversations = json.load(sys.stdin)
    llm = LLM(model, enforce_eager=True, **options)
    params = SamplingParams(**sampling)
    found = {
        "generate": llm.generate(prompts, params, use_tqdm=False),
        "chat": llm.chat(conversations, params, use_tqdm=False),
    }
    with open(sys.argv[1], "w") as out:
        json.dump({task: [outline(done) for done in answers] for task, answers in found.items()}, out)

def outline(done):
    first = done.outputs[0]
    return done.prompt_token_ids, first.text, len(first.token_ids), first.finish_reason

if __name__ == "__main__":
    main()
"""

# Without the guard that a script needs where its processes import it: with the engine it must not need one.
USER_SCRIPT = """
import json, sys
from pathlib import Path
import psutil
from pipeline.engines.base import Cancellation
from storage.errors import EngineDead
from tests.engines.vllm import support

print("the script runs", flush=True)
spec = support.make_spec(sampling={"max_tokens": 100, "ignore_eos": True})
engine = support.make_engine(support.model_at(Path(sys.argv[1])), spec)
engine.load()
sys.stdin.readline()
found = engine.infer(spec, support.endless(), Cancellation())
next(found)
print(json.dumps([child.pid for child in psutil.Process().children(recursive=True)]), flush=True)
sys.stdin.readline()
engine.close()
engine.close()
try:
    for _ in found:
        pass
except EngineDead as error:
    print(error, flush=True)
sys.stdin.readline()
"""


def model_at(path: Path) -> Model:
    config = json.loads((path / "config.json").read_text())
    return Model(path.name, path, "0" * 64, tuple(config["architectures"]), config)


def make_spec(task: str = "generate", **fields: Any) -> JobSpec:
    if task == "generate":
        fields.setdefault("prompt", "{text}")
    fields.setdefault("sampling", dict(GREEDY))
    fields.setdefault("engine_options", dict(OPTIONS))
    return parse({"input": "in.parquet", "output": "out", "model": "llama", "task": task, **fields})


def make_engine(model: Model, spec: JobSpec) -> VllmEngine:
    assert model.path is not None
    return VllmEngine(model, spec.task, spec.engine_options, EngineContext(model.path.parent / "cache"))


def texts(*values: str | None, first: int = 0) -> RowBatch:
    return column(pa.array(values, pa.string()), first=first)


def column(values: pa.Array[Any], name: str = "text", first: int = 0) -> RowBatch:
    return RowBatch(np.arange(first, first + len(values)), pa.RecordBatch.from_arrays([values], [name]))


def endless() -> Iterator[RowBatch]:
    """More rows than any test waits for."""
    for first in range(0, 10**6, 16):
        yield texts(*(f"{row}" for row in range(first, first + 16)), first=first)


def start(folder: Path, code: str, *args: str) -> subprocess.Popen[str]:
    """Run a script's text as a file in ``folder``, as a user would, with pipes to it."""
    script = folder / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(script), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    )
