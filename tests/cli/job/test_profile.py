from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from examples.tiny_encoder import build_encoder
from tests.cli.conftest import Rowmill


def test_a_profile_shows_operators(rowmill: Rowmill) -> None:
    encoder = build_encoder(rowmill.home / "encoder")
    pq.write_table(pa.table({"text": ["red", "blue dog", "fast"]}), rowmill.home / "in.parquet")
    arguments = ("run", "in.parquet", "-m", str(encoder), "-t", "embed", "--column", "text", "--json")
    plain = rowmill.inside(*arguments, "-o", "plain")
    assert plain.code == 0, plain.err
    missing = rowmill.inside("job", "profile", plain.document["job"]["id"])
    assert missing.code == 6 and "--profile" in missing.err
    done = rowmill.inside(*arguments, "-o", "out", "--profile")
    assert done.code == 0, done.err
    job = done.document["job"]["id"]
    shown = rowmill.inside("job", "profile", job, "--top", "3")
    assert shown.code == 0, shown.err
    assert "MatMul" in shown.out and "CPUExecutionProvider" in shown.out and shown.out.count("%") == 3
    assert "_profile/shard-00000-1.json" in shown.err
    document = rowmill.inside("job", "profile", job, "--json").document
    assert document["operators"][0]["share"] > 0 and len(document["traces"]) == 1
