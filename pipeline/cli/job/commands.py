"""``rowmill job``: look at jobs, wait for them, cancel and retry them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import errors, output, streams
from pipeline.cli.command import Invocation, command, say
from pipeline.cli.foreground import Hooks, foreground
from pipeline.cli.job.errors import list_errors
from pipeline.cli.job.ids import JobId, JobIds
from pipeline.cli.job.listing import list_jobs
from pipeline.client import documents
from pipeline.client.progress import progress
from pipeline.process.metrics import derived
from pipeline.spec.status import JobStatus
from storage.errors import Interrupted, InvalidJob, JobCancelled, JobFailed

if TYPE_CHECKING:
    from pipeline.client.client import Client
    from pipeline.client.handle import JobHandle

app = typer.Typer(help="Jobs: submit, list, show, wait, cancel, retry.", no_args_is_help=True)

_POLL_SECONDS = 1.0
_LOOKS = 3
"""How often in a row a job is seen without anybody before that is believed: a job may just have been submitted."""

app.command(name="list")(list_jobs)
app.command(name="errors")(list_errors)


@app.command()
@command
def show(
    invocation: Invocation,
    job: JobId,
    row: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Show this input row instead; the first is 0.")
    ] = None,
    attempts: Annotated[bool, typer.Option("--attempts", help="Show every attempt at every shard, too.")] = False,
    events: Annotated[bool, typer.Option("--events", help="Show every change of state, too.")] = False,
    shards: Annotated[bool, typer.Option("--shards", help="Show every shard, too, and why it failed.")] = False,
) -> None:
    """One job, or one of its rows."""
    if row is not None:
        _show_row(invocation, job, row)
        return
    with invocation.client() as client:
        handle = client.job(job)
        status, measured = handle.status(), handle.measured()
        tried = [documents.attempt(item) for item in handle.attempts()] if attempts else []
        happened = [documents.event(item) for item in handle.events()] if events else []
        pieces = [_shard(item, handle.regrouped) for item in handle.shards()] if shards else []
    if invocation.as_json:
        more: dict[str, Any] = {"shards": pieces} if shards else {}
        more |= ({"attempts": tried} if attempts else {}) | ({"events": happened} if events else {})
        output.emit_json({"job": status.to_json(), "measured": {**measured, **derived(measured)}, **more})
        return
    output.emit(output.pairs([*describe(status), *describe_measured(measured)]))
    if shards:
        shown = ("shard", "state", "first_row", "rows", "done", "failed", "attempts", "failures", "losses", "error")
        output.emit("\n" + output.table(shown, [[item[name] for name in shown] for item in pieces]))
    if attempts:
        names = ("shard", "attempt", "state", "resumed", "computed", "seconds", "worker", "error")
        output.emit("\n" + output.table(names, [[item[name] for name in names] for item in tried]))
    if events:
        columns = ("at", "type", "shard", "attempt", "actor", "data")
        lines = [[output.moment(item["at"]), *(item[c] for c in columns[1:])] for item in happened]
        output.emit("\n" + output.table(columns, lines))


def _show_row(invocation: Invocation, job: str, row: int) -> None:
    with invocation.client() as client:
        request = client.request(client.job(job).id, row)
    invocation.show({"request": request.to_json()}, output.pairs(request.to_json().items()))


def describe(status: JobStatus) -> list[tuple[str, object]]:
    """A job as names and values."""
    share = f" ({100 * status.rows_done // status.rows_total}%)" if status.rows_total else ""
    took = None
    if status.started_at is not None and status.ended_at is not None:
        took = output.duration(status.ended_at - status.started_at)
    return [
        ("id", status.id),
        ("state", status.state + _remark(status)),
        ("reason", status.stop_reason),
        ("error", status.error),
        ("message", status.message),
        ("task", status.task),
        ("model", status.model),
        ("engine", status.engine),
        ("input", ", ".join(status.input)),
        ("output", status.output),
        ("rows", f"{status.rows_done:,} of {status.rows_total:,} done{share}"),
        ("failed rows", f"{status.rows_failed:,}" if status.rows_failed else None),
        ("resumed rows", f"{status.rows_resumed:,}" if status.rows_resumed else None),
        ("shards", _counts(status.shards)),
        ("tokens", _counts({name.removesuffix("_tokens"): n for name, n in status.tokens.items()})),
        ("attempts", f"{status.attempts} ({status.failures} failed, {status.losses} lost)"),
        ("generation", status.gen or None),
        ("tenant", status.tenant if status.tenant != "default" else None),
        ("metadata", ", ".join(f"{k}={v}" for k, v in status.metadata.items())),
        ("idempotency key", status.idempotency_key),
        ("created", output.moment(status.created_at)),
        ("started", output.moment(status.started_at)),
        ("ended", output.moment(status.ended_at)),
        ("expires", None if status.terminal else output.moment(status.expires_at)),
        ("took", took),
    ]


def _remark(status: JobStatus) -> str:
    if status.interrupted:
        return " (interrupted)"
    return " (partial output)" if status.partial and status.rows_done else ""


def describe_measured(measured: Mapping[str, float]) -> list[tuple[str, object]]:
    """What the attempts of a job measured, as names and values."""
    found = derived(measured)

    def share(name: str) -> str | None:
        return None if name not in found else f"{100 * found[name]:.1f}%"

    times = {name: share(f"{name}_share") for name in ("read", "render", "engine", "write")}
    batch = [
        f"{found[f'{name}_requests']:.1f} {name}" for name in ("running", "waiting") if f"{name}_requests" in found
    ]
    copied = int(measured.get("copied_rows", 0))
    loading = measured.get("loading_seconds", 0)
    hits, kept = int(measured.get("cache_hits", 0)), int(measured.get("cache_writes", 0))
    reused = f"{hits:,} rows were answered before ({share('cache_hit_rate')})" if "cache_hit_rate" in found else None
    return [
        (
            "engine tokens",
            _counts({n: int(measured.get(f"{n}_tokens", 0)) for n in ("prompt", "cached", "completion")}),
        ),
        ("prefix hits", share("prefix_hit_rate")),
        ("copied rows", f"{copied:,} had the prompt of another row" if copied else None),
        ("cached results", ", ".join(part for part in (reused, f"{kept:,} added" if kept else None) if part)),
        (
            "speed",
            f"{output.count(found['tokens_per_second'])} tokens/s" if found.get("tokens_per_second") else None,
        ),
        ("batch", ", ".join(batch)),
        ("KV cache", None if "kv_cache_use" not in found else f"{100 * found['kv_cache_use']:.1f}% in use"),
        ("preemptions", f"{int(measured['preemptions']):,}" if measured.get("preemptions") else None),
        ("time", ", ".join(f"{name} {part}" for name, part in times.items() if part)),
        ("engine start-up", output.duration(loading) if loading >= 0.5 else None),
    ]


def _counts(counts: Any) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items() if n)


def _shard(item: Any, regrouped: bool) -> dict[str, Any]:
    return {
        "shard": item.id,
        "state": str(item.state),
        "first_row": None if regrouped else item.row_start,
        "rows": item.row_n if item.select is None else len(item.select),
        "done": len(item.done),
        "failed": len(item.failed),
        "attempts": item.attempt_no,
        "failures": item.n_fail,
        "losses": item.n_lost,
        "error": item.error,
    }


@app.command()
@command
def cancel(invocation: Invocation, job: JobId) -> None:
    """Stop a job. What is finished is published as a partial output. Of a job that has ended it says the state."""
    with invocation.client() as client:
        handle = client.job(job)
        ended = handle.status().terminal
        _tell(invocation, handle.cancel())
    if ended:
        invocation.notice("it had ended before: there was nothing to cancel")


@app.command()
@command
def delete(invocation: Invocation, jobs: JobIds) -> None:
    """Forget jobs that have ended: database rows and work files. What they published stays.

    'job retry' cannot go on with them any more, and their idempotency keys are free again.
    """
    with invocation.client() as client:
        handles = {handle.id: handle for handle in map(client.job, jobs)}.values()  # each once, however it is named
        for handle in handles:
            handle.delete()
            if not invocation.as_json:
                output.emit(f"{handle.id}  deleted")
    if invocation.as_json:
        output.emit_json({"deleted": [handle.id for handle in handles]})


@app.command()
@command
def retry(
    invocation: Invocation,
    job: JobId,
    everything: Annotated[
        bool, typer.Option("--all", help="Compute every row again, not only the failed and missing ones.")
    ] = False,
    no_run: Annotated[bool, typer.Option("--no-run", help="Queue only; 'rowmill job resume' runs it.")] = False,
    wait_for_it: Annotated[bool, typer.Option("--wait", help="With workers: wait until it has ended.")] = False,
) -> int:
    """Go on with a job that has ended: its failed and missing rows; the output is replaced when they are done.

    Without a broker the rows are computed here and now, as in 'rowmill run'.
    """
    if no_run and wait_for_it:
        raise InvalidJob("--no-run and --wait exclude each other")
    if no_run or invocation.loaded.settings.broker_url is not None:
        with invocation.client() as client:
            handle = client.job(job)
            status = handle.retry(failed_only=not everything, on_notice=invocation.notice)
            if wait_for_it:
                return wait_until_ended(invocation, handle)
            _tell(invocation, status)
        return errors.OK

    def work(client: Client, hooks: Hooks) -> JobStatus:
        handle = client.job(job)
        handle.retry(failed_only=not everything)
        return handle.resume(**hooks)

    return foreground(invocation, work)


@app.command()
@command
def profile(
    invocation: Invocation,
    job: JobId,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Operators to show.")] = 15,
) -> None:
    """Where the engine's time went, by operator, in a job that ran with --profile."""
    from pipeline.execution.profiling import together
    from storage.errors import NotFound

    with invocation.client() as client:
        found = [a.stats["profile"] for a in client.job(job).attempts() if "profile" in (a.stats or {})]
    if not found:
        raise NotFound(f"job {job} has no profile; 'rowmill run --profile' makes one")
    traces = [each["trace"] for each in found if each["trace"]]
    merged = together(found)
    lines = [
        [each["operator"], each["provider"], f"{each['runs']:,}", f"{each['seconds']:.3f}", f"{each['share']:.1%}"]
        for each in merged["operators"][:top]
    ]
    columns = ("operator", "provider", "runs", "seconds", "share")
    invocation.show({**merged, "traces": traces}, output.table(columns, lines, right=columns[2:]))
    for trace in () if invocation.as_json else traces:
        invocation.notice(f"trace, for chrome://tracing or Perfetto: {trace}")


