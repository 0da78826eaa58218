"""Which paths and URLs a job may name as its input, its output or its model: by their text, before anything is opened.

Every function raises ``ValueError`` with what is wrong and what to write instead.
"""

from __future__ import annotations

import re

from storage.locations import WRAPPERS, protocol
from storage.redaction import holds_credentials

_NOWHERE = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:/*\s*$")
"""A scheme and nothing else: what is left of ``s3://$BUCKET`` when the variable is not set."""
_IN_ONE_PROCESS = frozenset({"memory"})
_READ_ONLY = frozenset({"gist", "git", "github", "http", "https"})
"""Schemes of URLs where fsspec writes nothing, or nothing that can be renamed, listed and deleted."""
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")
"""``s3:/bucket``, which as a path would be a folder called ``s3:``."""
_FILE_SCHEME = re.compile("file|local", re.IGNORECASE)


def no_credentials(uri: str) -> None:
    """Refuse a URL with a password or a key in it."""
    # A job is stored, shown and listed. Its text is not repeated here either.
    if holds_credentials(uri):
        scheme = uri.partition("://")[0].lower()
        raise ValueError(
            f"the {scheme}:// URL holds a password or a key, and a job is no place for one: leave it out of the URL, "
            f"and set storage_options.{scheme} (ROWMILL_STORAGE_OPTIONS)"
        )


def plain_place(uri: str) -> None:
    """Refuse what names no place that every process of a job can find: nothing, half a URL, memory, chained URLs."""
    no_credentials(uri)
    if not uri.strip():
        raise ValueError("the path is empty; '.' is the working directory")
    if _NOWHERE.match(uri):
        raise ValueError(f"{uri!r} names no bucket or folder")
    if "::" in uri:
        raise ValueError(f"{uri!r} chains filesystems with '::', which is refused; give one plain path or URL")
    if protocol(uri) == "file":
        _path_of_this_machine(uri)
    if protocol(uri) in WRAPPERS:
        raise ValueError(
            f"{uri!r} reaches through to another file system, which no worker opens; give the path or URL of what lies "
            "there"
        )
    if protocol(uri) in _IN_ONE_PROCESS:
        raise ValueError(
            f"{uri!r} is in the memory of one process, and is lost with it; give a folder or an object store"
        )


def _path_of_this_machine(uri: str) -> None:
    if _ONE_SLASH.match(uri):
        raise ValueError(
            f"{uri!r} is no URL: two slashes belong behind the colon; a path of that name begins with './'"
        )
    scheme, separator, rest = uri.partition("://")
    if not separator or "/" in scheme:
        return
    if not _FILE_SCHEME.fullmatch(scheme):
        raise ValueError(f"{uri!r} is no URL: {scheme!r} is no scheme; a path of that name begins with './'")
    if not rest.startswith(("/", ".", "~")):
        raise ValueError(
            f"{uri!r} names the host {rest.partition('/')[0]!r}, and only files of this machine are opened; "
            f"write {scheme}:///PATH, or a plain path"
        )


def writable_place(uri: str) -> None:
    """Refuse an output on a file system that fsspec only reads."""
    if protocol(uri) in _READ_ONLY:
        raise ValueError(f"{uri!r} cannot be written to; give a folder or an object store")
