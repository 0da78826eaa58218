"""The database layer's tests run on every database that Rowmill supports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.sql.database import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()
