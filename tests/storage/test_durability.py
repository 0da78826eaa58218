"""What is stored is on the disk before anybody is told so. All other tests run without that (``tests.disks``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storage.objects.local_files import OnConflict
from storage.objects.store import ObjectStore
from storage.sql.database import Database
from tests import disks


@pytest.mark.parametrize("on_conflict", ["replace", "keep", "fail"])
def test_a_file_is_synchronised_before_it_has_its_name_and_its_folder_after(
    on_conflict: OnConflict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new" / "rows.bin"
    synced: list[tuple[int, int, bool]] = []

    def fsync(handle: int) -> None:
        found = os.fstat(handle)
        synced.append((found.st_ino, found.st_size, target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with ObjectStore().create(str(target), on_conflict=on_conflict) as file:
        file.write(b"rows")
    above, data, folder = synced
    assert (above[0], above[2]) == (tmp_path.stat().st_ino, False), "the new folder's name"
    assert data == (target.stat().st_ino, 4, False)
    assert (folder[0], folder[2]) == (target.parent.stat().st_ino, True)


def test_sqlite_waits_for_the_disk_at_each_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Database, "_sqlite_engine", disks.sqlite_engine)
    database = Database(f"sqlite:///{tmp_path / 'jobs.db'}")
    for transaction in (database.write, database.read):
        with transaction() as connection:
            pragmas = [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in _PRAGMAS]
        assert pragmas == list(_PRAGMAS.values())
    database.close()


_PRAGMAS = {"synchronous": 2, "journal_mode": "wal"}
"""2 is FULL: in WAL mode anything less loses commits when the power fails."""