@app.command()
@command
def resume(invocation: Invocation, job: JobId) -> int:
    """Go on with an interrupted job, here and now, as the same 'rowmill run' would."""

    def work(client: Client, hooks: Hooks) -> JobStatus:
        handle = client.job(job)
        status = handle.status()
        return status if status.terminal else handle.resume(**hooks)

    return foreground(invocation, work)


def _tell(invocation: Invocation, status: JobStatus) -> None:
    invocation.show({"job": status.to_json()}, f"{status.id}  {status.state}")
    if status.message and not invocation.as_json:
        invocation.notice(status.message)


@app.command()
@command
def wait(
    invocation: Invocation,
    job: JobId,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Stop waiting after this time, with exit code 124.")
    ] = None,
) -> int:
    """Wait until a job has ended; the exit code says how. Without a broker, a job that nobody runs is run here."""
    with invocation.client() as client:
        handle = client.job(job)
        if not (status := handle.status()).attended:
            embedded = invocation.loaded.settings.broker_url is None
            invocation.notice(f"{status.message}; it is run here now" if embedded else str(status.message))
        return wait_until_ended(invocation, handle, timeout)


def wait_until_ended(invocation: Invocation, handle: JobHandle, timeout: float | None = None) -> int:
    """Wait for a job, describe it, and return the exit code of how it ended. Raises :class:`WaitTimeout`."""
    with output.only_ours():
        with contextlib.suppress(JobFailed, JobCancelled):  # told by the status, like every other end
            handle.wait(timeout=timeout, progress=not invocation.quiet and sys.stderr.isatty())
        status = handle.status()
    return _end(invocation, status)


