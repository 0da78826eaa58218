"""What a request is checked for before its job is stored: everything that this machine can see. Nothing is written."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.engines import registry
from pipeline.execution.profiling import Profiled
from pipeline.inputs import discovery
from pipeline.models import adapters
from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from pipeline.output import owner
from pipeline.planning import batch_file, engine_choice
from pipeline.process import permissions
from pipeline.process.runtime import Runtime
from pipeline.requests import job as requests
from pipeline.spec.job_spec import JobSpec, parse
from pipeline.spec.result_columns import check_names
from storage import locations
from storage.errors import InvalidInput, InvalidJob, InvalidSettings, RowmillError, TransientError
from storage.fleet import workers
from storage.objects.store import ObjectStore
from storage.records import Job

PATIENCE_SECONDS = 10.0
"""How long an object store that does not answer is asked again, before a worker is left to find out."""


@dataclass(frozen=True)
class Request:
    """A submitted request, resolved once: whoever plans it looks up neither its places nor its model again.

    ``spec`` has absolute paths and normalized URLs. ``engine`` is the one that runs it. It can be run as far as that
    shows without its input. ``registered`` is what the job keeps of the revision that its model stands for; ``None``
    for a path.
    """

    spec: JobSpec
    model: Model
    engine: str
    cache_dir: Path
    registered: Mapping[str, Any] | None = None

    @cached_property
    def adapters(self) -> Mapping[str, str]:
        """The digest of each LoRA adapter, by name. Raises :class:`InvalidJob` for one that cannot be read here."""
        return adapters.digests(self.spec.adapters, self.cache_dir)


@dataclass(frozen=True, slots=True)
class Columns:
    """What a job reads of its input, and what of it is copied to the output."""

    read: tuple[str, ...]
    keep: tuple[str, ...]


def request_of(runtime: Runtime, fields: Mapping[str, Any]) -> Request:
    """Validate a request, and find its model and engine; loads neither, and reads no input.

    Raises :class:`InvalidJob` and its kin, naming the field and the reason.
    """
    spec = parse(batch_file.recognised(runtime.store, fields, runtime.notify))
    # Once, here: whatever moves an alias later, the job keeps this revision.
    revision = runtime.models.named(spec.model, spec.tenant)
    spec = absolute(spec, registered=revision is not None)
    allowed = permissions.granted(runtime.settings)
    permissions.check_adapters(spec, allowed)
    if revision is None:
        model = resolve(spec.model, runtime.settings.cache_dir)
    else:
        spec = spec.model_copy(update={"model": revision.reference})
        model = runtime.models.model(revision)
    engine = engine_choice.choose(spec.task, spec.engine, model)
    if spec.profile and not issubclass(registry.engine_class(engine), Profiled):
        those = ", ".join(map(repr, registry.names_with(Profiled)))
        raise InvalidJob(f"engine {engine!r} writes no traces; {those} does", field="profile")
    registry.check_permissions(engine, spec.engine_options, allowed)
    requests.check_request(engine, spec, model)
    if allowed.own_machine:
        registry.check_host(engine, spec.engine_options)
    registered = None if revision is None else runtime.models.kept(revision)
    return Request(spec, model, engine, runtime.settings.cache_dir, registered)


def request_of_job(runtime: Runtime, job: Job, spec: JobSpec) -> Request:
    """The request of a job that was stored with ``spec``. Raises :class:`InvalidModel` without its model."""
    model = runtime.models.of_job(job, spec.model)
    return Request(spec, model, job.engine, runtime.settings.cache_dir, job.model)


def absolute(spec: JobSpec, *, registered: bool = False) -> JobSpec:
    """The spec with every local path made absolute, so that it means the same in any working directory.

    ``registered``: its model is a name of the registry, and no path.
    """
    model = spec.model
    if not registered and os.path.exists(model):  # noqa: PTH110 - false, too, for what can be no path
        path = Path(model).absolute()
        # The name of a file counts, not that of the file it leads to: hubs keep "model.onnx" under a hash.
        model = str(path.parent.resolve() / path.name if path.is_file() else path.resolve())
    return spec.model_copy(
        update={
            "input": tuple(locations.normalize(uri) for uri in spec.input),
            "output": locations.normalize(spec.output),
            "model": model,
            "adapters": {name: str(adapters.directory(name, folder)) for name, folder in spec.adapters.items()},
        }
    )


def columns_of(store: ObjectStore, request: Request, found: discovery.Inputs, notify: Callable[[str], None]) -> Columns:
    """The columns that the job reads and copies. Raises :class:`InvalidJob` for columns that are not there, hold the
    wrong type, or clash with those of the result; and for a batch file with lines that are no requests."""
    spec, schema = request.spec, found.schema
    batch_file.check(store, spec, (uri for uri, _ in found.originals))
    _refuse_look_alikes(spec.named_columns | set(spec.keep_columns or ()), schema.names)
    read = requests.check(request.engine, spec, request.model, schema)
    missing = [name for name in spec.keep_columns or () if name not in schema.names]
    if missing:
        there = ", ".join(schema.names)
        raise InvalidInput(
            f"the input has no column {', '.join(map(repr, missing))}; it has {there}", field="keep_columns"
        )
    keep = tuple(schema.names) if spec.keep_columns is None else spec.keep_columns
    results = requests.result_names(request.engine, spec, request.model)
    check_names(keep, results or (), spec.output_prefix, notify)
    _refuse_unreadable(found, read, keep)
    return Columns(read, keep)


def _refuse_look_alikes(wanted: Iterable[str], names: Sequence[str]) -> None:
    """Raise :class:`InvalidInput` for a name that the input has in another normal form of Unicode only."""
    composed = {unicodedata.normalize("NFC", name): name for name in names}
    for name in wanted:
        same = composed.get(unicodedata.normalize("NFC", name))
        if name not in names and same is not None:
            raise InvalidInput(
                f"the input has no column {name!r} ({name!a}); its column {same!r} ({same!a}) only looks the "
                "same, in another Unicode normal form (NFC or NFD): copy the name from the input, or rename the column",
                field="input",
            )


def _refuse_unreadable(found: discovery.Inputs, columns: Iterable[str], keep: Iterable[str]) -> None:
    """Raise :class:`InvalidInput` for a column that is read or kept, and cannot be read, or not as one type."""
    for name, where in found.unreadable.items():
        if name in columns:
            raise InvalidInput(f"column {name!r} cannot be read in {where}; decrypt or mend the file", field="input")
        if name in keep:
            what = f"column {name!r} cannot be read in {where}"
            advice = "leave it out: name the columns to copy in keep_columns (--keep), or decrypt or mend the file"
            raise InvalidInput(f"{what}; {advice}", field="keep_columns")
    for name, what in found.clashes.items():
        if name in columns:
            raise InvalidInput(what, field="input")
        if name in keep:
            advice = "make them alike, or name the columns to copy in keep_columns (--keep), without this one"
            raise InvalidInput(f"{what}; {advice}", field="input")


def check_in_fleet(runtime: Runtime, request: Request) -> None:
    """Look at input, output and workers from where the job is submitted; a worker will plan it.

    What this machine cannot reach, and a worker may, is said in a notice. Raises :class:`InvalidJob` for everything
    else that planning would refuse.
    """
    spec, notify = request.spec, runtime.notify
    store = ObjectStore(runtime.settings.storage_options, retry_seconds=PATIENCE_SECONDS)
    with _if_reachable(notify, "output"):
        owner.refuse_taken(runtime, spec.output, overwrite=spec.overwrite)
    _check_folder(spec.output)
    found = None
    with _if_reachable(notify, "input"), tempfile.TemporaryDirectory(prefix="rowmill-submit-") as folder:
        found = discovery.look(store, spec, folder, notify)
    try:
        if found is not None:
            columns_of(store, request, found, notify)
    finally:
        store.close()
    _check_workers(runtime, request)


@contextmanager
def _if_reachable(notify: Callable[[str], None], field: str) -> Iterator[None]:
    """Turn errors that may be this machine's alone into a notice; name ``field`` in the others."""
    try:
        yield
    except (TransientError, InvalidSettings) as error:
        notify(_unseen(field, error))
    except RowmillError as error:
        if error.retry_on_other_worker:
            notify(_unseen(field, error))
            return
        if isinstance(error, InvalidJob) and error.field is None:
            raise type(error)(error.message, field=field) from error
        raise


def _unseen(field: str, error: RowmillError) -> str:
    return (
        f"the {field} cannot be looked at from here ({error}): the worker that plans the job checks it, and "
        "'rowmill job wait' says what it finds"
    )


def _check_folder(output: str) -> None:
    """Raise :class:`InvalidJob` for a local output below a file."""
    if locations.protocol(output) != "file":
        return
    for path in (Path(output), *Path(output).parents):
        if os.path.exists(path):  # noqa: PTH110 - never raises
            if not path.is_dir():
                raise InvalidJob(f"{path} is a file, not a folder; choose another output", field="output")
            return


def _check_workers(runtime: Runtime, request: Request) -> None:
    """Raise :class:`EngineMissing` where every worker that serves the engine lacks what the options ask for."""
    engine = request.engine
    serving = [seen.worker for seen in workers.listed(runtime.database) if engine in seen.worker.engines]
    if not serving:
        runtime.notify(f"no worker serves engine {engine!r} now; the job waits for one ('rowmill worker list')")
    elif all(engine in worker.offers for worker in serving):
        registry.check_workers(engine, request.spec.engine_options, [worker.offers[engine] for worker in serving])
