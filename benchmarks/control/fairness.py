"""Ten shards of one tenant behind a thousand of another: how long do they take?

Four claimers take shards from PostgreSQL and "run" each for the same time (a sleep: no engine). The small job is run
alone, then with the thousand queued before it by another tenant, and then with the thousand queued by its own tenant,
which is first come, first served: what a fleet without fairness would do. With fairness the small job has half of the
fleet, so it may take twice as long as alone, and a shard in flight per claimer more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time

from benchmarks.control.fleet import claim_one, commit, fill, fresh, homes, server
from storage.queue import jobs
from storage.sql.database import Database

CLAIMERS, SHARD_SECONDS = 4, 0.1
SMALL = 10


def run(url: str, tenants: tuple[str, ...]) -> float:
    """Seconds from the start until the small job (the last of ``tenants``) has ended; those before it have 1,000."""
    for number, tenant in enumerate(tenants[:-1]):
        fill(url, 1000, tenants=[tenant], keys=1, first=number)
    fill(url, SMALL, tenants=[tenants[-1]], keys=1, first=99)
    opened = Database(url)
    small = f"0099-{tenants[-1]}-0"
    over = threading.Event()

    def work(owner: str) -> None:
        while not over.is_set():
            claim = claim_one(opened, owner)
            if claim is None:
                return
            time.sleep(SHARD_SECONDS)
            commit(opened, claim)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(CLAIMERS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    while jobs.get(opened, small).n_open:
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    over.set()
    for thread in threads:
        thread.join()
    opened.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    kinds = {"alone": ("small",), "fair": ("big", "small"), "fifo": ("small", "small")}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    with homes() as home, server(home) as url:
        for number in range(rounds):
            for kind, tenants in kinds.items():
                if kind == "fifo" and number:
                    continue  # it takes the time of a thousand shards, whatever the round
                seconds = run(fresh(url, f"{kind}_{number}"), tenants)
                found[kind].append(seconds)
                print(f"  {kind:5} {seconds:6.2f} s", flush=True)
    ratio = statistics.median(fair / alone for fair, alone in zip(found["fair"], found["alone"], strict=True))
    worst = 2.0 + CLAIMERS * SHARD_SECONDS / min(found["alone"])
    print(f"beside 1,000 shards of another tenant: {ratio:.2f} times as long as alone (at most {worst:.2f} allowed)")
    print(f"first come, first served:              {found['fifo'][0] / found['alone'][0]:.0f} times as long")
    sys.exit(0 if ratio <= worst else 1)


if __name__ == "__main__":
    main()
