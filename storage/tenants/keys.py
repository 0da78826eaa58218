"""API keys: who may call the gateway, for which tenant, and what for. The key itself is shown once and never stored."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
import uuid_utils

from storage.errors import Conflict, InvalidJob, NotFound
from storage.sql import tables
from storage.sql.database import Database, now
from storage.sql.row_mapping import read

MARK = "rm_"
"""What every key begins with, so that secret scanners find one that leaked."""
_BYTES = 32
_PREFIX = len(MARK) + 8
_LONGEST = 256
_key, _event = tables.api_key, tables.api_key_event


class Scope(StrEnum):
    """What a key may be used for."""

    SUBMIT = "submit"
    """Every write of its own tenant: jobs, files, batches."""
    READ = "read"
    """Every read of its own tenant."""
    ADMIN = "admin"
    """Keys, tenants, models and workers."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key. ``prefix`` is how it begins; times are Unix seconds, ``None`` is never."""

    id: str
    tenant: str
    prefix: str
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    def is_valid(self, at: float) -> bool:
        """Whether it may be used at a time in Unix seconds."""
        return self.revoked_at is None and (self.expires_at is None or at < self.expires_at)

    def to_json(self) -> dict[str, Any]:
        """What may be told of a key, as plain JSON values."""
        return {
            "id": self.id,
            "tenant": self.tenant,
            "prefix": self.prefix,
            "scopes": sorted(self.scopes),
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "revoked_at": self.revoked_at,
        }


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """One line of the audit trail: ``created``, ``revoked`` or ``rotated``. ``data``: scopes, expiry, the other key."""

    key_id: str
    type: str
    at: float
    actor: str
    data: dict[str, Any] | None


def create(
    database: Database, tenant: str, scopes: Collection[str], *, expires_in: float | None = None, actor: str
) -> tuple[str, ApiKey]:
    """A new key of a registered tenant, and what is stored of it. ``expires_in``: seconds from now.

    Raises :class:`NotFound` for an unknown tenant, :class:`InvalidJob` for scopes or a time that cannot be.
    """
    wanted = _scopes(scopes)
    if expires_in is not None and not 0 < expires_in < 100 * 366 * 86_400:
        raise InvalidJob("a key expires in more than 0 seconds and less than 100 years", field="expires")
    with database.write() as connection:
        if connection.execute(sa.select(tables.tenant.c.name).where(tables.tenant.c.name == tenant)).first() is None:
            raise NotFound(f"there is no tenant {tenant!r}; 'rowmill tenant add {tenant}' registers it")
        text, key_id = _insert(connection, tenant, wanted, expires_in=expires_in)
        _record(connection, key_id, "created", actor, {"scopes": sorted(wanted), "expires_in": expires_in})
    return text, get(database, key_id)


def find(database: Database, text: str) -> tuple[ApiKey, bool] | None:
    """The stored key that ``text`` is, and whether it is valid now by the database's clock; ``None`` for no key."""
    if not text.startswith(MARK) or not text.isascii() or len(text) > _LONGEST:
        return None
    digest = _digest(text)
    query = sa.select(_key, now().label("now")).where(_key.c.prefix == text[:_PREFIX])
    found = None
    for row in database.rows(query):
        if hmac.compare_digest(row.sha256, digest):
            found = _key_of(row), _key_of(row).is_valid(float(row.now))
    return found


def get(database: Database, key_id: str, *, tenant: str | None = None) -> ApiKey:
    """The key of this id (of this tenant). Raises :class:`NotFound`."""
    row = database.row(_of(key_id, tenant))
    if row is None:
        raise _unknown(key_id)
    return _key_of(row)


def listed(
    database: Database, *, tenant: str | None = None, limit: int | None = None, after: str | None = None
) -> list[ApiKey]:
    """Keys, the newest first, also those that are revoked or expired; ``after`` is the id of the last one before."""
    query = sa.select(_key).order_by(_key.c.id.desc()).limit(limit)
    if tenant is not None:
        query = query.where(_key.c.tenant == tenant)
    if after is not None:
        query = query.where(_key.c.id < after)
    return [_key_of(row) for row in database.rows(query)]


