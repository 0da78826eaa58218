"""Settings: the only reader of the environment. Flag > ``ROWMILL_*`` > ``rowmill.toml`` > user config > default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """How this process runs. Frozen; jobs never carry any of it."""

    model_config = SettingsConfigDict(env_prefix="ROWMILL_", env_nested_delimiter="__", frozen=True, extra="forbid")

    data_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("rowmill")))
    """Where the embedded database lives."""
    cache_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_cache_dir("rowmill")))
    """Exported graphs, model digests: all of it can be deleted."""
    database_url: str | None = None
    """SQLAlchemy URL; ``None`` is SQLite at ``data_dir/rowmill.db``."""
    broker_url: str | None = None
    """Celery broker URL; ``None`` is the embedded mode."""
    storage_options: dict[str, dict[str, Any]] = {}
    """Per protocol, fsspec's own options: ``{"s3": {"endpoint_url": …}}``."""
    lease_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A worker silent for this long may lose its shards. Heartbeats come at a third of it."""
    flush_rows: Annotated[int, Field(ge=1)] = 4096
    """Finished rows that are flushed as a resume point."""
    flush_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Finished rows are flushed at least this often."""
    read_batch_rows: Annotated[int, Field(ge=1)] = 1024
    """Most rows read at a time."""
    read_batch_bytes: Annotated[int, Field(ge=1)] = 16 * 2**20
    """Most uncompressed bytes read at a time, estimated from the footers."""
    attempt_retention_hours: Annotated[float, Field(ge=0)] = 24.0
    """How long the files of ended attempts are kept outside the embedded mode."""
    max_failures: Annotated[int, Field(ge=1)] = 4
    """Failures after which a shard is given up."""
    max_losses: Annotated[int, Field(ge=1)] = 8
    """Lost attempts after which a shard is given up."""
    log_level: str = "warning"

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'rowmill.db'}"
