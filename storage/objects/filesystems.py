"""The one place that opens a file system of fsspec: by its protocol, from a list, with the operator's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec

from storage.locations import WRAPPERS
from storage.objects.errors import STORES, bad_options, no_filesystem, not_opened

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "s3": {
        # Other processes write too: a listing kept from before is wrong. Four parts of 50 MiB bound an upload's memory.
        "use_listings_cache": False,
        "max_concurrency": 4,
        # Only so that a large upload survives one bad part; more would multiply with our own retries.
        "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 2}},
    }
}


def opened(uri: str, name: str, options: Mapping[str, Mapping[str, Any]]) -> Any:
    """A file system of its own for the protocol ``name``; ``uri`` is what it is opened for, for messages.

    ``options``: protocol → fsspec's options. A protocol beyond the usual ones is opened when it is in them. Raises
    :class:`~storage.errors.InvalidJob` for one that is not, or whose package is missing, and
    :class:`~storage.errors.InvalidSettings` for options that it does not take.
    """
    if name in WRAPPERS or (name not in STORES and name not in options):
        raise not_opened(uri, name, known=name in fsspec.available_protocols())
    try:
        kind = fsspec.get_filesystem_class(name)
    except (ImportError, ValueError) as error:
        raise no_filesystem(uri, name, error) from error
    names = (name, *((kind.protocol,) if isinstance(kind.protocol, str) else kind.protocol))
    defaults = next((_DEFAULTS[n] for n in names if n in _DEFAULTS), {})
    given = next((options[n] for n in names if n in options), {})
    merged = {**defaults, **given}
    if "config_kwargs" in defaults and isinstance(given.get("config_kwargs"), Mapping):
        merged["config_kwargs"] = {**defaults["config_kwargs"], **given["config_kwargs"]}
    try:
        made = kind(**merged, skip_instance_cache=True)
        if "s3" in names:
            made.connect()  # makes a session, else with the first request; only now are options looked at
    except Exception as error:  # whatever the file system's library raises for options of the wrong kind
        if isinstance(error, ImportError):
            raise no_filesystem(uri, name, error) from error
        raise bad_options(uri, name, error) from error
    if "s3" in names and "retries" not in given:
        made.retries = 1
    return made
