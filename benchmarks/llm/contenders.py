"""The contenders of ``benchmarks/llm``: one process each, its engine warm, told by a line of JSON what to run.

``python -m benchmarks.llm.contenders KIND MODEL OPTIONS FOLDER``; each line in is ``{"input": …, "output": …,
"sampling": …}``, each line out ``{"seconds": …}``: from opening the Parquet file to the written one, engine start-up
left out (it came before the first line). All of them write the columns of the input, the answer and its tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Run = Callable[[Path, Path, dict[str, Any]], dict[str, Any]]
"""Input, output, sampling parameters → what is worth saying about the run besides its seconds."""

CHUNK = 256


def _llm(model: str, options: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(model, disable_log_stats=True, **options)


def _generate(llm: Any, source: Path, target: Path, sampling: dict[str, Any], chunk: int | None) -> dict[str, Any]:
    from vllm import SamplingParams

    params = SamplingParams(**sampling)
    table = pq.read_table(source)
    texts = table.column("text").to_pylist()
    answers: list[Any] = []
    for at in range(0, len(texts), chunk or len(texts)):
        answers += llm.generate(texts[at : at + (chunk or len(texts))], params, use_tqdm=False)
    _write(table, target, [(answer.outputs[0].text, len(answer.outputs[0].token_ids)) for answer in answers])
    return {
        "prompt_tokens": sum(len(answer.prompt_token_ids) for answer in answers),
        "cached_tokens": sum(answer.num_cached_tokens or 0 for answer in answers),
    }


def _write(table: pa.Table, target: Path, answers: Sequence[tuple[str, int]]) -> None:
    table = table.append_column("output", pa.array([text for text, _ in answers], pa.string()))
    table = table.append_column("completion_tokens", pa.array([made for _, made in answers], pa.int32()))
    pq.write_table(table, target, compression="zstd")


def floor(model: str, options: dict[str, Any], folder: Path) -> Run:
    """``LLM.generate`` of all rows at once: nothing that keeps the rows safe, and nothing faster known."""
    llm = _llm(model, options)

    def run(source: Path, target: Path, sampling: dict[str, Any]) -> dict[str, Any]:
        return _generate(llm, source, target, sampling, None)

    return run


def chunks(model: str, options: dict[str, Any], folder: Path) -> Run:
    """``LLM.generate`` of 256 rows after the other: what a script does that must bound its memory, or its losses."""
    llm = _llm(model, options)

    def run(source: Path, target: Path, sampling: dict[str, Any]) -> dict[str, Any]:
        return _generate(llm, source, target, sampling, CHUNK)

    return run


def rowmill(model: str, options: dict[str, Any], folder: Path, task: str = "generate") -> Run:
    """A job submitted to the embedded client, up to ``_SUCCESS``: planning, claims, flushes and commits included."""
    from pipeline import Client
    from pipeline.config.settings import Settings
    from pipeline.process.metrics import summed

    client = Client(settings=Settings(data_dir=folder / "data", cache_dir=folder / "cache"))

    def run(source: Path, target: Path, sampling: dict[str, Any]) -> dict[str, Any]:
        job = client.submit(
            input=str(source),
            output=str(target),
            model=model,
            task=task,
            prompt="{text}",
            engine="vllm",
            engine_options=options,
            sampling=sampling,
            overwrite=True,
        )
        job.wait()
        measured = summed(attempt.stats["measured"] for attempt in job.attempts())
        return {"measured": measured, **{name: measured.get(name, 0) for name in ("prompt_tokens", "cached_tokens")}}

    return run


def rowmill_chat(model: str, options: dict[str, Any], folder: Path) -> Run:
    """The same job as a chat: what ``run_batch`` does."""
    return rowmill(model, options, folder, "chat")


def run_batch(model: str, options: dict[str, Any], folder: Path) -> Run:
    """``vllm run-batch``: its own functions in its own order, its engine kept between runs; Parquet to JSONL and back
    is part of it. It knows chats only."""
    from vllm.entrypoints.launchers import run_batch as launcher
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.usage.usage_lib import UsageContext

    flags = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False else [flag, str(value)]
    lines, answers = folder / "in.jsonl", folder / "out.jsonl"
    sys.argv = ["run-batch", "-i", str(lines), "-o", str(answers), "--model", model, "--disable-log-stats", *flags]
    args = launcher.parse_args()
    launcher.validate_run_batch_args(args)
    loop = asyncio.new_event_loop()
    engine = build_async_engine_client(args, usage_context=UsageContext.OPENAI_BATCH_RUNNER)
    client = loop.run_until_complete(engine.__aenter__())

    def run(source: Path, target: Path, sampling: dict[str, Any]) -> dict[str, Any]:
        table = pq.read_table(source)
        with lines.open("w") as file:
            for row, text in enumerate(table.column("text").to_pylist()):
                body = {"model": model, "messages": [{"role": "user", "content": text}], **sampling}
                request = {"custom_id": str(row), "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(request) + "\n")
        loop.run_until_complete(launcher.run_batch(client, args))
        found: dict[int, tuple[str, int]] = {}
        with answers.open() as file:
            for line in file:
                answer = json.loads(line)
                body = answer["response"]["body"]
                found[int(answer["custom_id"])] = (
                    body["choices"][0]["message"]["content"],
                    body["usage"]["completion_tokens"],
                )
        _write(table, target, [found[row] for row in range(table.num_rows)])
        return {}

    return run


CONTENDERS = {one.__name__: one for one in (floor, chunks, rowmill, rowmill_chat, run_batch)}


def main() -> None:
    kind, model, options, folder = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
    # The protocol has the output to itself; whatever else is printed goes where it can be read.
    lines, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    run = CONTENDERS[kind](model, options, folder)
    print("ready", file=lines, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.monotonic()
        more = run(Path(asked["input"]), Path(asked["output"]), asked["sampling"])
        seconds = time.monotonic() - began
        print(json.dumps({"seconds": seconds, **more}), file=lines, flush=True)
    # Engines end with their processes, and some of them slowly; nothing is left to be saved.
    lines.flush()


if __name__ == "__main__":
    main()
