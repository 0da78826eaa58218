"""The tables of the gateway's files and batches. ``storage.sql.tables`` has them under the same names."""

from __future__ import annotations

import sqlalchemy as sa

from storage.sql.column_types import Id, Json, State, Text
from storage.sql.schema import Big, ExactJson, Seconds, metadata, none_of, one_of
from storage.states import TERMINAL_BATCH, BatchState

file = sa.Table(
    "file",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("tenant", Id, nullable=False),
    sa.Column("purpose", Text, nullable=False),
    sa.Column("filename", Text, nullable=False),
    sa.Column("uri", Text, nullable=False),
    sa.Column("n_bytes", Big, nullable=False, server_default="0"),
    sa.Column("created_at", Seconds, nullable=False),
    # When its content was there whole. NULL: it is being uploaded, or its uploader died; nobody sees it.
    sa.Column("stored_at", Seconds),
    sa.Column("expires_at", Seconds),
    # Nobody sees it any more. Its content stays while a live batch reads it.
    sa.Column("deleted_at", Seconds),
    sa.Index("ix_file_tenant_created_at_id", "tenant", "created_at", "id"),
    sa.Index("ix_file_expires_at", "expires_at"),
)

_LIVE = none_of(TERMINAL_BATCH)

batch = sa.Table(
    "batch",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("tenant", Id, nullable=False),
    sa.Column("state", State(BatchState), nullable=False),
    sa.Column("endpoint", Text, nullable=False),
    # Not a foreign key: a file may be gone, or may never have been there, and the batch keeps its id.
    sa.Column("input_file_id", Text, nullable=False),
    sa.Column("completion_window", Text, nullable=False),
    sa.Column("metadata", ExactJson),
    # Seconds that the output files are kept; NULL: for ever.
    sa.Column("output_seconds", Seconds),
    sa.Column("idem_key", Id),
    # SHA-256 of the canonical body of the request that created it, and the API key that it came with.
    sa.Column("body_hash", Id, nullable=False),
    sa.Column("key_id", Id),
    sa.Column("job_id", Id),
    sa.Column("model", Text),
    sa.Column("errors", Json),
    sa.Column("n_total", Big, nullable=False, server_default="0"),
    sa.Column("n_completed", Big, nullable=False, server_default="0"),
    sa.Column("n_failed", Big, nullable=False, server_default="0"),
    sa.Column("input_tokens", Big, nullable=False, server_default="0"),
    sa.Column("cached_tokens", Big, nullable=False, server_default="0"),
    sa.Column("output_tokens", Big, nullable=False, server_default="0"),
    sa.Column("output_file_id", Id),
    sa.Column("error_file_id", Id),
    # Whoever drives the batch holds it until then.
    sa.Column("lease_owner", Text),
    sa.Column("lease_until", Seconds),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("expires_at", Seconds, nullable=False),
    sa.Column("in_progress_at", Seconds),
    sa.Column("finalizing_at", Seconds),
    sa.Column("completed_at", Seconds),
    sa.Column("failed_at", Seconds),
    sa.Column("cancelling_at", Seconds),
    sa.Column("cancelled_at", Seconds),
    sa.Column("expired_at", Seconds),
    one_of(BatchState),
    sa.Index("uq_batch_tenant_idem_key", "tenant", "idem_key", unique=True),
    sa.Index("ix_batch_tenant_created_at_id", "tenant", "created_at", "id"),
    sa.Index("ix_batch_tenant_body_hash", "tenant", "body_hash"),
    sa.Index("ix_batch_live", "id", sqlite_where=_LIVE, postgresql_where=_LIVE),
    sa.Index("ix_batch_input_file_id", "input_file_id"),
)