def revoke(database: Database, key_id: str, *, actor: str, tenant: str | None = None) -> ApiKey:
    """End a key now. Jobs that were submitted with it go on. Harmless when it is revoked already."""
    with database.write() as connection:
        row = connection.execute(database.locked(_of(key_id, tenant))).first()
        if row is None:
            raise _unknown(key_id)
        if row.revoked_at is None:
            connection.execute(_key.update().where(_key.c.id == key_id).values(revoked_at=now()))
            _record(connection, key_id, "revoked", actor, None)
    return get(database, key_id)


def rotate(
    database: Database, key_id: str, *, grace_seconds: float = 0.0, actor: str, tenant: str | None = None
) -> tuple[str, ApiKey]:
    """A new key with the tenant, the scopes and the expiry of an old one, which ends after ``grace_seconds``.

    Raises :class:`Conflict` for one that is revoked or has expired.
    """
    if not 0 <= grace_seconds < 366 * 86_400:
        raise InvalidJob("the old key goes on for 0 seconds to one year", field="grace")
    with database.write() as connection:
        query = _of(key_id, tenant).add_columns(now().label("now"))
        row = connection.execute(database.locked(query)).first()
        if row is None:
            raise _unknown(key_id)
        old, at = _key_of(row), float(row.now)
        if not old.is_valid(at):
            raise Conflict(f"key {key_id} is revoked or has expired; create a new one", field="key")
        left = None if old.expires_at is None else old.expires_at - at
        text, new_id = _insert(connection, old.tenant, old.scopes, expires_in=left)
        ends = at + grace_seconds if left is None else at + min(grace_seconds, left)
        values = {"expires_at": ends} if grace_seconds else {"revoked_at": now()}
        connection.execute(_key.update().where(_key.c.id == key_id).values(**values))
        _record(connection, key_id, "rotated", actor, {"replaced_by": new_id, "ends_at": ends})
        _record(connection, new_id, "created", actor, {"scopes": sorted(old.scopes), "replaces": key_id})
    return text, get(database, new_id)


def events(database: Database, key_id: str) -> list[KeyEvent]:
    """What was done with a key, oldest first."""
    query = sa.select(_event).where(_event.c.key_id == key_id).order_by(_event.c.id)
    return database.records(KeyEvent, query)


def _insert(
    connection: sa.Connection, tenant: str, scopes: frozenset[Scope], *, expires_in: float | None
) -> tuple[str, str]:
    text, key_id = MARK + secrets.token_urlsafe(_BYTES), f"key_{uuid_utils.uuid7().hex}"
    connection.execute(
        _key.insert().values(
            id=key_id,
            tenant=tenant,
            prefix=text[:_PREFIX],
            sha256=_digest(text),
            scopes=sorted(scopes),
            created_at=now(),
            expires_at=None if expires_in is None else now() + expires_in,
        )
    )
    return text, key_id


def _record(connection: sa.Connection, key_id: str, kind: str, actor: str, data: dict[str, Any] | None) -> None:
    connection.execute(_event.insert().values(key_id=key_id, type=kind, at=now(), actor=actor, data=data))


def _scopes(names: Collection[str]) -> frozenset[Scope]:
    if not names:
        raise InvalidJob(f"a key needs a scope; scopes are {', '.join(Scope)}", field="scope")
    for name in names:
        if name not in set(Scope):
            raise InvalidJob(f"{name!r} is no scope; scopes are {', '.join(Scope)}", field="scope")
    return frozenset(Scope(name) for name in names)


def _of(key_id: str, tenant: str | None) -> sa.Select[Any]:
    query = sa.select(_key).where(_key.c.id == key_id)
    return query if tenant is None else query.where(_key.c.tenant == tenant)


def _key_of(row: sa.Row[Any]) -> ApiKey:
    return read(ApiKey, row, scopes=frozenset(map(Scope, row.scopes)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _unknown(key_id: str) -> NotFound:
    return NotFound(f"there is no key {key_id!r}; 'rowmill key list' shows those there are")
