"""``rowmill job submit`` and ``estimate``, without a broker; with one, see tests/integration/test_fleet.py."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from tests.cli.conftest import Rowmill

FIELDS = ("in.parquet", "-o", "out", "-m", "fake", "-t", "generate", "-p", "{text}", "--shard-rows", "60")


def test_a_job_is_estimated_and_submitted_with_the_options_of_run(rowmill: Rowmill) -> None:
    table = pa.table({"text": [f"t{n}" for n in range(100)]})
    pq.write_table(table, rowmill.home / "in.parquet")
    found = rowmill.inside("job", "estimate", *FIELDS, "--json").document["estimate"]
    assert (found["files"], found["rows"], found["shards"], found["engine"]) == (1, 100, 2, "fake")
    assert found["columns"] == ["text"]
    assert not (rowmill.home / "out").exists() or not list((rowmill.home / "out").rglob("*.*"))
    assert rowmill.inside("job", "list", "--json").document["jobs"] == []

    submitted = rowmill.inside("job", "submit", *FIELDS, "--tenant", "atlas", "--priority", "3")
    assert submitted.code == 0
    assert "rowmill job wait" in submitted.err
    [job] = rowmill.inside("job", "list", "--json").document["jobs"]
    assert (submitted.out.strip(), job["tenant"], job["state"]) == (job["id"], "atlas", "queued")
    assert rowmill("job", "wait", job["id"]).code == 0
    assert pq.read_table(rowmill.home / "out" / "data")["text"].to_pylist() == table["text"].to_pylist()
    assert rowmill.inside("job", "submit", "-o", "out").code == 2
