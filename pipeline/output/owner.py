"""Which job owns an output, by a file in the output itself: databases know nothing of each other's jobs.

The unique index on live jobs orders the jobs of one database. The owner file orders everybody. It is created with a
conditional put once the job's row is there, and deleted before the job ends. A job looks at it before it computes,
before each flush and before each step of publishing, and ends as failed where the output is another job's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pipeline.output.destination import manifest_job, refuse_existing
from pipeline.process.runtime import Runtime
from storage import locations
from storage.errors import Conflict, InvalidInput, InvalidJob, NotFound
from storage.log_actions import Action
from storage.logs import get_logger
from storage.objects import output_probe
from storage.objects.store import ObjectStore
from storage.queue import jobs
from storage.records import Job
from storage.states import TERMINAL_JOB

log = get_logger(__name__)

VERSION = 1
_MOST_TRIES = 20
"""Owners that may have gone between a put, which found one, and the read after it."""


@dataclass(frozen=True, slots=True)
class Owner:
    """What the owner file says. ``where`` names host and database, for people; ``since`` is a time in UTC."""

    job: str
    where: str
    since: str


def read(store: ObjectStore, output: str) -> Owner | None:
    """The owner of ``output``, or ``None``. One whose file cannot be understood has an empty job."""
    with output_probe.refused(output, output_probe.LOOK):
        try:
            content = store.read_bytes(locations.owner(output))  # one request: it is looked at before every step
        except InvalidInput as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
    try:
        document = json.loads(content)
        return Owner(str(document["job"]), str(document["where"]), str(document["since"]))
    except (ValueError, KeyError, TypeError):
        return Owner("", "", "")


def refuse_taken(runtime: Runtime, output: str, *, overwrite: bool) -> None:
    """Raise :class:`Conflict` when a new job may not write to ``output``, before anything is stored or written.

    Another job owns it, it holds published rows, or it lies inside another output. ``overwrite`` allows the first (but
    for a live job of this database) and the second.
    """
    owner = read(runtime.store, output)
    _refuse_nested(runtime.store, output)
    if owner is not None and _is_live(runtime, output, owner) and not overwrite:
        raise _taken(output, owner)
    if not overwrite:
        refuse_existing(runtime.store, output)


def acquire(runtime: Runtime, job: Job, *, overwrite: bool) -> None:
    """Make a new ``job`` the owner of its output; of several that try at the same moment one succeeds.

    Raises :class:`Conflict` as :func:`refuse_taken` does. With ``overwrite`` the output is taken from a job of another
    database, which notices at its next step; never from one of this database.
    """
    _take(runtime, job, overwrite=overwrite)
    if not overwrite:
        # Now that nobody else begins: a whole job may have come and gone since it was looked at first.
        _refuse_rows_of_others(runtime, job)


def check(runtime: Runtime, job: Job, *, over_rows: bool = False) -> None:
    """Raise :class:`Conflict` when the output is not ``job``'s any more; it must not be touched then.

    Where the owner file is gone it is put again, unless another job has published there since; ``over_rows`` allows
    that, for a job that was asked to replace what is there and has not begun.
    """
    owner = read(runtime.store, job.output_uri)
    if owner is not None and owner.job == job.id:
        return
    if owner is not None and job.state in TERMINAL_JOB and _is_known(runtime, owner):
        return  # published once more: which job of this database has the output, the database decides
    _take(runtime, job, overwrite=False)
    if not over_rows:
        _refuse_rows_of_others(runtime, job)


def _take(runtime: Runtime, job: Job, *, overwrite: bool) -> None:
    output = job.output_uri
    for _ in range(_MOST_TRIES):
        owner = read(runtime.store, output)
        if owner is None:
            try:
                _put(runtime, job, if_absent=True)
            except FileExistsError:
                continue
            return
        if owner.job == job.id:
            return
        if _is_live(runtime, output, owner):
            if not overwrite:
                raise _taken(output, owner)
            runtime.notify(f"{output} is taken from job {owner.job} ({owner.where}), which fails once it notices")
        _put(runtime, job, if_absent=False)
        return
    raise Conflict(
        f"{locations.owner(output)} is there and cannot be read (a link that leads nowhere, or other jobs come "
        "and go); delete it, or choose another output",
        field="output",
    )


def _refuse_rows_of_others(runtime: Runtime, job: Job) -> None:
    other = manifest_job(runtime.store, job.output_uri)
    if other not in (None, job.id):
        release(runtime, job)
        whose = f"job {other}" if other else "another job"
        raise Conflict(f"{job.output_uri} holds the rows of {whose} by now; submit a new job", field="output")


def refuse_retry(runtime: Runtime, job: Job, *, overwrite: bool) -> None:
    """Raise :class:`Conflict` when the output of an ended job has become another one's.

    ``overwrite``: the job may replace what others had published before it. ``overwrite`` does not allow replacing rows
    that another job published over this job's own.
    """
    output, store = job.output_uri, runtime.store
    owner = read(store, output)
    if owner is not None and owner.job != job.id and _is_live(runtime, output, owner):
        raise _taken(output, owner)
    if job.publishing:
        _refuse_rows_of_others(runtime, job)
    elif not overwrite:
        refuse_existing(store, output)


def release(runtime: Runtime, job: Job) -> None:
    """Give the output up, if it is ``job``'s. To be called before the job ends: from then on a retry may own it."""
    uri = locations.owner(job.output_uri)
    try:
        owner = read(runtime.store, job.output_uri)
        if owner is not None and owner.job == job.id:
            runtime.store.delete_tree(uri, [uri])  # and the work folder, where this empties it
    except InvalidJob as error:
        log.warning(
            "job %s still seems to own its output: %s", job.id, error, action=Action.JOB_OUTPUT_KEPT, job_id=job.id
        )


