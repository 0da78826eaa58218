"""A transformer's graph with attention, normalizations and activations as single operators.

Done by ONNX Runtime's own optimizer (https://onnxruntime.ai/docs/performance/transformers-optimization.html), in a
process of its own: it takes several times the model's memory and puts its modules among everybody's. Whether such a
graph is faster is another question: on two cores with AVX-512, 0.86 to 0.91 times the original's speed for
all-MiniLM-L6-v2 and a BERT of 110M parameters, in five combinations of fusions (docs/adr/0023).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.models import cache_entry, saturation
from pipeline.models.compare import Comparison, Drift, Limits

Array = npt.NDArray[Any]

LAYOUT = 2
"""Raised when what is made changes, so that older cache entries are not used any more."""
LIMITS = Limits(min_cosine=0.9999, max_difference=1e-3)
"""How far a fused graph may be from the original, per token or text; measured: 5e-6."""
MOST_BYTES = 2**30
"""Largest graph that is fused, its weights included: the optimizer holds it several times over."""
SECONDS = 300.0
REPORT = "fused.json"
GRAPH = "model.onnx"


def fused(
    graph: Path,
    identity: str,
    version: str,
    config: Mapping[str, Any],
    cache_dir: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Path | None, str]:
    """The fused graph, from the cache or made now; or ``None``, and why there is none.

    ``identity`` names the graph's content, ``version`` ONNX Runtime's; ``config`` is that of the checkpoint.
    ``stopped`` is asked several times a second whether to give up; that, and running out of time, is not remembered.
    A graph in which nothing is fused, or whose results leave ``LIMITS``, is not kept; that is remembered, too.
    """
    key = hashlib.sha256(json.dumps([identity, version, LAYOUT]).encode()).hexdigest()[:32]
    final = cache_dir / "onnx-fused" / key
    said = {
        "heads": int(config.get("num_attention_heads") or config.get("n_heads") or 0),
        "width": int(config.get("hidden_size") or config.get("dim") or 0),
        "vocabulary": int(config.get("vocab_size") or 100),
        "longest": int(config.get("max_position_embeddings") or 64) - 2,
    }

    def make(work: Path) -> None:
        command = [sys.executable, "-m", "pipeline.models.fuse", str(graph), str(work), json.dumps(said)]
        environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
        with tempfile.TemporaryFile("w+") as said_by_it:
            with subprocess.Popen(command, env=environment, stdout=said_by_it, stderr=said_by_it) as child:  # noqa: S603
                try:
                    _wait(child, stopped)
                finally:
                    child.kill()
            said_by_it.seek(0)
            lines = said_by_it.read().strip().splitlines()
        if child.returncode:
            last = (lines or [f"it ended with code {child.returncode}"])[-1]
            (work / GRAPH).unlink(missing_ok=True)
            (work / REPORT).write_text(json.dumps({"refused": f"the optimizer failed: {last}"}), encoding="utf-8")

    try:
        cache_entry.made_once(final, REPORT, make)
        report = json.loads((final / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, f"it could not be made: {error}"
    return (None, str(report["refused"])) if "refused" in report else (final / GRAPH, "")


def _wait(child: subprocess.Popen[bytes], stopped: Callable[[], bool]) -> None:
    """Raises ``TimeoutError``."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stopped() or time.monotonic() > deadline:
                raise TimeoutError("it was stopped, or took too long") from None
        else:
            return


def _main(graph: Path, work: Path, said: Mapping[str, int]) -> None:
    from onnxruntime.transformers import optimizer

    made = optimizer.optimize_model(
        str(graph), model_type="bert", num_heads=said["heads"], hidden_size=said["width"], opt_level=0
    )
    counts = {name: count for name, count in made.get_fused_operator_statistics().items() if count}
    report: dict[str, Any] = {"fused": counts}
    if not counts:
        report["refused"] = "the optimizer finds nothing to fuse in it"
    else:
        made.save_model_to_file(str(work / GRAPH))
        drift = compared(graph, work / GRAPH, said)
        report["drift"] = drift.to_json()
        if broken := LIMITS.broken(drift):
            report["refused"] = "its results differ: " + "; ".join(broken)
            (work / GRAPH).unlink()
    (work / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")


def compared(graph: Path, other: Path, said: Mapping[str, int]) -> Drift:
    """How far two graphs are apart, over token ids drawn at random, in several shapes, with and without padding.

    ``said``: ``vocabulary``, ``longest``. Raises ``ValueError`` when their inputs or outputs are not the same.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    for name, said_of_it in saturation.session_config(onnxruntime).items():
        settings.add_session_config_entry(name, said_of_it)
    sessions = [
        onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"]) for path in (graph, other)
    ]
    found = [[(v.name, v.type) for v in [*session.get_inputs(), *session.get_outputs()]] for session in sessions]
    if found[0] != found[1]:
        raise ValueError(f"its inputs and outputs are {found[1]}, and were {found[0]}")
    comparison = Comparison()
    for feed in _samples(sessions[0], said):
        table, its = (_table(session.run(None, feed), feed) for session in sessions)
        comparison.add(table, its, [name for name in table.column_names if name != "error"])
    return comparison.result()


def _samples(session: Any, said: Mapping[str, int]) -> Iterator[dict[str, Array]]:
    random = np.random.default_rng(0)
    for rows, length in ((1, 1), (1, 5), (3, 17), (2, 120)):
        length = max(1, min(length, said["longest"]))
        first = next(value.shape for value in session.get_inputs() if value.name == "input_ids")
        rows, length = (fix if isinstance(fix, int) else size for fix, size in zip(first, (rows, length), strict=True))
        mask = np.ones((rows, length), np.int64)
        mask[1:, max(1, length // 2) :] = 0
        made = {
            "input_ids": random.integers(0, said["vocabulary"], (rows, length)),
            "attention_mask": mask,
            "token_type_ids": np.tile(np.arange(length) >= length // 2, (rows, 1)),
            "position_ids": np.tile(np.arange(length), (rows, 1)),
        }
        kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
        yield {value.name: made[value.name].astype(kinds[value.type]) for value in session.get_inputs()}


def _table(outputs: Sequence[Array], feed: Mapping[str, Array]) -> pa.Table:
    """A row for each token, or each text; what a model gives for padding means nothing."""
    mask = feed.get("attention_mask", np.ones_like(feed["input_ids"])).astype(bool)
    columns: dict[str, Any] = {}
    for at, output in enumerate(outputs):
        tokens = output.ndim == 3 and output.shape[:2] == mask.shape
        rows = (output[mask] if tokens else output.reshape(len(mask), -1)).astype(np.float32)
        # Texts of outputs of both kinds are no longer than their tokens: the last ones are repeated.
        rows = rows[np.minimum(np.arange(int(mask.sum())), len(rows) - 1)]
        columns[f"output {at}"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    return pa.table(columns | {"error": pa.nulls(int(mask.sum()), pa.string())})


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
