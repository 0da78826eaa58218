"""Where each object of a job lives, from its output location alone. Pure: nothing is looked up.

::

    <output>/data/part-00042.parquet          final files, and nothing else
    <output>/_manifest.json, _SUCCESS
    <output>/openai/…                         the lines of OpenAI's batch API, for a job that asked for them
    <output>/_profile/…                       traces of a job that asked for them
    <output>/.rowmill/owner.json               which job it belongs to, until that job ends
    <output>/.rowmill/<job>/attempts/…         what attempts write
    <output>/.rowmill/<job>/input/…            input that was converted to Parquet, or put in another order
    <output>/.rowmill/<job>/published.json     its manifest, while it is published once more
"""

from __future__ import annotations

import os
import re

from storage.errors import InvalidJob

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = ("file", "local")
WORK_FOLDER = ".rowmill"
"""Holds what is not final. Hidden, so that no reader takes it for data."""

WRAPPERS = frozenset({
    "asynclocal", "asyncwrapper", "blockcache", "cached", "data", "dir", "filecache", "generic", "libarchive",
    "reference", "simplecache", "tar", "zip",
})  # fmt: skip
"""Protocols of fsspec that open other file systems, local ones too: never opened."""


def protocol(uri: str) -> str:
    """The scheme of a URL in lower case; ``"file"`` for a plain path."""
    match = _SCHEME.match(uri)
    name = match[1].lower() if match else "file"
    return "file" if name in _LOCAL else name


def normalize(uri: str) -> str:
    """One spelling per place: local paths absolute and without ``file://``, no trailing slash, remote URLs as they are.

    Raises :class:`InvalidJob` for nothing at all, and for chained URLs (``::``), which could reach through to other
    file systems.
    """
    if not uri:
        raise InvalidJob("the name of a file or folder is empty; give a path or a URL ('.' is this folder)")
    if "::" in uri:
        raise InvalidJob(f"{uri!r} chains filesystems with '::', which is refused; give one plain path or URL")
    if protocol(uri) != "file":
        return uri.rstrip("/")
    return os.path.abspath(os.path.expanduser(_SCHEME.sub("", uri)))  # noqa: PTH100, PTH111 - keeps globs as they are


def data_dir(output: str) -> str:
    """The folder of the final files."""
    return f"{_base(output)}/data"


def part(output: str, idx: int) -> str:
    """The final file of shard ``idx``."""
    return f"{data_dir(output)}/part-{idx:05d}.parquet"


def manifest(output: str) -> str:
    return f"{_base(output)}/_manifest.json"


def earlier_manifest(output: str, job_id: str) -> str:
    """What the job's manifest was before it is published once more."""
    return f"{work_dir(output, job_id)}published.json"


def success(output: str) -> str:
    """The empty object that says: all of it is there."""
    return f"{_base(output)}/_SUCCESS"


def openai_lines(output: str, *, failed: bool) -> str:
    """The lines of OpenAI's batch API: of requests that were answered, or of those that failed."""
    return f"{_base(output)}/openai/{'errors' if failed else 'output'}.jsonl"


def owner(output: str) -> str:
    """Which job the output belongs to."""
    return f"{_base(output)}/{WORK_FOLDER}/owner.json"


def outer_outputs(output: str) -> list[str]:
    """The outputs among whose own files ``output`` would lie, if there are outputs at these places."""
    scheme, _, path = output.rpartition("://")
    names = path.split("/")
    inner = [at for at, name in enumerate(names) if at > 0 and name in ("data", WORK_FOLDER)]
    return [f"{scheme}://{'/'.join(names[:at])}" if scheme else "/".join(names[:at]) for at in inner]


def profile(output: str, shard_idx: int, attempt_no: int) -> str:
    """The trace of one attempt at one shard. No Parquet, and not below the data."""
    return f"{_base(output)}/_profile/shard-{shard_idx:05d}-{attempt_no}.json"


def work_dir(output: str, job_id: str) -> str:
    """Everything of one job that is not final; ends with a slash."""
    return f"{_base(output)}/{WORK_FOLDER}/{job_id}/"


def attempts_dir(output: str, job_id: str) -> str:
    """What attempts wrote, and nothing that a retry has to read again; ends with a slash."""
    return f"{work_dir(output, job_id)}attempts/"


def attempt_dir(output: str, job_id: str, shard_idx: int, gen: int, attempt_no: int, nonce: str) -> str:
    """A folder that one try at one shard has to itself. The nonce keeps a fenced attempt out of its successor's."""
    return f"{attempts_dir(output, job_id)}{gen}-{shard_idx:05d}/{attempt_no}-{nonce}"


def chunk_in(work_dir_uri: str, n: int, key: str = "") -> str:
    """Chunk ``n`` of input that was converted to Parquet; ``key`` tells apart chunks made of different content."""
    suffix = f"-{key}" if key else ""
    return f"{work_dir_uri.rstrip('/')}/input/chunk-{n:05d}{suffix}.parquet"


def chunk_key(uri: str) -> str:
    """The ``key`` in the name of a chunk."""
    return uri.rpartition("-")[2].removesuffix(".parquet")


def prefix_chunk(work_dir_uri: str, n: int, key: str) -> str:
    """Chunk ``n`` of rows whose prompts begin alike; ``key`` as in :func:`chunk_in`."""
    return f"{work_dir_uri.rstrip('/')}/input/prefix-{n:05d}-{key}.parquet"


def _base(output: str) -> str:
    return output.rstrip("/")
