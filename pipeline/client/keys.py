"""API keys as an operator handles them: ``client.keys``."""

from __future__ import annotations

import builtins
from collections.abc import Sequence

from pipeline.boundary import Limit, Seconds, Text, boundary
from pipeline.process.runtime import Runtime
from storage.tenants import keys
from storage.tenants.keys import ApiKey, KeyEvent


@boundary
class Keys:
    """The API keys in the database of a client. ``actor`` is who the audit trail names."""

    def __init__(self, runtime: Runtime, actor: Text) -> None:
        self._database, self._actor = runtime.database, actor

    def create(self, tenant: Text, scopes: Sequence[str], *, expires_in: Seconds | None = None) -> tuple[str, ApiKey]:
        """A new key, which is shown this once, and what is stored of it. ``expires_in``: seconds from now.

        Raises :class:`~storage.errors.NotFound` for a tenant that is not registered, and
        :class:`~storage.errors.InvalidJob` for a scope that there is not.
        """
        return keys.create(self._database, tenant, scopes, expires_in=expires_in, actor=self._actor)

    def list(
        self, tenant: Text | None = None, *, limit: Limit | None = None, after: Text | None = None
    ) -> builtins.list[ApiKey]:
        """Keys, the newest first, revoked and expired ones included; ``after`` is the id of the last one before."""
        return keys.listed(self._database, tenant=tenant, limit=limit, after=after)

    def get(self, key_id: Text) -> ApiKey:
        """What is stored of a key. Raises :class:`~storage.errors.NotFound`."""
        return keys.get(self._database, key_id)

    def revoke(self, key_id: Text) -> ApiKey:
        """End a key now; jobs that were submitted with it go on. Harmless when it is revoked already."""
        return keys.revoke(self._database, key_id, actor=self._actor)

    def rotate(self, key_id: Text, *, grace_seconds: Seconds = 0.0) -> tuple[str, ApiKey]:
        """A new key with the tenant, scopes and expiry of an old one, which ends after ``grace_seconds``.

        Raises :class:`~storage.errors.Conflict` for one that is revoked or has expired.
        """
        return keys.rotate(self._database, key_id, grace_seconds=grace_seconds, actor=self._actor)

    def events(self, key_id: Text) -> builtins.list[KeyEvent]:
        """What was done with a key, the oldest first."""
        keys.get(self._database, key_id)
        return keys.events(self._database, key_id)
