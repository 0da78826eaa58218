"""A job worked on in this process, to its end: progress, interruption, and the last words."""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypedDict

from pipeline.cli import errors, output, streams
from pipeline.cli.command import Invocation, say
from pipeline.cli.interrupts import InterruptWatch, end_now
from pipeline.cli.without_pandas import hide_pandas
from pipeline.client.progress import progress
from pipeline.spec.status import JobStatus
from storage.errors import Interrupted
from storage.redaction import redact_text

if TYPE_CHECKING:
    from pipeline.client.client import Client
    from pipeline.engines.base import Cancellation

_COUNTED_ERRORS = 10_000
"""Failed rows whose codes the last words count."""


class Hooks(TypedDict):
    """What the client is handed to report to, and to be stopped by."""

    on_progress: Callable[[JobStatus], None]
    on_notice: Callable[[str], None]
    interrupt: Cancellation


def foreground(invocation: Invocation, work: Callable[[Client, Hooks], JobStatus]) -> int:
    """Do ``work`` under a progress bar, print its summary, and return the exit code of the state it ended in.

    The first Ctrl-C lets the work flush and raises :class:`Interrupted` with how to resume; the second ends the
    process.
    """
    from pipeline.engines.base import Cancellation

    hide_pandas()
    interrupt = Cancellation()
    seen: list[JobStatus] = []
    codes: Counter[str] = Counter()
    began = time.monotonic()
    with progress(quiet=invocation.quiet, write=say) as shown:

        def on_progress(status: JobStatus) -> None:
            seen[1:] = [status]  # the first and the latest are kept
            if len(seen) == 1:
                seen.append(status)
            shown.update(status)

        def first() -> None:
            # Cancel before telling: the message goes to a stream whose lock the main thread may hold.
            interrupt.cancel("interrupted")
            shown.notice("interrupted: flushing what is finished; press Ctrl-C again to end at once")

        farewell = f"ended at once; everything flushed before is safe. Resume with:\n  {_this_command()}"
        again = functools.partial(end_now, farewell, errors.SIGNALLED)
        try:
            with InterruptWatch(first, again), output.only_ours(), invocation.client() as client:
                hooks = Hooks(on_progress=on_progress, on_notice=shown.notice, interrupt=interrupt)
                try:
                    status = work(client, hooks)
                except Interrupted:
                    if seen:
                        seen.append(client.job(seen[-1].id).status())  # with what the interruption flushed
                    raise
                whole = projected(status, client.job(status.id).measured())
                if status.rows_failed:
                    codes.update(row.code for row in client.job(status.id).errors(limit=_COUNTED_ERRORS))
        except Interrupted as error:
            invocation.failure_details["resume"] = _this_command()
            invocation.failure_details["job"] = seen[-1].to_json() if seen else None
            raise Interrupted(_interrupted(error, seen)) from error
    measures = measured(seen[0] if seen else status, status, time.monotonic() - began)
    with streams.reader_may_leave():
        more = {} if whole is None else {"all_rows": whole}
        document = {"job": status.to_json(), "run": measures, "failed_codes": dict(codes.most_common()), **more}
        invocation.show(document, summary(status, codes, measures))
    if not invocation.as_json:
        if whole is not None:
            invocation.notice(describe_projected(whole))
        if status.message and not invocation.quiet:
            say(status.message)
    return errors.exit_code(status)


def _this_command() -> str:
    return redact_text(shlex.join(["rowmill", *sys.argv[1:]]))


def _interrupted(error: Interrupted, seen: list[JobStatus]) -> str:
    said = str(error) or "interrupted; everything finished is flushed"
    if seen and seen[-1].rows_total:
        said += f" ({seen[-1].rows_done:,} of {output.plural(seen[-1].rows_total, 'row')})"
    return f"{said}\nTo resume, run the same command:\n  {_this_command()}"


def measured(first: JobStatus, last: JobStatus, seconds: float) -> dict[str, float]:
    """What this process did between the two statuses: rows, rows that were done before it began, rates."""
    before = min(first.rows_done, last.rows_done) if first.gen == last.gen else 0
    rows = last.rows_done - before
    spent = {name: max(0, n - first.tokens.get(name, 0)) for name, n in last.tokens.items()}
    tokens = spent.get("prompt_tokens", 0) + spent.get("completion_tokens", 0)
    return {
        "seconds": round(seconds, 3),
        "rows": rows,
        "rows_from_before": before,
        "tokens": tokens,
        "rows_per_second": round(rows / seconds, 3) if seconds else 0.0,
        "tokens_per_second": round(tokens / seconds, 3) if seconds else 0.0,
    }


def projected(status: JobStatus, measured: Mapping[str, float]) -> dict[str, float] | None:
    """What all rows of the input would take, by what some of them took (``limit``, ``sample``): ``rows``, ``seconds``,
    and tokens by kind. ``None`` for a job over the whole input, and where nothing was measured."""
    rows, busy = measured.get("rows", 0), measured.get("busy_seconds", 0)
    if status.input_rows is None or status.input_rows <= status.rows_total or not rows or not busy:
        return None
    times = status.input_rows / rows
    tokens = {name: round(n * status.input_rows / status.rows_done) for name, n in status.tokens.items() if n}
    seconds = busy * times + measured.get("loading_seconds", 0)
    return {"rows": status.input_rows, "seconds": round(seconds, 1), **tokens}


def describe_projected(whole: Mapping[str, float]) -> str:
    """:func:`projected` in words."""
    tokens = [f"{output.count(whole[n])} {n.removesuffix('_tokens')}" for n in whole if n.endswith("_tokens")]
    spent = f", {' and '.join(tokens)} tokens" if tokens else ""
    return f"all {output.plural(int(whole['rows']), 'row')} would take about {output.duration(whole['seconds'])}{spent}"


def summary(status: JobStatus, codes: Mapping[str, int], measures: Mapping[str, float]) -> str:
    """The last words of a run: state, rows, failures by code, speed, tokens, and where the output is."""
    rows = output.plural(status.rows_done, "row") + (f" of {status.rows_total:,}" if status.partial else "")
    speeds = [f"{output.count(measures['rows_per_second'])} rows/s"] if measures["rows"] else []
    if measures["tokens"]:
        speeds.append(f"{output.count(measures['tokens_per_second'])} tokens/s")
    head = f"{status.state.value}  {rows} in {output.duration(measures['seconds'])}"
    head += f" ({', '.join(speeds)})" if speeds else ""
    most = sorted(codes.items(), key=lambda item: (-item[1], item[0]))[:5]
    counted = sum(codes.values())
    among = "" if counted >= status.rows_failed else f"among the first {counted:,} "
    failed = f"{output.plural(status.rows_failed, 'row')}: {among}{', '.join(f'{code} {n:,}' for code, n in most)}"
    before = int(measures["rows_from_before"])
    spent = ", ".join(f"{name.removesuffix('_tokens')} {n:,}" for name, n in status.tokens.items() if n)
    published = status.state == "completed" or (status.partial and status.rows_done)
    lines = output.pairs(
        [
            ("reason", status.error or status.stop_reason),
            ("failed", failed.removesuffix(": ") if status.rows_failed else None),
            ("details", f"rowmill job errors {status.id}" if status.rows_failed else None),
            ("resumed", f"{output.plural(before, 'row')} were done before" if before else None),
            ("tokens", spent),
            ("output", f"{status.output.rstrip('/')}/data/" if published else None),
            ("job", status.id),
        ]
    )
    return "\n".join([head, *(f"  {line}" for line in lines.splitlines())])