def _put(runtime: Runtime, job: Job, *, if_absent: bool) -> None:
    url = runtime.database.url.set(username=None, password=None, query={})
    since = datetime.fromtimestamp(runtime.database.clock(), UTC).isoformat(timespec="seconds")
    owner = Owner(job.id, f"{runtime.worker.host}, {url.render_as_string()}", since)
    content = json.dumps({"version": VERSION, **asdict(owner)}, indent=2).encode()
    with output_probe.refused(job.output_uri, output_probe.CONDITIONAL if if_absent else output_probe.PUT):
        runtime.store.put_bytes(locations.owner(job.output_uri), content, if_absent=if_absent)


def _is_known(runtime: Runtime, owner: Owner) -> bool:
    try:
        jobs.get(runtime.database, owner.job)
    except NotFound:
        return False
    return True


def _is_live(runtime: Runtime, output: str, owner: Owner) -> bool:
    """Whether the owner may still be at work: it is unknown here, and so another database's.

    Raises :class:`Conflict` when it is a live job of this database, which knows the output by another name.
    """
    try:
        job = jobs.get(runtime.database, owner.job)
    except NotFound:
        return True
    if job.state in TERMINAL_JOB:
        return False  # its process died just before it could give the output up
    raise Conflict(
        f"{output} is being written by job {job.id} ({job.state}), which calls it {job.output_uri}; wait for it, "
        "cancel it, or choose another output",
        field="output",
    )


def _taken(output: str, owner: Owner) -> Conflict:
    whose = f"job {owner.job} of another database ({owner.where}; since {owner.since})"
    if not owner.job:
        whose = f"a job that cannot be told: {locations.owner(output)} is damaged"
    return Conflict(
        f"{output} belongs to {whose}, which has not ended; let it end or cancel it there, choose another output, or "
        "pass --overwrite (overwrite=True) to take the output from it",
        field="output",
    )


def _refuse_nested(store: ObjectStore, output: str) -> None:
    """An output among the files of another one would be read as part of it, or deleted with it."""
    for outer in locations.outer_outputs(output):
        if store.exists(locations.manifest(outer)) or store.exists(locations.owner(outer)):
            raise Conflict(f"{output} lies among the files of the output {outer}; choose another place", field="output")
