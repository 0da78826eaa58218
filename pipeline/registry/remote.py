"""Models on object stores: their files are fetched once into the cache, under the digest of the model.

A fetch that was broken off goes on where it stopped; processes that fetch the same model take turns; a folder appears
under its digest only when it is whole and was verified.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import posixpath
import shutil
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from pipeline.models import external_data
from pipeline.models.resolve import BESIDE_A_GRAPH, is_ignored, resolve
from storage import locations
from storage.errors import InvalidModel
from storage.objects.info import ObjectInfo
from storage.objects.store import ObjectStore
from storage.registry.records import Artifact, Revision

_FOLDER = "registered"
_CHUNK = 8 * 2**20
Notify = Callable[[str], None]


def is_remote(place: str) -> bool:
    return locations.protocol(place) != "file"


def fetched_new(store: ObjectStore, url: str, cache_dir: Path, notify: Notify) -> Path:
    """Fetch the model at a URL that nothing is known of yet; returns the path of the copy.

    Raises :class:`InvalidModel` where there is no model, and :class:`~storage.errors.Unreachable`.
    """
    home = cache_dir / _FOLDER
    with _alone(home, hashlib.sha256(url.encode()).hexdigest()[:32]) as work:
        graph = url.endswith(".onnx")
        files = _beside(store, url) if graph else _below(store, url)
        if not files:
            raise InvalidModel(f"there is nothing at {url}", field="PATH")
        notify(f"fetching {len(files)} files of {url}")
        place = work / "model" / url.rpartition("/")[2]
        if graph:
            place = work / "model" / url.split("/")[-2] / place.name
            _download(store, files.pop(url), place)
            for location in _external(place):
                source = f"{url.rpartition('/')[0]}/{location}"
                files[source] = store.info(source)
        base = place.parent if graph else place
        for source, info in files.items():
            at = posixpath.relpath(source, url.rpartition("/")[0] if graph else url)
            _download(store, info, _inside(work, base, at))
        digest = resolve(str(place), cache_dir).digest
        final = home / digest
        if not final.exists():
            work.rename(final)
        return final / place.relative_to(work)


def fetched(
    store: ObjectStore, revision: Revision, artifacts: Sequence[Artifact], cache_dir: Path, notify: Notify
) -> Path:
    """The copy of a registered model, fetched where it is not in the cache. Each file is verified as it arrives."""
    home, url = cache_dir / _FOLDER, revision.place
    graph = url.endswith(".onnx")
    below = Path("model", *((url.split("/")[-2],) if graph else ()), url.rpartition("/")[2])
    final = home / revision.digest
    if final.exists():
        return final / below
    with _alone(home, revision.digest) as work:
        if not final.exists():
            notify(f"fetching {revision.reference}: {len(artifacts)} files of {url}")
            place = work / below
            source = url.rpartition("/")[0] if graph else url
            for item in artifacts:
                target = _inside(work, place.parent if graph else place, item.at)
                origin = posixpath.normpath(posixpath.join("/", source.partition("://")[2], item.at)).lstrip("/")
                _download(store, store.info(f"{source.partition('://')[0]}://{origin}"), target, item)
            work.rename(final)
    return final / below


def _download(store: ObjectStore, info: ObjectInfo, target: Path, expected: Artifact | None = None) -> None:
    """Fetch one object, going on with the part that is there; raise :class:`InvalidModel` for another content."""
    if target.is_file():
        return  # whole: it was renamed last
    if expected is not None and info.n_bytes != expected.n_bytes:
        raise InvalidModel(f"{info.uri} has {info.n_bytes} bytes, {expected.n_bytes} were registered", field="model")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The part of another version of the object is not gone on with.
    stamp = hashlib.sha256(f"{info.n_bytes}:{info.etag}".encode()).hexdigest()[:12]
    part = target.with_name(f".{target.name}.{stamp}.part")
    with store.open(info.uri) as source, part.open("ab") as out:
        source.seek(out.tell())
        while chunk := source.read(_CHUNK):
            out.write(chunk)
    if expected is not None:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected.sha256:
            part.unlink()
            raise InvalidModel(
                f"{info.uri} is not the file that was registered: its SHA-256 is {found[:12]}… in place of "
                f"{expected.sha256[:12]}…",
                field="model",
            )
    part.rename(target)


def _below(store: ObjectStore, url: str) -> dict[str, ObjectInfo]:
    """The objects below a folder that can be part of a model."""
    names = [uri for uri in store.list_tree(url) if not uri.endswith("/")]
    wanted = [uri for uri in names if not any(is_ignored(part) for part in _relative(uri, url).split("/"))]
    return {uri: store.info(uri) for uri in wanted}


def _beside(store: ObjectStore, url: str) -> dict[str, ObjectInfo]:
    """A graph, and what belongs to a text model beside it, or above its folder ``onnx``."""
    found: dict[str, ObjectInfo] = {url: store.info(url)}
    folder = url.rpartition("/")[0]
    for place in (folder, folder.rpartition("/")[0]) if folder.endswith("/onnx") else (folder,):
        for uri in store.list_tree(place):
            name = _relative(uri, place)
            if "/" not in name and any(fnmatch(name, pattern) for pattern in BESIDE_A_GRAPH):
                found[uri] = store.info(uri)
    return found


def _relative(uri: str, folder: str) -> str:
    return uri.removeprefix(folder).lstrip("/")


def _external(graph: Path) -> Sequence[str]:
    try:
        return external_data.locations(graph)
    except ValueError as error:
        raise InvalidModel(f"{graph.name} is not an ONNX graph: {error}", field="PATH") from error


def _inside(work: Path, base: Path, at: str) -> Path:
    target = (base / at).resolve()
    if not target.is_relative_to(work.resolve()):
        raise InvalidModel(f"the model has a file at {at!r}, outside its own folder", field="model")
    return target


@contextlib.contextmanager
def _alone(home: Path, key: str) -> Iterator[Path]:
    """A folder to fetch into, which one process at a time has, and which stays when the fetch is broken off."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / f".{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        work = home / f".{key}.incoming"
        work.mkdir(exist_ok=True)
        try:
            yield work
        except InvalidModel:
            shutil.rmtree(work, ignore_errors=True)  # what is there is wrong, not unfinished
            raise
        shutil.rmtree(work, ignore_errors=True)  # where it did not become the model
