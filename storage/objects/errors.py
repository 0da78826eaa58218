"""What went wrong at the object store, in our own errors: what, where, what to do."""

from __future__ import annotations

import errno
from typing import TypeVar

from storage.errors import (
    InputChanged,
    InvalidInput,
    InvalidJob,
    InvalidSettings,
    RowmillError,
    StorageFull,
    Unreachable,
)
from storage.locations import WRAPPERS, protocol
from storage.objects.retry import chain, http_status, response_code, type_names

E = TypeVar("E", bound=RowmillError)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_NAME = frozenset({errno.ENAMETOOLONG})
_NO_PATH = frozenset({errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENODEV})
_UNAUTHORIZED, _FORBIDDEN = 401, 403
_NO_CREDENTIALS = frozenset({
    "botocore.exceptions.NoCredentialsError",
    "botocore.exceptions.PartialCredentialsError",
    "botocore.exceptions.CredentialRetrievalError",
    "google.auth.exceptions.RefreshError",
    "google.auth.exceptions.DefaultCredentialsError",
    "azure.core.exceptions.ClientAuthenticationError",
})  # fmt: skip
_BAD_CREDENTIALS = frozenset({
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "ExpiredTokenException", "InvalidToken",
    "TokenRefreshRequired", "AuthenticationFailed", "AuthorizationFailure", "InvalidAuthenticationInfo",
    "RequestTimeTooSkewed",
})  # fmt: skip
_CLIENTS = frozenset({
    "azure.core.exceptions.AzureError", "gcsfs.retry.HttpError", "google.auth.exceptions.GoogleAuthError",
})  # fmt: skip
"""Errors of client libraries that are no ``OSError``."""
STORES = frozenset({"file", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "memory"})
"""Protocols that are opened without being asked for in ``storage_options``."""
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
        if _lacks_credentials(cause):
            return _retry_on_other_worker(
                Unreachable(
                    f"{uri}: the object store does not accept our credentials ({_first_line(cause)}); "
                    f"correct storage_options.{protocol(uri)}, or this machine's clock"
                )
            )
        if http_status(cause) == _FORBIDDEN:
            return _retry_on_other_worker(_refusal(uri, f"permission denied ({_first_line(cause)})", writing))
        if type_names(cause) & _CLIENTS:
            return RowmillError(f"cannot {'write' if writing else 'read'} {uri}: {_first_line(cause)}")
        if "botocore.exceptions.BotoCoreError" in type_names(cause):
            return _refusal(uri, str(cause), writing)
        if protocol(uri) != "file" and isinstance(cause, ValueError):
            return _refusal(uri, f"it is no URL that can be asked for ({_first_line(cause)})", writing)
    if isinstance(error, NotImplementedError) and writing:
        return InvalidJob(f"{uri}: nothing can be written to {protocol(uri)}:// URLs here", field="output")
    if not isinstance(error, OSError):
        if protocol(uri) == "file" and not isinstance(error, ValueError):
            return None
        if isinstance(error, ValueError):
            return _refusal(uri, _first_line(error), writing)
        if _raised_by_us(error):
            return None
        # A file system's library raises whatever it likes, for options of the wrong type for instance.
        return RowmillError(
            f"cannot {'write' if writing else 'read'} {uri}: {type(error).__name__}: {_first_line(error)}"
        )
    reason = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        return _refusal(uri, "there is no such bucket or folder" if writing else "it does not exist", writing)
    if isinstance(error, PermissionError) or error.errno in _REFUSED:
        return _retry_on_other_worker(_refusal(uri, f"permission denied ({reason})", writing))
    if isinstance(error, (IsADirectoryError, NotADirectoryError)) or error.errno in _NO_PATH:
        return _refusal(uri, reason[:1].lower() + reason[1:], writing)
    if error.errno in _NO_NAME:
        return _refusal(uri[:200] + "…" if len(uri) > 200 else uri, reason[:1].lower() + reason[1:], writing)
    return RowmillError(f"cannot {'write' if writing else 'read'} {uri}: {reason}")


def _raised_by_us(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or str(trace.tb_frame.f_globals.get("__name__")).startswith("storage.")


def _lacks_credentials(error: BaseException) -> bool:
    """Also those that have expired: an operator can mend it while the job waits."""
    azure = getattr(error, "error_code", None)
    codes = {response_code(error), str(getattr(azure, "value", azure))}
    return bool(type_names(error) & _NO_CREDENTIALS or codes & _BAD_CREDENTIALS or http_status(error) == _UNAUTHORIZED)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _retry_on_other_worker(error: E) -> E:
    """Perhaps this machine's fault alone: its identity, its mounts, its clock."""
    error.retry_on_other_worker = True
    return error


def _refusal(uri: str, reason: str, writing: bool) -> InvalidJob:
    if writing:
        return InvalidJob(f"cannot write {uri}: {reason}", field="output")
    return InvalidInput(f"cannot read {uri}: {reason}")


def not_opened(uri: str, name: str, *, known: bool) -> InvalidJob:
    """Our error for a protocol that is not opened unless the operator says so; another machine may open one that is
    ``known`` to fsspec."""
    remedy = (
        f"it would reach through to other file systems; give the URL of what lies there, without {name}://"
        if name in WRAPPERS
        else f"local paths, {', '.join(f'{known}://' for known in sorted(STORES - {'file', 'memory'}))} are; another "
        f"file system of fsspec is once the setting storage_options.{name} is there"
    )
    error = InvalidJob(f"{uri}: {name}:// is not opened: {remedy}")
    return _retry_on_other_worker(error) if known else error


def no_filesystem(uri: str, name: str, error: Exception) -> InvalidJob:
    """Our error for a protocol that fsspec does not know, or whose package is missing."""
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(name)
        what = f"install rowmill[{extra}]" if extra else f"install the package that fsspec needs for it ({error})"
        return _retry_on_other_worker(InvalidJob(f"{uri}: nothing here reads {name}:// URLs; {what}"))
    return InvalidJob(f"{uri}: {name}:// is not a kind of URL that fsspec knows")


def bad_options(uri: str, name: str, error: Exception) -> InvalidSettings:
    """Our error where the file system cannot even be made: unknown options, or no credentials."""
    what = " ".join(str(error).split())
    return InvalidSettings(f"{uri} cannot be opened: {what}", field=f"storage_options.{name}")
