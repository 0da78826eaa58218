"""Part files that no longer hold what was flushed: found, and dropped, so that their rows are computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipeline.execution.flush import count_tokens
from pipeline.process.runtime import Runtime
from storage.errors import CorruptFile
from storage.objects.store import ObjectStore
from storage.parquet import parquet
from storage.queue import attempts
from storage.records import Claim, PartFile
from storage.sql.retry import retry_write
from storage.sql.tables import TOKENS


def drop_corrupt_parts(runtime: Runtime, claim: Claim, parts: Sequence[PartFile]) -> int:
    """Check every part file, and take back the resume points of those that are gone or damaged; returns their rows.

    Raises :class:`LeaseLost` when the attempt no longer holds its shard.
    """
    broken = [part for part in parts if not _is_intact(runtime.store, part)]
    if not broken:
        return 0
    kept = [part for part in parts if part not in broken]
    tokens = _count_tokens(runtime, kept)
    retry_write(lambda: attempts.drop_corrupt_parts(runtime.database, claim, broken, kept, tokens=tokens))
    return sum(len(part.rows) for part in broken)


def _is_intact(store: ObjectStore, part: PartFile) -> bool:
    try:
        store.verify_content(part.uri, part.n_bytes, part.sha256)
    except CorruptFile:
        return False
    return True


def _count_tokens(runtime: Runtime, parts: Sequence[PartFile]) -> dict[str, int]:
    counts = Counter(dict.fromkeys(TOKENS, 0))
    settings = runtime.settings
    for part in parts:
        with runtime.store.open(part.uri) as file:
            _, _, batches = parquet.scan(
                file, part.uri, batch_rows=settings.read_batch_rows, batch_bytes=settings.read_batch_bytes
            )
            counts.update(count_tokens(batches))
    return counts
