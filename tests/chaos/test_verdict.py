"""What ``make chaos`` would say of a run that went wrong: whatever is spoilt, the verdict names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from pyroaring import BitMap

from pipeline import Client
from pipeline.config.settings import Settings
from storage.sql import tables
from storage.sql.database import Database
from tests.chaos import client
from tests.chaos.schedule import draw
from tests.chaos.verdict import Verdict

Spoil = Callable[[sa.Connection, Path], object]


def _judge(home: Path, spoil: Spoil) -> Verdict:
    """Run the first job of a schedule, spoil what it left behind, and judge."""
    asked = client._asked(home, 0, draw(1, 60.0, 3, 2.5).jobs[0])
    settings = Settings(data_dir=home / "data", cache_dir=home / "cache", flush_rows=100)
    with Client(settings=settings) as user:
        options = asked.fields["engine_options"] | {"delay_ms_per_batch": 0}
        asked.id = user.run(**asked.fields | {"engine_options": options}).id
    database = Database(settings.effective_database_url)
    try:
        with database.write() as connection:
            spoil(connection, asked.output / "data" / "part-00001.parquet")
    finally:
        database.close()
    verdict = Verdict(home)
    verdict.judge(settings.effective_database_url, [asked])
    return verdict


def _rewrite(change: Callable[[pa.Table], pa.Table]) -> Spoil:
    return lambda _, file: pq.write_table(change(pq.read_table(file)), file)


def _other_answer(table: pa.Table) -> pa.Table:
    at = table.schema.names.index("text")
    return table.set_column(at, table.schema.field(at), pa.array(["another text"] * table.num_rows, pa.string()))


def _update(table: sa.Table, **values: object) -> Spoil:
    return lambda connection, _: connection.execute(table.update().values(**values))


def _one_event(kind: str) -> Spoil:
    table = tables.event
    first = sa.select(sa.func.min(table.c.id)).where(table.c.type == kind).scalar_subquery()
    return lambda connection, _: connection.execute(table.delete().where(table.c.id == first))


SPOILT: dict[str, tuple[Spoil, str]] = {
    "a row is lost": (_rewrite(lambda t: t.slice(1)), "1 are lost"),
    "a row is doubled": (_rewrite(lambda t: pa.concat_tables([t.slice(0, 1), t])), "1 doubled"),
    "rows change places": (_rewrite(lambda t: t.take(list(reversed(range(t.num_rows))))), "out of order"),
    "an answer is another": (_rewrite(_other_answer), "rows differ"),
    "a file is rewritten": (_rewrite(lambda t: t), "not the one in the manifest"),
    "the mark is gone": (lambda _, file: (file.parents[1] / "_SUCCESS").unlink(), "_SUCCESS is not there"),
    "a row was flushed twice": (_update(tables.part_file, rows=BitMap(range(90))), "rows are in its parts"),
    "a counter is off": (_update(tables.job, rows_done=tables.job.c.rows_done + 1), "rows_done is"),
    "tokens are off": (_update(tables.shard, prompt_tokens=0), "prompt_tokens is"),
    "an attempt is open": (_update(tables.attempt, state="running"), "still running"),
    "a claim left no event": (_one_event("shard.running"), "by its events"),
    "a flush left no event": (_one_event("shard.flush"), "flush events"),
    "the job's end left no event": (_one_event("job.completed"), "last event"),
    "the job goes on": (_update(tables.job, state="in_progress"), "has not ended"),
}


def test_of_a_calm_run_it_says_nothing(tmp_path: Path) -> None:
    verdict = _judge(tmp_path, lambda connection, file: None)
    assert verdict.problems == []
    assert verdict.counts["rows published"] == verdict.counts["rows asked for"] > 0


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_spoilt_is_named(tmp_path: Path, name: str) -> None:
    spoil, expected = SPOILT[name]
    problems = _judge(tmp_path, spoil).problems
    assert any(expected in problem for problem in problems), problems