@app.command()
@command
def watch(invocation: Invocation, job: JobId) -> int:
    """Show a job's progress until it has ended. Ctrl-C only stops the watching.

    A job that was interrupted and that nobody runs is not watched any longer: exit code 5. In a fleet without a worker
    for the job, watching goes on, and says so.
    """
    embedded = invocation.loaded.settings.broker_url is None
    alone, told = 0, False
    with invocation.client() as client, progress(quiet=invocation.quiet, write=say) as shown:
        handle = client.job(job)
        try:
            while not (status := handle.status()).terminal:
                alone = 0 if status.attended else alone + 1
                if alone >= _LOOKS and embedded:
                    break
                if alone >= _LOOKS and not told:
                    shown.notice(str(status.message))
                told = alone >= _LOOKS
                shown.update(status)
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            shown.notice(f"no longer watching; the job is not touched. To stop it: rowmill job cancel {handle.id}")
            return errors.SIGNALLED
    if not status.terminal:
        raise Interrupted(f"job {status.id} is {status.state}: {status.message}")
    return _end(invocation, status)


def _end(invocation: Invocation, status: JobStatus) -> int:
    with streams.reader_may_leave():
        invocation.show({"job": status.to_json()}, output.pairs(describe(status)))
    return errors.exit_code(status)
