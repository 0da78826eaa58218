"""Progress in a Jupyter notebook: one is executed by a real kernel, without ipywidgets, and its output looked at."""

from __future__ import annotations

import os
from pathlib import Path

import nbclient
import nbformat
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CELL = """
from pipeline import Client
client = Client()
job = client.submit(input="in.parquet", output="out", model="fake", task="generate", prompt="{text}",
                    engine_options={"delay_ms_per_batch": 50})
job.wait(progress=True)
client.close()
"""


def test_a_notebook_shows_one_line_that_ends_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": [None if n == 3 else f"t{n}" for n in range(5000)]}), tmp_path / "in.parquet")
    for name, value in {
        "PYTHONPATH": str(REPOSITORY),
        "ROWMILL_DATA_DIR": str(tmp_path / "data"),
        "ROWMILL_CACHE_DIR": str(tmp_path / "cache"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert "ROWMILL_DATABASE_URL" not in os.environ
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    client = nbclient.NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    [shown] = notebook.cells[0].outputs
    assert shown.output_type == "display_data"
    text = shown.data["text/plain"]
    assert text.startswith("completed: 5,000 of 5,000 rows (100%)")
    assert text.endswith("1 failed")
    assert "\n" not in text
    assert "\x1b" not in text
    assert list(shown.data) == ["text/plain"]
    assert (tmp_path / "out" / "_SUCCESS").exists()
