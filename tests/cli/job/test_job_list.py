"""``rowmill job list``, the ids that it shows, and their completion; ``job cancel`` of what has ended."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli import output, values
from storage.errors import InvalidJob
from tests.cli.conftest import Rowmill

PROMPT = ("-m", "fake", "-t", "generate", "-p", "{text}", "-q")


@pytest.fixture
def run(rowmill: Rowmill) -> Callable[..., str]:
    pq.write_table(pa.table({"text": ["a", "b"]}), rowmill.home / "in.parquet")

    def go(out: str, *more: str) -> str:
        done = rowmill.inside("run", "in.parquet", "-o", out, *PROMPT, "--json", *more)
        assert done.code == 0, done.err
        return str(done.document["job"]["id"])

    return go


def test_the_list_fits_the_terminal_and_its_ids_are_accepted(rowmill: Rowmill, run: Callable[..., str]) -> None:
    job = run("a/rather/long/path/to/the/output/of/this/job", "--tenant", "a-tenant-with-a-name-that-is-rather-long")
    for columns in (60, 80, 120):
        rowmill.environment["COLUMNS"] = str(columns)
        lines = rowmill.inside("job", "list").out.splitlines()
        assert len(lines) == 2
        assert max(map(len, lines)) <= columns
        assert lines[0].split()[:3] == ["ID", "STATE", "TENANT"]
    shown = lines[1].split()[0]
    assert shown == job[-8:]
    for name in (shown, job[:13]):
        assert rowmill.inside("job", "show", name, "--json").document["job"]["id"] == job
    wide = rowmill.inside("job", "list", "--wide").out
    assert job in wide
    assert "a-tenant-with-a-name-that-is-rather-long" in wide
    assert str(rowmill.home / "a/rather/long/path/to/the/output/of/this/job") in wide


def test_the_list_is_narrowed(rowmill: Rowmill, run: Callable[..., str]) -> None:
    ada, bob = run("out/ada", "--tenant", "ada"), run("out/bob", "--tenant", "bob")

    def ids(*options: str) -> list[str]:
        return [job["id"] for job in rowmill.inside("job", "list", "--json", *options).document["jobs"]]

    assert ids("--tenant", "ada") == [ada]
    assert ids("--output", "out/bob") == [bob]
    assert ids("--output", "out") == [bob, ada]
    assert ids("--state", "failed") == []
    assert ids("--since", "1h") == [bob, ada]
    assert ids("--before", "1h") == []
    assert ids("--before", str(datetime.date.today() + datetime.timedelta(days=2))) == [bob, ada]
    assert ids("--after", bob[-8:]) == [ada]
    for option in ("--output", "--tenant"):
        refused = rowmill.inside("job", "list", option, "")
        assert refused.code == 2
        assert f"{option[2:]}: it is empty" in refused.err
    refused = rowmill.inside("job", "list", "--since", "yesterday")
    assert refused.code == 2
    assert "--since" in refused.err


def test_a_shell_completes_the_ids_of_jobs(rowmill: Rowmill, run: Callable[..., str]) -> None:
    def offered(word: str, **environment: str) -> list[str]:
        words = f"rowmill job show {word}"
        done = rowmill(**{"_ROWMILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3", **environment})
        assert done.err == ""
        return done.out.split()

    assert offered("") == []
    job = run("out")
    assert offered("") == [job[-8:]]
    assert offered(job[-8:-4]) == [job[-8:]]
    assert offered(job[:6]) == [job]
    assert offered("zz") == []
    assert offered("", ROWMILL_DATABASE_URL="postgresql://127.0.0.1:1/none") == []


def test_cancelling_what_has_ended_says_how_it_ended(rowmill: Rowmill, run: Callable[..., str]) -> None:
    job = run("out")
    done = rowmill.inside("job", "cancel", job)
    assert done.code == 0
    assert done.out.split() == [job, "completed"]
    assert "nothing to cancel" in done.err
    assert rowmill.inside("job", "cancel", job, "--json").document["job"]["state"] == "completed"


@given(
    rows=st.lists(st.tuples(*[st.text(max_size=30)] * 4), min_size=1, max_size=5),
    cells=st.integers(min_value=20, max_value=120),
)
def test_a_fitted_table_fits_and_keeps_the_ends_of_what_it_cuts(rows: list[tuple[str, ...]], cells: int) -> None:
    columns = ("a", "b", "c", "d")
    kept, lines = output.fitted(columns, rows, cells, shrink={"d": 6, "c": 6}, leave_out=("b", "a"))
    assert kept[-2:] == ["c", "d"]
    assert max(map(output.width, output.table(kept, lines).splitlines())) <= cells
    for row, line in zip(rows, lines, strict=True):
        whole = dict(zip(columns, map(output.printable, row), strict=True))
        for name, text in zip(kept, line, strict=True):
            assert text == whole[name] or (text[0] == "…" and whole[name].endswith(text[1:]))


def test_times_are_read_as_written() -> None:
    now = 1_800_000_000.0
    assert values.moment("90m", "--since", now) == now - 5400
    assert values.moment("2026-11-30T12:00+01:00", "--since", now) == 1796036400.0
    assert values.moment("2026-11-30", "--since", now) == datetime.datetime(2026, 11, 30).timestamp()
    for wrong in ("", "soon", "-1h", "2026-13-01"):
        with pytest.raises(InvalidJob):
            values.moment(wrong, "--since", now)


def test_an_interrupted_job_is_said_to_be(rowmill: Rowmill, run: Callable[..., str]) -> None:
    """By every command that shows it; ``watch`` ends, since there is nothing to be seen, and ``wait`` runs it."""
    table = pa.table({"text": [f"text {n}" for n in range(100)]})
    pq.write_table(table, rowmill.home / "in.parquet")
    options = ("--set", "crash_after_rows=50", "--set", "crash_times=1", "--set", "counts_dir=.")
    killed = rowmill("run", "in.parquet", "-o", "out", *PROMPT, *options, "--setting", "read_batch_rows=10")
    assert killed.code == 137
    (job,) = rowmill.inside("job", "list", "--json").document["jobs"]
    assert (job["state"], job["interrupted"], job["attended"]) == ("in_progress", True, False)
    listed = rowmill.inside("job", "list")
    assert "interrupted" in listed.out.splitlines()[1]
    assert "rowmill job resume ID" in listed.err
    shown = rowmill.inside("job", "show", job["id"]).out
    assert "in_progress (interrupted)" in shown
    assert f"nobody is running it; resume with 'rowmill job resume {job['id']}'" in shown
    watched = rowmill.inside("job", "watch", job["id"])
    assert watched.code == 5
    assert f"rowmill job resume {job['id']}" in watched.err
    waited = rowmill.inside("job", "wait", job["id"])
    assert waited.code == 0
    assert "it is run here now" in waited.err
    assert "(interrupted)" not in waited.out
    assert rowmill.inside("job", "watch", job["id"]).code == 0
