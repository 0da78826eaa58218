"""What the doctor asks of the place where a job's output is to go: every kind of request, once, leaving nothing."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.config.settings import Settings
from pipeline.spec import places
from pipeline.spec.check import Check
from storage import locations
from storage.errors import InvalidJob, InvalidSettings, RowmillError, StorageFull, Unreachable
from storage.objects import filesystems, output_probe
from storage.objects.store import ObjectStore

_PATIENCE_SECONDS = 10.0


def refuse(output: str) -> None:
    """Raises :class:`~storage.errors.InvalidJob` for what is no place at all."""
    try:
        places.plain_place(output)
        places.writable_place(output)
    except ValueError as error:
        raise InvalidJob(str(error), field="output") from None


def checks(settings: Settings, output: str | None) -> Iterator[Check]:
    """Each request that a job makes at ``output``, as a check that names the right it needs."""
    if output is None:
        yield Check("output", "skip", "give --output URI to try what jobs do there: put, get, list, copy, delete")
        return
    output = locations.normalize(output)
    try:
        filesystems.opened(output, locations.protocol(output), settings.storage_options)
    except InvalidJob as error:  # no right is missing: this machine lacks what opens such places
        yield Check("output", "fail", str(error))
        return
    except InvalidSettings:
        pass  # the first step says so
    folder = locations.work_dir(output, f"doctor-{secrets.token_hex(4)}")
    made = _missing_folders(output)
    store = ObjectStore(settings.storage_options, retry_seconds=_PATIENCE_SECONDS)
    try:
        yield from _steps(output_probe.OutputProbe(store, output, folder), output)
    finally:
        store.close()
        for path in made:
            with suppress(OSError):  # what was not made, or is not empty
                path.rmdir()


def _steps(probe: output_probe.OutputProbe, output: str) -> Iterator[Check]:
    for step in probe.steps:
        if step == output_probe.DELETE:
            continue
        check = _tried(probe, output, step)
        yield check
        if check.unreachable:
            return
        if step == output_probe.PUT and check.status == "fail":
            break  # the others need what it puts
    yield _tried(probe, output, output_probe.DELETE)


def _tried(probe: output_probe.OutputProbe, output: str, step: str) -> Check:
    try:
        probe.steps[step]()
    except (Unreachable, InvalidSettings) as error:
        return Check(f"output {step}", "fail", str(error), unreachable=isinstance(error, Unreachable))
    except Exception as error:  # whatever a file system's client raises is the finding
        what = error if isinstance(error, RowmillError) else RowmillError(f"{type(error).__name__}: {error}")
        needed = output_probe.needed(step, what)
        detail = output_probe.reason(output, step, what)
        if step == output_probe.DELETE:
            detail += f"; what was tried is left at {probe.folder}"
        remedy = "free some space" if isinstance(what, StorageFull) else output_probe.remedy(output, step, what)
        return Check(f"output {needed}", "fail", detail, remedy, {"right": output_probe.right(output, needed)})
    return Check(f"output {step}", "ok", f"{output}: {output_probe.right(output, step)}")


def _missing_folders(output: str) -> list[Path]:
    """The folders that trying a local place will make, innermost first."""
    if locations.protocol(output) != "file":
        return []
    path = Path(output)
    return [folder for folder in (path, *path.parents) if not folder.exists()]
