"""Exceptions → messages and exit codes."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import errors as cli_errors
from pipeline.spec.status import JobStatus
from storage import errors
from storage.states import JobState

EXPECTED = {
    "InvalidJob": 2,
    "InvalidInput": 2,
    "InvalidModel": 2,
    "EngineMissing": 2,
    "Conflict": 2,
    "InvalidSettings": 2,
    "JobFailed": 3,
    "JobRefused": 2,
    "JobCancelled": 5,
    "Interrupted": 5,
    "NotFound": 6,
    "Unreachable": 7,
    "QuotaExceeded": 8,
    "WaitTimeout": 124,
}


def _raised(kind: type[errors.RowmillError]) -> errors.RowmillError:
    if kind is errors.IllegalTransition:
        return errors.IllegalTransition("job", "failed", "completed")
    if kind is errors.RowError:
        return errors.RowError("missing_value", "column 'text' is null")
    if kind is errors.QuotaExceeded:
        return errors.QuotaExceeded("a", "max_jobs", used=3, limit=3)
    return kind("something is wrong")


@pytest.mark.parametrize(
    "kind",
    [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.RowmillError)],
)
def test_every_error_of_ours_is_a_message_and_a_code(kind: type[errors.RowmillError]) -> None:
    failure = cli_errors.describe(_raised(kind))
    assert failure.expected
    assert failure.exit_code == EXPECTED.get(kind.__name__, 1)
    assert failure.kind == kind.__name__
    assert failure.message


def test_the_field_at_fault_is_told() -> None:
    failure = cli_errors.describe(errors.InvalidJob("must be positive", field="sampling.max_tokens"))
    assert failure.message == "sampling.max_tokens: must be positive"
    assert failure.to_json() == {
        "type": "InvalidJob",
        "message": "sampling.max_tokens: must be positive",
        "field": "sampling.max_tokens",
        "exit_code": 2,
    }


def test_an_error_without_words_still_says_something() -> None:
    assert cli_errors.describe(errors.Unreachable()).message.startswith("The database, the broker")


def test_a_full_disk_is_not_a_defect() -> None:
    failure = cli_errors.describe(OSError(errno.ENOSPC, "No space left on device", "/out/x"))
    assert failure.expected
    assert failure.message == "no space left on device: /out/x"


def test_a_defect_is_kept_in_a_log_without_secrets(tmp_path: Path) -> None:
    try:
        raise KeyError("postgresql://u:hunter2@h/d")
    except KeyError as error:
        assert not cli_errors.describe(error).expected
        path = cli_errors.write_crash_log(error, tmp_path)
    text = path.read_text()
    assert path.parent == tmp_path / "logs"
    assert "test_a_defect_is_kept" in text
    assert "hunter2" not in text


def test_a_log_that_cannot_be_written_goes_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = cli_errors.write_crash_log(ValueError("x"), tmp_path / "file")
    assert path.exists()


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({"state": JobState.COMPLETED}, 0),
        ({"state": JobState.COMPLETED, "rows_failed": 1}, 4),
        ({"state": JobState.FAILED}, 3),
        ({"state": JobState.FAILED, "refused": True}, 2),
        ({"state": JobState.CANCELLED, "rows_failed": 5}, 5),
        ({"state": JobState.EXPIRED}, 5),
    ],
)
def test_the_exit_code_of_a_job(status: Callable[..., JobStatus], found: dict[str, Any], code: int) -> None:
    assert cli_errors.exit_code(status(**found)) == code
