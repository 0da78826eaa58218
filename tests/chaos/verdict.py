"""Afterwards: is every row there once, in order and right, was nothing flushed twice, do all counters add up?"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from pyroaring import BitMap

from pipeline import Client
from pipeline.config.settings import Settings
from storage import states
from storage.records import OUTPUT_SEQ
from storage.sql import tables
from storage.sql.database import Database
from storage.states import AttemptState, FireState, JobState, ShardState
from tests.chaos.client import Asked
from tests.chaos.scripts import NO_SPACE, Script

_TABLES = (
    tables.job,
    tables.shard,
    tables.attempt,
    tables.part_file,
    tables.event,
    tables.schedule,
    tables.schedule_fire,
)
_WAITS = {"validating": "until planned", "queued": "until claimed", "finalizing": "until published"}
TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")


class Verdict:
    """``problems`` is empty when all is well. ``counts`` and ``waits`` (seconds) are the numbers of the summary."""

    def __init__(self, home: Path) -> None:
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.waits: dict[str, list[float]] = {name: [] for name in _WAITS.values()}
        self._home = home
        self._stored: dict[str, list[sa.Row[Any]]] = {}
        self._counted: set[Path] = set()

    def judge(self, url: str, asked: list[Asked]) -> None:
        """Every job that was asked for, and every row of the database."""
        database = Database(url)
        try:
            with database.read() as connection:
                for table in _TABLES:
                    rows = connection.execute(sa.select(table).order_by(*table.primary_key))
                    self._stored[table.name] = list(rows)
        finally:
            database.close()
        known = {job.id: job for job in asked if job.id is not None}
        strange = {row.id for row in self._stored["job"]} - set(known)
        if strange:
            self.problems.append(f"jobs that nobody submitted: {sorted(strange)}")
        calm = Settings(data_dir=self._home / "calm", cache_dir=self._home / "cache")
        with Client(settings=calm) as client:
            for row in self._stored["job"]:
                if row.id in known:
                    for problem in self._job(client, row, known[row.id]):
                        self.problems.append(f"job {row.id} ({row.state}): {problem}")
        self.problems.extend(self._fires())
        states_ = Counter(f"attempts {row.state}" for row in self._stored["attempt"])
        self.counts.update(dict(sorted(states_.items())))
        self.counts["attempts"] += len(self._stored["attempt"])
        self.counts["fenced writes"] += sum(row.type == "attempt.superseded" for row in self._stored["event"])
        self.counts["events"] += len(self._stored["event"])

    def _job(self, client: Client, job: sa.Row[Any], asked: Asked) -> Iterator[str]:
        self.counts[f"jobs {job.state}"] += 1
        if job.state not in states.TERMINAL_JOB:
            yield "it has not ended"
            return
        shards = [row for row in self._stored["shard"] if row.job_id == job.id]
        parts: dict[str, list[sa.Row[Any]]] = {row.id: [] for row in shards}
        for row in self._stored["part_file"]:
            if row.shard_id in parts:
                parts[row.shard_id].append(row)
        self.counts["shards"] += len(shards)
        if job.state == JobState.FAILED:
            yield f"it failed: {job.error}"
        for shard in shards:
            yield from (f"shard {shard.id}: {problem}" for problem in self._shard(shard, parts[shard.id]))
        yield from self._counters(job, shards)
        yield from self._events(job, shards, parts)
        yield from self._output(client, job, shards, asked)

    def _shard(self, shard: sa.Row[Any], parts: list[sa.Row[Any]]) -> Iterator[str]:
        attempts = [row for row in self._stored["attempt"] if row.shard_id == shard.id]
        if [row.attempt_no for row in attempts] != list(range(1, shard.attempt_no + 1)):
            yield f"attempt_no is {shard.attempt_no}, and its attempts are {[row.attempt_no for row in attempts]}"
        if shard.state not in (ShardState.COMMITTED, ShardState.CANCELLED, ShardState.FAILED):
            yield f"it is still {shard.state}"
        if any(row.state == "running" for row in attempts):
            yield "an attempt is still running"
        flushed = [row.rows for row in parts if row.seq != OUTPUT_SEQ]
        done = shard.done
        self.counts["rows flushed"] += sum(map(len, flushed))
        if sum(map(len, flushed)) != len(done) or BitMap.union(BitMap(), *flushed) != done:
            yield f"{sum(map(len, flushed))} rows are in its parts, {len(done)} are done"
        if sum(row.rows_computed for row in attempts) != len(done):
            yield f"its attempts flushed {sum(row.rows_computed for row in attempts)} rows, {len(done)} are done"
        outputs = [row.attempt_no for row in parts if row.seq == OUTPUT_SEQ]
        won = [row.attempt_no for row in attempts if row.state == "succeeded"]
        if shard.state == ShardState.COMMITTED:
            wanted = BitMap(range(shard.row_n)) if shard.select is None else shard.select
            if done != wanted:
                yield f"it is committed with {len(done)} of {len(wanted)} rows"
            if not outputs == won == [shard.committed_attempt]:
                yield f"committed {shard.committed_attempt}, outputs {outputs}, succeeded {won}"
        elif outputs or won:
            yield f"it is {shard.state}, and has outputs {outputs}, succeeded attempts {won}"

    def _counters(self, job: sa.Row[Any], shards: list[sa.Row[Any]]) -> Iterator[str]:
        committed = [row for row in shards if row.state == ShardState.COMMITTED]
        newest = {row.idx: row for row in sorted(shards, key=lambda row: row.gen)}
        whole = {row.idx: row.row_n for row in committed}
        taken_back = sum(
            row.row_n if row.select is None else len(row.select)
            for row in newest.values()
            if row.idx in whole and row.state != ShardState.COMMITTED
        )
        expected = {
            "n_open": 0,
            "n_failed_shards": sum(row.state == ShardState.FAILED for row in shards),
            "n_shards": len(newest),
            "rows_total": sum(row.row_n for row in newest.values()),
            "rows_done": sum(whole.values()) - taken_back,
            "rows_failed": sum(row.n_failed for row in newest.values() if row.state == ShardState.COMMITTED),
        } | {name: sum(getattr(row, name) for row in committed) for name in TOKENS}
        for name, value in expected.items():
            if getattr(job, name) != value:
                yield f"{name} is {getattr(job, name)}, and by its shards {value}"

    def _events(
        self, job: sa.Row[Any], shards: list[sa.Row[Any]], parts: Mapping[str, list[sa.Row[Any]]]
    ) -> Iterator[str]:
        events = [row for row in self._stored["event"] if row.job_id == job.id]
        last, at = None, job.created_at
        for event in events:
            entity, _, state = event.type.partition(".")
            if entity == "job":
                if last in _WAITS:
                    # The clock is set by whole hours, and nobody waits for half of one.
                    self.waits[_WAITS[last]].append(abs(math.remainder(event.at - at, 3600.0)))
                at = event.at
                if last is not None and state not in states.JOB[JobState(last)]:
                    yield f"its events go from {last} to {state}"
                last = state
        if last != job.state:
            yield f"it is {job.state}, and its last event says {last}"
        for shard in shards:
            mine = [event for event in events if event.shard_id == shard.id]
            number, at = 0, ShardState.READY
            for event in mine:
                entity, _, state = event.type.partition(".")
                if entity != "shard" or state not in states.SHARD:
                    continue
                if state not in states.SHARD[at]:
                    yield f"shard {shard.id}: its events go from {at} to {state}"
                at = ShardState(state)
                if state == ShardState.RUNNING:
                    number += 1
                    if event.attempt_no != number:
                        yield f"shard {shard.id}: claim number {number} made attempt {event.attempt_no}"
            if at != shard.state or number != shard.attempt_no:
                yield f"shard {shard.id}: {shard.state} at attempt {shard.attempt_no}, by its events {at} at {number}"
            flushes = sorted((event.attempt_no, event.data["seq"]) for event in mine if event.type == "shard.flush")
            if flushes != sorted((row.attempt_no, row.seq) for row in parts[shard.id] if row.seq != OUTPUT_SEQ):
                yield f"shard {shard.id}: its flush events are not its part files"
            late = {event.attempt_no for event in mine if event.type == "attempt.superseded"}
            attempts = [row for row in self._stored["attempt"] if row.shard_id == shard.id]
            if late != {row.attempt_no for row in attempts if row.state == "superseded"}:
                yield f"shard {shard.id}: its superseded attempts are not those of its events"

    def _output(self, client: Client, job: sa.Row[Any], shards: list[sa.Row[Any]], asked: Asked) -> Iterator[str]:
        files = sorted((asked.output / "data").glob("*"))
        found = [pq.read_table(file, page_checksum_verification=True) for file in files]
        # What must be there: all rows of a whole output; of a partial one those that some attempt has flushed.
        rows: set[int] = set()
        for shard in shards:
            done = range(shard.row_n) if shard.state == ShardState.COMMITTED else shard.done
            rows |= {shard.row_start + row for row in done}
        expected = self._expected(client, asked)
        self.counts["rows asked for"] += expected.num_rows
        computed = Path(asked.fields["engine_options"]["rows_file"])
        if computed not in self._counted:
            self.counts["rows computed by engines"] += computed.stat().st_size if computed.exists() else 0
            self._counted.add(computed)
        complete = job.state == JobState.COMPLETED
        if complete and len(rows) != expected.num_rows:
            yield f"it is completed with {len(rows)} of {expected.num_rows} rows"
        if (asked.output / "_SUCCESS").exists() != complete:
            yield "_SUCCESS is not there" if complete else "_SUCCESS is there"
        if not rows:
            if files:
                yield "nothing was flushed, and something is published"
            return
        if not files:
            yield f"{len(rows)} rows were flushed, and nothing is published"
            return
        table = pa.concat_tables(found)
        self.counts["rows published"] += table.num_rows
        ids = table.column("id").to_pylist()
        if ids != sorted(rows):
            counted = Counter(ids)
            lost, doubled = sorted(rows - set(counted)), sorted(row for row, n in counted.items() if n > 1)
            self.counts["rows lost"] += len(lost)
            self.counts["rows doubled"] += len(doubled)
            yield (
                f"of {len(rows)} rows {len(lost)} are lost ({lost[:5]} …), {len(doubled)} doubled ({doubled[:5]} …), "
                f"{len(set(ids) - rows)} too many, {'in' if ids == sorted(ids) else 'out of'} order"
            )
            return
        if not table.equals(expected.take(pa.array(ids))):
            different = [
                row
                for row, a, b in zip(ids, table.to_pylist(), expected.take(pa.array(ids)).to_pylist(), strict=True)
                if a != b
            ]
            self.counts["rows wrong"] += len(different)
            yield f"{len(different)} rows differ from those of a calm run, row {different[:1]} first"
        yield from self._manifest(job, asked, files, table)

    def _manifest(self, job: sa.Row[Any], asked: Asked, files: list[Path], table: pa.Table) -> Iterator[str]:
        if not (asked.output / "_manifest.json").exists():
            yield "it has rows and no manifest"
            return
        manifest = json.loads((asked.output / "_manifest.json").read_text())
        listed = {asked.output / part["path"]: part["sha256"] for part in manifest["parts"]}
        if set(listed) != set(files):
            yield "the manifest lists other files than there are"
        elif any(hashlib.sha256(path.read_bytes()).hexdigest() != digest for path, digest in listed.items()):
            yield "a file is not the one in the manifest"
        failed = table.num_rows - table.column("error").null_count
        totals = {"total": job.rows_total, "published": table.num_rows, "failed": failed}
        if {name: manifest["rows"][name] for name in totals} != totals or manifest["job"]["state"] != job.state:
            yield f"the manifest says {manifest['rows']} and {manifest['job']['state']}, counted {totals}"
        self.counts["failed rows published"] += failed

    def _expected(self, client: Client, asked: Asked) -> pa.Table:
        """The output of the same job, run in this process with nothing in its way."""
        output = self._home / "calm-out" / asked.like
        if not output.exists():
            options = asked.fields["engine_options"] | {"delay_ms_per_batch": 0, "shuffle": False}
            del options["rows_file"]
            client.run(**asked.fields | {"engine_options": options, "output": str(output)})
        return pq.read_table(output / "data")

    def _fires(self) -> Iterator[str]:
        """Each time of a schedule came to its end once, with one job at most."""
        fires = self._stored["schedule_fire"]
        self.counts.update(f"fires {fire.state}" for fire in fires)
        names = {row.id: row.name for row in self._stored["schedule"]}
        jobs = Counter(fire.job_id for fire in fires if fire.job_id is not None)
        for fire in fires:
            name = f"fire of {names[fire.schedule_id]} at {fire.fire_at:.0f}"
            if fire.state not in (FireState.SUBMITTED, FireState.SKIPPED):
                yield f"{name}: it is {fire.state} ({fire.reason})"
            if (fire.job_id is not None) != (fire.state == FireState.SUBMITTED) or jobs[fire.job_id] > 1:
                yield f"{name}: it is {fire.state}, with job {fire.job_id}, which {jobs[fire.job_id]} fires have"

    def judge_script(self, script: Script) -> None:
        """Of the database judged last, which is its own: only SIGKILL loses an attempt, only a full disk fails one."""
        attempts = self._stored["attempt"]
        lost = sum(row.state == AttemptState.LOST for row in attempts)
        if lost > script.kills:
            self.problems.append(f"{script.name}: {lost} attempts are lost after {script.kills} kills")
        for row in attempts:
            if row.state == AttemptState.FAILED and NO_SPACE not in (row.error or ""):
                self.problems.append(f"{script.name}: attempt {row.attempt_no} of {row.shard_id} failed: {row.error}")
        for name, count in script.counts.items():
            self.counts[name] += count
        self.problems.extend(script.problems)
