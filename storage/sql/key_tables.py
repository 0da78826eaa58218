"""The tables of API keys. ``storage.sql.tables`` has them under the same names."""

from __future__ import annotations

import sqlalchemy as sa

from storage.sql.column_types import Id, Json, Text
from storage.sql.schema import Big, Seconds, metadata

api_key = sa.Table(
    "api_key",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("tenant", Id, nullable=False),
    # The first characters of the key, to find it by; the key itself is nowhere.
    sa.Column("prefix", Id, nullable=False, index=True),
    sa.Column("sha256", Text, nullable=False),
    sa.Column("scopes", Json, nullable=False),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("expires_at", Seconds),
    sa.Column("revoked_at", Seconds),
    sa.Index("ix_api_key_tenant_id", "tenant", "id"),
)

# Append-only, like the events of jobs and models.
api_key_event = sa.Table(
    "api_key_event",
    metadata,
    sa.Column("id", Big, primary_key=True),
    sa.Column("key_id", Id, sa.ForeignKey("api_key.id"), nullable=False, index=True),
    sa.Column("type", Text, nullable=False),
    sa.Column("at", Seconds, nullable=False),
    sa.Column("actor", Text, nullable=False),
    sa.Column("data", Json),
)
