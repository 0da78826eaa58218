"""``rowmill tenant``, and what a submit says when a quota is used up."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import Rowmill


def test_a_tenant_from_add_to_remove(rowmill: Rowmill) -> None:
    added = rowmill.inside("tenant", "add", "research", "--weight", "2.5", "--max-running", "4", "--json")
    assert added.code == 0
    shown = rowmill.inside("tenant", "set", "research", "--max-running", "none", "--rows-per-day", "1_000", "--json")
    tenant = shown.document["tenant"]
    assert (tenant["weight"], tenant["max_running"], tenant["rows_per_day"], tenant["jobs"]) == (2.5, None, 1000, 0)
    assert added.document["tenant"]["max_running"] == 4
    assert "0 of 1,000" in rowmill.inside("tenant", "show", "research").out
    listed = rowmill.inside("tenant", "list")
    assert "research" in listed.out and "2.5" in listed.out
    assert rowmill.inside("tenant", "remove", "research", "--json").document["removed"] == "research"
    assert rowmill.inside("tenant", "list", "--json").document["tenants"] == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("show", "nobody"), 6, "there is no tenant 'nobody'"),
        (("set", "nobody", "--weight", "2"), 6, "rowmill tenant list"),
        (("set", "nobody"), 2, "nothing to change"),
        (("add", "a b"), 2, "letters, digits"),
        (("add", "a", "--weight", "0"), 2, "between 0.001 and 1000"),
        (("add", "a", "--max-jobs", "many"), 2, "--max-jobs: a whole number or none, not 'many'"),
        (("add", "a", "--max-jobs", "-1"), 2, "a number from 0"),
    ],
)
def test_a_mistake_is_told_plainly(rowmill: Rowmill, words: tuple[str, ...], code: int, said: str) -> None:
    done = rowmill.inside("tenant", *words)
    assert (done.code, done.out) == (code, "")
    assert said in done.err


def test_a_job_beyond_a_quota_is_refused_with_its_reason(rowmill: Rowmill) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), rowmill.home / "in.parquet")
    run = ("run", "in.parquet", "-o", "out", "-m", "fake", "-t", "embed", "--column", "text", "--json")
    refused = rowmill.inside(*run, "--setting", "unknown_tenants=refuse")
    assert refused.code == 2
    assert "rowmill tenant add default" in refused.document["error"]["message"]
    rowmill.inside("tenant", "add", "default", "--rows-per-day", "5")
    assert rowmill.inside(*run).code == 0
    done = rowmill.inside(*run, "--overwrite")
    assert (done.code, done.document["error"]["type"]) == (8, "QuotaExceeded")
    assert "3 rows today of the 5 it may and the job would add 3" in done.document["error"]["message"]
    failed = rowmill.inside("job", "list", "--state", "failed", "--json").document["jobs"]
    assert ["3 rows today" in job["error"] for job in failed] == [True]
    assert not list((rowmill.home / "out" / ".rowmill").glob("**/*.parquet"))
    rowmill.inside("tenant", "set", "default", "--max-jobs", "0")
    assert "0 live jobs of the 0 it may" in rowmill.inside(*run, "--overwrite").err
