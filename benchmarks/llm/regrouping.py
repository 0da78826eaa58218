"""Prefixes dealt out over many shards: ``order="prefix"`` against ``auto`` and ``input``, on one vLLM engine.

The cache holds 60% of the prefixes; each shard of the input meets most of them. In every round each order runs a job
over a set of prompts of its own, and the sets go round, so that every order runs every set, and what the engine cached
of a set is gone by then. Besides seconds it prints what no other load on the machine changes: the share of prompt
tokens that came from the cache, and the tokens that had to be computed. Answers are greedy; the same set has to get the
same answers, in the order of the input, whatever the order they were computed in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.llm.workloads import BLOCK_TOKENS, Workload
from examples.tiny_llama import build_llama
from pipeline import Client
from pipeline.config.settings import Settings

ORDERS = ("input", "auto", "prefix")
CONTEXT = 1024
ROWS_PER_PREFIX = 8


def run(client: Client, source: Path, target: Path, model: Path, order: str, **fields: Any) -> dict[str, Any]:
    """One job: its seconds without engine start-up, and what its attempts measured."""
    started = time.monotonic()
    status = client.run(
        input=str(source), output=str(target), model=str(model), task="generate", prompt="{text}", order=order,
        engine="vllm", **fields,
    )  # fmt: skip
    seconds = time.monotonic() - started
    handle = client.job(status.id)
    found = handle.measured()
    table = handle.table()
    assert table.column("id").to_pylist() == list(range(table.num_rows)), "the output is not in input order"
    return {
        "order": order,
        "set": source.stem,
        "seconds": seconds - found.get("load_seconds", 0.0),
        "rows": table.num_rows,
        "shards": status.shards["committed"],
        "prompt_tokens": found["prompt_tokens"],
        "cached_tokens": found.get("cached_tokens", 0),
        "outputs": table.column("output").to_pylist(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", type=int, default=20)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8, help="generated per row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="small", help="of examples/tiny_llama.py: tiny or small")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    options = parser.parse_args()
    rows = options.prefixes * ROWS_PER_PREFIX
    work = Workload(
        "regrouping", {}, rows=rows, prefix_words=370, rows_per_prefix=ROWS_PER_PREFIX
    )  # 370 words are some 550 tokens: four whole blocks, and a part of one that is never shared
    fields: dict[str, Any] = {
        "sampling": {"temperature": 0, "max_tokens": options.tokens, "ignore_eos": True},
        "engine_options": {
            "dtype": "float32",
            "max_model_len": CONTEXT,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 2**30,
            "num_gpu_blocks_override": max(24, round(0.6 * options.prefixes * (512 / BLOCK_TOKENS))),
        },
    }
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rowmill-regrouping-") as name:
        folder = Path(name)
        model = build_llama(folder / "model", options.size, CONTEXT)
        sources = []
        for number in range(len(ORDERS)):
            texts = work.texts(number)
            sources.append(folder / f"set{number}.parquet")
            pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), sources[-1])
        pq.write_table(pq.read_table(sources[0]).slice(0, 4), folder / "warm.parquet")
        with Client(settings=Settings(data_dir=folder / "data", cache_dir=folder / "cache")) as client:
            run(client, folder / "warm.parquet", folder / "warm", model, "input", **fields)
            for round_ in range(options.rounds):
                for at, order in enumerate(ORDERS):
                    source = sources[(at + round_) % len(sources)]
                    target = folder / f"out-{round_}-{order}"
                    one = run(client, source, target, model, order, shard_rows=rows // options.shards, **fields)
                    found.append(one | {"round": round_})
                    print(
                        f"  {round_} {order:<6} {source.stem}: {one['seconds']:.1f} s, {one['shards']} shards, cached "
                        f"{one['cached_tokens'] / one['prompt_tokens']:.1%}",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
    report(found)
    if options.json:
        options.json.write_text(json.dumps([{k: v for k, v in one.items() if k != "outputs"} for one in found]))
    return 0


def report(found: list[dict[str, Any]]) -> None:
    seconds = {(one["round"], one["order"]): one["seconds"] for one in found}
    answers: dict[str, list[str]] = {}
    differ = dict.fromkeys(ORDERS, 0)
    for one in found:
        first = answers.setdefault(one["set"], one["outputs"])
        differ[one["order"]] += sum(a != b for a, b in zip(first, one["outputs"], strict=True))
    print(
        f"{'order':<7} {'rows/s':>7} {'cached':>7} {'computed tokens':>16} {'times as fast as input':>24} {'differ':>7}"
    )
    for order in ORDERS:
        mine = [one for one in found if one["order"] == order]
        ratios = [seconds[one["round"], "input"] / one["seconds"] for one in mine]
        prompt = statistics.median(one["prompt_tokens"] for one in mine)
        cached = statistics.median(one["cached_tokens"] for one in mine)
        rate = statistics.median(one["rows"] / one["seconds"] for one in mine)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{order:<7} {rate:>7.2f} {cached / prompt:>7.1%} {prompt - cached:>16,.0f} {spread:>24} {differ[order]:>7}"
        )


if __name__ == "__main__":
    sys.exit(main())
