"""The tables of registered models. ``storage.sql.tables`` has them under the same names."""

from __future__ import annotations

import sqlalchemy as sa

from storage.sql.column_types import Id, Json, State, Text
from storage.sql.schema import Big, Seconds, metadata, one_of
from storage.states import RevisionState

OPERATOR = ""
"""The tenant of models that every tenant may name."""

model = sa.Table(
    "model",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("tenant", Id, nullable=False),
    sa.Column("name", Id, nullable=False),
    # Numbers are given once: a model that was removed and is added again goes on counting.
    sa.Column("last_number", sa.Integer, nullable=False, server_default="0"),
    sa.Column("created_at", Seconds, nullable=False),
    sa.UniqueConstraint("tenant", "name"),
)

_ACTIVE = sa.text("state = 'active'")

model_revision = sa.Table(
    "model_revision",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("model_id", Id, sa.ForeignKey("model.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", State(RevisionState), nullable=False),
    sa.Column("digest", Id, nullable=False),
    sa.Column("place", Text, nullable=False),
    sa.Column("task", Text),
    sa.Column("created_at", Seconds, nullable=False),
    one_of(RevisionState),
    sa.UniqueConstraint("model_id", "number"),
    sa.UniqueConstraint("model_id", "digest"),
    # What lets one revision of a model be active at a time, whoever activates.
    sa.Index("uq_model_revision_active", "model_id", unique=True, sqlite_where=_ACTIVE, postgresql_where=_ACTIVE),
)

model_artifact = sa.Table(
    "model_artifact",
    metadata,
    sa.Column("revision_id", Id, sa.ForeignKey("model_revision.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", Id, primary_key=True),
    # Where the file lies from the revision's folder, or from the folder of its graph.
    sa.Column("at", Text, nullable=False),
    sa.Column("n_bytes", Big, nullable=False),
    sa.Column("sha256", Text, nullable=False),
)

model_alias = sa.Table(
    "model_alias",
    metadata,
    sa.Column("model_id", Id, sa.ForeignKey("model.id"), primary_key=True),
    sa.Column("alias", Id, primary_key=True),
    sa.Column("revision_id", Id, sa.ForeignKey("model_revision.id", ondelete="CASCADE"), nullable=False, index=True),
)

model_report = sa.Table(
    "model_report",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("revision_id", Id, sa.ForeignKey("model_revision.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("verdict", Text, nullable=False),
    sa.Column("at", Seconds, nullable=False),
    sa.Column("actor", Text, nullable=False),
    sa.Column("document", Json, nullable=False),
    sa.CheckConstraint("verdict IN ('PASS', 'FAIL', 'INSUFFICIENT')", name="verdict"),
)

# Append-only, and it outlives the revisions that it tells of: what was active at any time can be answered.
model_event = sa.Table(
    "model_event",
    metadata,
    sa.Column("id", Big, primary_key=True),
    sa.Column("model_id", Id, sa.ForeignKey("model.id"), nullable=False, index=True),
    sa.Column("type", Text, nullable=False),
    sa.Column("number", sa.Integer),
    sa.Column("digest", Text),
    sa.Column("alias", Text),
    sa.Column("at", Seconds, nullable=False),
    sa.Column("actor", Text, nullable=False),
    sa.Column("from_state", Text),
    sa.Column("to_state", Text),
    sa.Column("reason", Text),
    sa.Column("forced", sa.Boolean, nullable=False, server_default=sa.text("false")),
)
