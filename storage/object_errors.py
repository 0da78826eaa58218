"""What went wrong at the object store, in our own errors: what, where, what to do."""

from __future__ import annotations

import errno

from storage.errors import InputChanged, InvalidInput, InvalidJob, InvalidSettings, RowmillError, StorageFull
from storage.transient import chain, type_names

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}


def explain(uri: str, error: Exception, *, writing: bool = False) -> RowmillError | None:
    """Our error for one of the file system's, or ``None`` when it is not one of those: then it is a bug."""
    if isinstance(error, RowmillError):
        return error
    for cause in chain(error):
        if "s3fs.utils.FileExpired" in type_names(cause):
            return InputChanged(f"{uri} was changed while it was being read")
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return StorageFull(f"no space left to write {uri}; free some, then resume the job")
        if "botocore.exceptions.BotoCoreError" in type_names(cause):
            return _refusal(uri, str(cause), writing)
    if not isinstance(error, OSError):
        return None
    reason = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        return _refusal(uri, "there is no such bucket or folder" if writing else "it does not exist", writing)
    if isinstance(error, PermissionError) or error.errno in _REFUSED:
        return _refusal(uri, f"permission denied ({reason})", writing)
    if isinstance(error, (IsADirectoryError, NotADirectoryError)):
        return _refusal(uri, reason.lower(), writing)
    return RowmillError(f"cannot {'write' if writing else 'read'} {uri}: {reason}")


def _refusal(uri: str, reason: str, writing: bool) -> InvalidJob:
    if writing:
        return InvalidJob(f"cannot write {uri}: {reason}", field="output")
    return InvalidInput(f"cannot read {uri}: {reason}")


def no_filesystem(uri: str, protocol: str, error: Exception) -> InvalidJob:
    """Our error for a protocol that fsspec does not know, or whose package is missing."""
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(protocol)
        what = f"install rowmill[{extra}]" if extra else f"install the package that fsspec needs for it ({error})"
        return InvalidJob(f"{uri}: nothing here reads {protocol}:// URLs; {what}")
    return InvalidJob(f"{uri}: {protocol}:// is not a kind of URL that fsspec knows")


def bad_options(uri: str, protocol: str, error: Exception) -> InvalidSettings:
    """Our error where the file system cannot even be made: unknown options, or no credentials."""
    what = " ".join(str(error).split())
    return InvalidSettings(f"{uri} cannot be opened: {what}", field=f"storage_options.{protocol}")
