"""Input whose reading would abort the process (C++ ``terminate``) or crash it is refused before a job is queued."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from pipeline import Client
from storage.errors import InvalidInput
from storage.objects.store import ObjectStore
from storage.parquet import footer_check, parquet
from storage.states import JobState

ROWS = pa.table({"id": [0, 1, 2], "text": ["x", "y", "z"], "s": [{"a": 1, "b": 2}] * 3})


class _Kms(pe.KmsClient):
    """Wraps a key by writing it down."""

    def __init__(self, config: object) -> None:
        super().__init__()

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        return key_bytes.hex()

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        return bytes.fromhex(wrapped_key)


def encrypted(path: Path, columns: Collection[str] = (), *, footer: bool = False) -> Path:
    """Three rows with these columns (leaves) encrypted, the footer as well if asked for; all of it without columns."""
    how: dict[str, Any] = {"column_keys": {"k": list(columns)}} if columns else {"uniform_encryption": True}
    settings = pe.EncryptionConfiguration(footer_key="k", plaintext_footer=not footer, **how)
    properties = pe.CryptoFactory(_Kms).file_encryption_properties(pe.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(path, ROWS.schema, encryption_properties=properties) as writer:
        writer.write_table(ROWS)
    return path


def fields(path: Path, prompt: str = "{text}", **more: Any) -> dict[str, Any]:
    base = {"input": str(path), "output": str(path.parent / "out"), "model": "fake", "task": "generate"}
    return base | {"prompt": prompt} | more


@pytest.mark.parametrize(
    ("leaf", "prompt", "keep", "field"),
    [
        ("text", "{text}", ["id"], "input"),
        ("text", "{id}", None, "keep_columns"),
        ("text", "{id}", ["id", "text"], "keep_columns"),
        ("s.b", "{id}", ["s"], "keep_columns"),
    ],
)
def test_an_encrypted_column_that_is_used_is_refused(
    client: Client, tmp_path: Path, leaf: str, prompt: str, keep: list[str] | None, field: str
) -> None:
    path = encrypted(tmp_path / "in.parquet", [leaf])
    with pytest.raises(InvalidInput, match=rf"column '{leaf[:1]}\w*' .*in\.parquet.*decrypt") as refused:
        client.submit(**fields(path, prompt, keep_columns=keep))
    assert refused.value.field == field
    assert client.jobs() == []


def test_an_encrypted_column_that_nobody_reads_is_no_obstacle(client: Client, tmp_path: Path) -> None:
    path = encrypted(tmp_path / "in.parquet", ["text", "s.a"])
    done = client.run(**fields(path, "{id}", keep_columns=["id"]))
    assert (done.state, done.rows_done, done.rows_failed) == (JobState.COMPLETED, 3, 0)


@pytest.mark.parametrize("name", ["in.parquet", "in"])
@pytest.mark.parametrize("columns", [["text"], []])
def test_an_encrypted_footer_is_refused(client: Client, tmp_path: Path, name: str, columns: list[str]) -> None:
    path = encrypted(tmp_path / name, columns, footer=True)
    with pytest.raises(InvalidInput, match=r"its footer is encrypted; decrypt"):
        client.submit(**fields(path))


def test_one_bad_column_chunk_is_found_and_a_good_footer_has_none(tmp_path: Path) -> None:
    store = ObjectStore()
    bad = encrypted(tmp_path / "bad.parquet", ["text"])
    pq.write_table(ROWS, tmp_path / "good.parquet", row_group_size=2)
    pq.write_table(ROWS.slice(0, 0), tmp_path / "empty.parquet")
    assert not footer_check.is_safe(pq.read_metadata(bad))
    assert set(parquet.stats(store, str(bad), check=True).unreadable) == {"text"}
    for name in ("good", "empty"):
        assert footer_check.is_safe(pq.read_metadata(tmp_path / f"{name}.parquet"))
        assert parquet.stats(store, str(tmp_path / f"{name}.parquet"), check=True).unreadable == {}


def test_offsets_that_lead_out_of_the_file_are_refused(client: Client, tmp_path: Path) -> None:
    """Arrow IPC holds addresses; whoever follows a wrong one crashes."""
    offsets = pa.array([0, 1, 2**30, 3], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"xyz"))
    batch = pa.record_batch({"text": text})
    with pa.ipc.new_file(str(tmp_path / "in.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(InvalidInput, match=r"in\.arrow: it is damaged"):
        client.submit(**fields(tmp_path / "in.arrow"))


SURVEY = """
import sys
from pathlib import Path
from pipeline.inputs import jsonl
from pipeline.spec.text_options import TextOptions
from storage.errors import InvalidInput
from storage.objects.store import ObjectStore

jsonl.BLOCK_BYTES = 8
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        jsonl.JsonlReader(ObjectStore(), TextOptions()).survey(str(path), None)
    except InvalidInput as error:
        print(error)
"""


def test_a_first_value_that_is_null_is_refused_by_its_line(tmp_path: Path) -> None:
    """pyarrow crashes whatever stands behind it, and also in a later block: read in a process that may crash."""
    row = b'{"a":1}'
    after = [b"", b" " + row, b"," + row, b",", b"x", b"\x0b", b"\x0c", b"\x00", b"\n" + row]
    before = [b"", b" ", b"\t\r", b"\n\n ", b"\xef\xbb\xbf", b"\xbb", row + b"\n", row + b"\n\n "]
    texts = [first + b"null" + rest for first in before for rest in after]
    texts += [b"[null]", b"[null, " + row + b"]", row + b"null"]
    for at, text in enumerate(texts):
        (tmp_path / f"{at:03}.jsonl").write_bytes(text)
    command = [sys.executable, "-c", SURVEY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    refusals = done.stdout.splitlines()
    assert len(refusals) == len(texts)
    for at, (text, refusal) in enumerate(zip(texts, refusals, strict=True)):
        line = 1 + text.partition(b"null")[0].count(b"\n")
        assert refusal.startswith(f"input: {tmp_path / f'{at:03}.jsonl'}, line {line}: "), (text, refusal)
