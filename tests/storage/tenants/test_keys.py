"""API keys: shown once, found by their digest, ended by revocation, expiry and rotation."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from storage.errors import Conflict, InvalidJob, NotFound
from storage.sql import tables
from storage.sql.database import Database
from storage.tenants import keys, tenants
from storage.tenants.keys import Scope


@pytest.fixture
def acme(database: Database) -> str:
    tenants.add(database, "acme")
    return "acme"


def is_valid(database: Database, text: str) -> bool | None:
    found = keys.find(database, text)
    return None if found is None else found[1]


def test_a_key_is_found_and_stored_nowhere(database: Database, acme: str) -> None:
    text, key = keys.create(database, acme, ["read", "submit"], actor="op")
    other, _ = keys.create(database, acme, ["read"], actor="op")
    assert text.startswith("rm_") and len(text) >= 46 and text != other
    assert keys.find(database, text) == (key, True)
    assert key.scopes == {Scope.READ, Scope.SUBMIT}
    with database.read() as connection:
        stored = connection.execute(sa.select(tables.api_key)).all()
    assert text not in repr(stored) and text[:11] in repr(stored)
    changed = text[:-1] + ("A" if text[-1] != "A" else "B")
    for wrong in (changed, text[:11], text[3:], "", "rm_", text + "é", text + "x" * 1000, "rm_\0"):
        assert keys.find(database, wrong) is None


def test_a_key_ends(database: Database, acme: str) -> None:
    forever, key = keys.create(database, acme, ["read"], actor="op")
    soon, brief = keys.create(database, acme, ["read"], expires_in=3600, actor="op")
    assert brief.expires_at is not None and is_valid(database, soon)
    with database.write() as connection:
        connection.execute(tables.api_key.update().where(tables.api_key.c.id == brief.id).values(expires_at=1.0))
    assert is_valid(database, soon) is False
    first = keys.revoke(database, key.id, actor="op")
    assert is_valid(database, forever) is False
    assert keys.revoke(database, key.id, actor="op") == first
    assert [event.type for event in keys.events(database, key.id)] == ["created", "revoked"]
    for ended in (key.id, brief.id):
        with pytest.raises(Conflict):
            keys.rotate(database, ended, actor="op")


def test_rotation_keeps_scopes_and_expiry(database: Database, acme: str) -> None:
    old_text, old = keys.create(database, acme, ["submit"], expires_in=86_400, actor="op")
    new_text, new = keys.rotate(database, old.id, grace_seconds=3600, actor="op")
    assert (new.tenant, new.scopes) == (old.tenant, old.scopes)
    assert new.expires_at == pytest.approx(old.expires_at, abs=5)
    assert is_valid(database, old_text) and is_valid(database, new_text)
    ends = keys.get(database, old.id).expires_at
    assert ends is not None and old.expires_at is not None and ends < old.expires_at
    last_text, _ = keys.rotate(database, new.id, actor="op")
    assert is_valid(database, new_text) is False and is_valid(database, last_text)


def test_what_cannot_be_a_key(database: Database, acme: str) -> None:
    with pytest.raises(NotFound, match="rowmill tenant add nobody"):
        keys.create(database, "nobody", ["read"], actor="op")
    for scopes in ([], ["write"]):
        with pytest.raises(InvalidJob, match="submit, read, admin"):
            keys.create(database, acme, scopes, actor="op")
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidJob, match="expires"):
            keys.create(database, acme, ["read"], expires_in=seconds, actor="op")


def test_another_tenants_key_is_not_found(database: Database, acme: str) -> None:
    _, key = keys.create(database, acme, ["read"], actor="op")
    for call in (keys.get, keys.revoke, keys.rotate):
        with pytest.raises(NotFound):
            call(database, key.id, tenant="other", **({} if call is keys.get else {"actor": "op"}))  # type: ignore[operator]
    assert keys.listed(database, tenant="other") == []


def test_keys_are_listed_page_by_page(database: Database, acme: str) -> None:
    made = [keys.create(database, acme, ["read"], actor="op")[1].id for _ in range(3)]
    first = keys.listed(database, limit=2)
    assert [key.id for key in first] == made[:0:-1]
    assert [key.id for key in keys.listed(database, limit=2, after=first[-1].id)] == made[:1]
