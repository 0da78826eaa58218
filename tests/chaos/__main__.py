"""``make chaos SECONDS=300 SEED=1``: workers, broker and database under random faults, and then every row counted.

Real processes all: Celery workers and a beat on PostgreSQL and Redis, with the ``fake`` engine, short leases and small
part files; beside them scripts with an embedded client. For ``--seconds`` jobs are submitted, cancelled, retried, and
fired by schedules, while workers are killed, stopped for longer than their lease and told to end, the broker is
flushed, restarted, taken away and filled with nonsense, the database is killed, its clock is set hours ahead and back,
disks are full, and the scripts end in every way that a script can. Then the faults end, every job has to come to its
end, and each published output is compared, row by row, with that of a calm run. Ends with 1 when anything is off; what
was left behind is then kept.

What happens when is drawn from ``--seed`` alone (where it meets the work is up to the machine).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.client import Users
from tests.chaos.cluster import Cluster
from tests.chaos.schedule import ENDS, FAULTS, Schedule, draw
from tests.chaos.scripts import TO_THE_END
from tests.chaos.verdict import Verdict

STEP_SECONDS = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are injected")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--job-every", type=float, default=2.5, help="seconds between two submissions, on average")
    parser.add_argument("--patience", type=float, default=180.0, help="how long all jobs may take to end afterwards")
    parser.add_argument("--keep", action="store_true", help="keep the logs and the output even when all is well")
    given = parser.parse_args()
    # Told to end, it ends in order, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    schedule = draw(given.seed, given.seconds, given.workers, given.job_every)
    # Not below a folder that PostgreSQL's own user may not enter.
    home = Path(tempfile.mkdtemp(prefix="rowmill-chaos-"))
    home.chmod(0o755)
    print(
        f"seed {given.seed}: {len(schedule.jobs)} jobs and {len(schedule.faults)} faults in {given.seconds:.0f} s, "
        f"{given.workers} workers; logs in {home}/logs",
        flush=True,
    )
    problems, counts = _run(home, schedule, given.seconds, given.workers, given.patience)
    _report(given.seed, given.seconds, problems, counts)
    if problems or given.keep:
        print(f"what is left of it: {home}")
    else:
        shutil.rmtree(home)
    return 1 if problems else 0


def _run(
    home: Path, schedule: Schedule, seconds: float, workers: int, patience: float
) -> tuple[list[str], Counter[str]]:
    with Cluster(home, workers, schedule.scripts) as cluster:
        began = time.monotonic()
        users = Users(home, cluster.settings, schedule, began)
        users.start()
        to_come = list(schedule.faults)
        while time.monotonic() < began + seconds and users.error is None:
            while to_come and time.monotonic() >= began + to_come[0].at:
                cluster.do(to_come.pop(0))
            cluster.step()
            time.sleep(STEP_SECONDS)
        cluster.calm()
        users.calm()
        calm = time.monotonic()
        while time.monotonic() < calm + patience and users.error is None:
            if users.over and all(script.over for script in cluster.scripts):
                break
            cluster.step()
            time.sleep(STEP_SECONDS)
        settled = time.monotonic() - calm
        users.stop()
        if users.error is not None:
            raise users.error
        verdict = _judge(home, cluster, users)
        waiting = [str(job.id) for job in users.asked if not job.over]
        waiting += [timetable.name for timetable in users.timetables if not timetable.over]
        waiting += [script.asked[-1].like for script in cluster.scripts if not script.over]
        if waiting:
            verdict.problems.insert(0, f"not over {patience:.0f} s after the last fault: {', '.join(waiting)}")
        counts = cluster.counts + users.counts + verdict.counts
        counts["seconds until all jobs had ended"] = round(settled)
        for name, waits in verdict.waits.items():
            if waits:
                counts[f"median {name}"] = round(statistics.median(waits))
                counts[f"longest {name}"] = round(max(waits))
        return [*verdict.problems, *cluster.problems], counts


def _judge(home: Path, cluster: Cluster, users: Users) -> Verdict:
    """The fleet's database, and then that of each script."""
    asked = users.asked + [job for timetable in users.timetables for job in timetable.asked.values()]
    verdict = Verdict(home)
    verdict.judge(str(cluster.settings.database_url), asked)
    for script in cluster.scripts:
        verdict.judge(script.settings.effective_database_url, script.asked)
        verdict.judge_script(script)
    return verdict


def _report(seed: int, seconds: float, problems: list[str], counts: Counter[str]) -> None:
    faults = (*FAULTS, "left out", "started again", "ended by itself", "hung at SIGTERM")
    asked = [name for name in counts if name.startswith(("jobs", "cancels", "retries", "calls", "fires"))]
    work = (
        "shards",
        "attempts",
        *sorted(name for name in counts if name.startswith("attempts ")),
        "fenced writes",
        "events",
    )
    rows = ("asked for", "published", "flushed", "computed by engines", "lost", "doubled", "wrong")
    print(f"seed {seed}, {seconds:.0f} s of faults, {counts['seconds until all jobs had ended']} s until all had ended")
    for title, names in (
        ("faults", faults),
        ("users", sorted(asked)),
        ("scripts", (*ENDS, TO_THE_END.how)),
        ("work", work),
    ):
        print(f"  {title:7} " + ", ".join(f"{name} {counts[name]:,}" for name in names))
    print("  rows    " + ", ".join(f"{name} {counts[f'rows {name}']:,}" for name in rows))
    waits = [f"{name} {counts[name]} s" for name in counts if name.startswith(("median", "longest"))]
    print("  waits   " + ", ".join(waits))
    for problem in problems:
        print(f"  PROBLEM {problem}")
    print("  everything adds up" if not problems else f"  {len(problems)} problems")


if __name__ == "__main__":
    sys.exit(main())
