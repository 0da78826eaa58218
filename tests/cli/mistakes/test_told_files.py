"""Files, folders and streams that are damaged, odd or closed: a message and a documented exit code, never a defect."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.cli.values import json_file
from pipeline.inputs import jsonl
from pipeline.models.resolve import resolve
from pipeline.spec.json_text import MAX_DEPTH
from pipeline.spec.text_options import TextOptions
from storage.errors import InvalidInput, InvalidModel
from storage.objects.store import ObjectStore
from tests.cli.conftest import Done, Rowmill
from tests.cli.mistakes.told import EMBED, deep, told
from tests.examples import examples

in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows(rowmill: Rowmill, name: str = "in.parquet") -> Path:
    """An input of three rows."""
    path = rowmill.home / name
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), path)
    return path


# -- inputs ----------------------------------------------------------------------------------------------------------

lines = st.lists(
    st.sampled_from([b"{}", b'{"a": 1}', b'{"a": [', b"]", b'"', b'\\"', b"[" * 120, b"\xff", b"\n", b"\0", b" "])
).map(b"".join)


def rows_of(path: Path) -> int:
    """How many rows a file of JSON lines has, read as planning reads it."""
    reader = jsonl.JsonlReader(ObjectStore(), TextOptions())
    reader.survey(str(path), None)
    return sum(table.num_rows for table in reader.tables(str(path), None))


@given(lines | st.binary(max_size=40))
@example(b'{"a": 1}\n{"a": ' + deep(50_000).encode() + b"}\n")
@example(b"[\n" * 50_000)
@example(b'{"a": "x"} ' + b"[" * 50_000)
@example(b"]" * 500 + b'\n{"a": ' + deep(50_000, "dict").encode() + b"}\n")
@example(b'{"s": "]"}\n{"a": [' + b'"]", [' * 50_000)
@settings(parent=in_a_folder, max_examples=examples(300))
def test_json_lines(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(InvalidInput):
        rows_of(path)


def test_the_line_that_is_nested_too_deeply_is_named(rowmill: Rowmill) -> None:
    text = '{"text": "[[[[ \\" {{{{"}\n' * 3 + '{"text": "a", "d": ' + deep(MAX_DEPTH) + "}\n"
    (rowmill.home / "in.jsonl").write_text(text)
    done = told(rowmill.inside("run", "in.jsonl", "-o", "out", *EMBED), 2, home=rowmill.home)
    assert f"in.jsonl, line 4: nested more than {MAX_DEPTH} levels deep" in done.err


def test_brackets_in_strings_are_not_nested(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"a": "[" * 500 + '"' + "{" * 500 + "\\"}) + "\n")
    assert rows_of(path) == 1


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_what_parquet_cannot_nest_is_kept_as_json(rowmill: Rowmill, kind: str) -> None:
    value = deep(MAX_DEPTH - 1, kind)
    (rowmill.home / "in.jsonl").write_text('{"text": "a", "d": ' + value + "}\n")
    done = told(rowmill.inside("run", "in.jsonl", "-o", "out", *EMBED), 0, home=rowmill.home)
    assert done.code == 0
    column = pq.read_table(rowmill.home / "out" / "data")["d"]
    assert column.type == pa.json_()
    assert column.to_pylist() == [value]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "inside"])
def test_a_column_whose_name_is_not_utf8(rowmill: Rowmill, kind: str) -> None:
    column = pa.array([{"zzname": 1}]) if kind == "inside" else pa.array([1])
    table = pa.table({"text": ["a"], "struct" if kind == "inside" else "zzname": column})
    path = rowmill.home / f"in.{'parquet' if kind == 'inside' else kind}"
    if kind == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"zzname", b"zz\xff\xfeme"))
    done = told(rowmill.inside("run", path.name, "-o", "out", *EMBED), 2, home=rowmill.home)
    assert path.name in done.err
    assert "UTF-8" in done.err


@pytest.mark.parametrize(("words", "name"), [
    (("job", "show", "{}"), "JOB"),
    (("run", "{}", "-o", "out", *EMBED), "INPUT"),
    (("run", "in.parquet", "-o", "{}", *EMBED), "--output"),
    (("run", "in.parquet", "-o", "out", *EMBED, "--set", "a={}"), "--set"),
])  # fmt: skip
def test_an_argument_that_is_not_utf8_is_named_as_its_user_does(
    rowmill: Rowmill, words: tuple[str, ...], name: str
) -> None:
    odd = os.fsdecode(b"odd\xff")
    done = told(rowmill.inside(*(word.format(odd) for word in words)), 2, home=rowmill.home)
    assert done.err.startswith(f"error: {name}: ")


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("option", ["--spec", "--schema", "--tools"])
def test_a_file_of_options_that_could_be_read_for_ever(rowmill: Rowmill, option: str, kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else rowmill.home / "pipe.json"
    if kind == "pipe":
        os.mkfifo(path)
    done = told(rowmill.inside("run", "in.parquet", "-o", "out", *EMBED, option, path), 2, home=rowmill.home)
    assert f"{option}: {path} is a " in done.err


def test_a_settings_file_that_is_a_pipe(rowmill: Rowmill) -> None:
    os.mkfifo(rowmill.home / "rowmill.toml")
    rowmill.environment["ROWMILL_CONFIG"] = str(rowmill.home / "rowmill.toml")
    done = told(rowmill.inside("job", "list"), 2, home=rowmill.home)
    assert "a named pipe" in done.err


def test_options_from_a_pipe_of_the_shell(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b'{"a": 1}')
    os.close(write)
    try:
        assert json_file(Path(f"/dev/fd/{read}"), "--schema") == {"a": 1}
    finally:
        os.close(read)


@pytest.mark.parametrize("output", ["in.parquet", "in.parquet/below", "/dev/null"])
def test_an_output_that_is_a_file(rowmill: Rowmill, output: str) -> None:
    pq.write_table(pa.table({"text": ["a"]}), rowmill.home / "in.parquet")
    done = told(rowmill.inside("run", "in.parquet", "-o", output, *EMBED), 2, home=rowmill.home)
    assert "output: " in done.err
    assert "an output is a folder" in done.err


@pytest.mark.parametrize("given_as", ["by name", "in a folder", "as a glob"])
def test_a_file_whose_name_is_not_utf8(rowmill: Rowmill, given_as: str) -> None:
    (rowmill.home / "in").mkdir()
    rows(rowmill).rename(os.fsdecode(os.fsencode(rowmill.home) + b"/in/na\xffme.parquet"))
    words = {"by name": os.fsdecode(b"in/na\xffme.parquet"), "in a folder": "in", "as a glob": "in/*.parquet"}
    done = told(rowmill.inside("run", words[given_as], "-o", "out", *EMBED), 2, home=rowmill.home)
    assert "na\\udcffme.parquet" in done.err
    assert "UTF-8" in done.err


@pytest.mark.parametrize("words", ["loop/self", "ring/x.parquet", "x" * 300])
@pytest.mark.parametrize("place", ["input", "output", "model", "spec", "data_dir", "cache_dir"])
def test_links_that_lead_nowhere_and_names_that_are_too_long(rowmill: Rowmill, words: str, place: str) -> None:
    rows(rowmill)
    (rowmill.home / "loop").mkdir()
    (rowmill.home / "loop" / "self").symlink_to(".")
    (rowmill.home / "ring").symlink_to("ring")
    command = {"input": "in.parquet", "output": "out", "model": "fake"} | {place: words}
    more = ("--spec", words) if place == "spec" else ()
    if place in ("data_dir", "cache_dir"):
        more = ("--setting", f"{place}={words}")
    job = ("-m", command["model"], "-t", "embed", "--column", "text", "-q")
    done = told(rowmill.inside("run", command["input"], "-o", command["output"], *job, *more), home=rowmill.home)
    assert done.code == 0 or place != "input" or done.code == 2


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 300, 50_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "modules.json"])
def test_a_model_with_json_that_is_nested_too_deeply(tmp_path: Path, name: str, levels: int) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "m" / name).write_text('{"a": ' + deep(levels) + "}")
    with pytest.raises(InvalidModel, match=rf"{name} is damaged: .*nested more than"):
        resolve(str(tmp_path / "m"), tmp_path)


def test_a_model_folder_with_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "self").symlink_to(".")
    resolve(str(folder), tmp_path)
    (folder / "ring").symlink_to("ring")
    with pytest.raises(InvalidModel, match="ring"):
        resolve(str(folder), tmp_path)
    (folder / "ring").unlink()
    Path(os.fsdecode(os.fsencode(folder) + b"/na\xffme.bin")).touch()
    with pytest.raises(InvalidModel, match="UTF-8"):
        resolve(str(folder), tmp_path)
    with pytest.raises(InvalidModel):
        resolve("~nobody-here/model", tmp_path)


# -- the database ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The database of one finished job."""
    home = tmp_path_factory.mktemp("whole")
    environment = {"ROWMILL_DATA_DIR": str(home / "data"), "ROWMILL_CACHE_DIR": str(home / "cache")}
    rowmill = Rowmill(home, environment)
    rows(rowmill)
    told(rowmill.inside("run", "in.parquet", "-o", "out", *EMBED), 0)
    with closing(sqlite3.connect(home / "data" / "rowmill.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return (home / "data" / "rowmill.db").read_bytes()


def emptied(rowmill: Rowmill) -> Path:
    """The data folder, without a database."""
    data = Path(rowmill.environment["ROWMILL_DATA_DIR"])
    shutil.rmtree(data)
    data.mkdir()
    return data


def look(rowmill: Rowmill, content: bytes) -> Iterator[Done]:
    """What commands that read say of a database with this content."""
    (emptied(rowmill) / "rowmill.db").write_bytes(content)
    for words in (("job", "list"), ("admin", "queues"), ("run", "in.parquet", "-o", "out", *EMBED)):
        yield told(rowmill.inside(*words), home=rowmill.home)


@given(
    at=st.integers(0, 400_000),
    step=st.sampled_from([1, 7, 100, 700, 4096, 50_000]),
    mask=st.integers(1, 255),
    keep=st.sampled_from([0, 1, 100, 4096, 9000, 10**9]),
)
@example(at=0, step=1, mask=0x55, keep=10**9)
@example(at=9000, step=700, mask=0x55, keep=10**9)
@settings(parent=in_a_folder, max_examples=examples(25))
def test_a_damaged_database(rowmill: Rowmill, whole: bytes, at: int, step: int, mask: int, keep: int) -> None:
    rows(rowmill)
    damaged = bytearray(whole[:keep])
    for place in range(at % max(len(damaged), 1), len(damaged), step):
        damaged[place] ^= mask
    for done in look(rowmill, bytes(damaged)):
        assert done.code == 0 or "rowmill.db" in done.err or "job" in done.err


def test_a_database_that_is_none(rowmill: Rowmill, whole: bytes) -> None:
    rows(rowmill)
    for content in (b"nothing of the kind" * 500, whole[: len(whole) // 2], os.urandom(9000)):
        for done in look(rowmill, content):
            assert done.code == 1
            assert "rowmill.db is damaged" in done.err


def test_a_folder_and_a_newer_database(rowmill: Rowmill, whole: bytes) -> None:
    data = emptied(rowmill)
    (data / "rowmill.db").mkdir()
    assert "rowmill.db is a folder, not a file" in told(rowmill.inside("job", "list"), 2, home=rowmill.home).err
    (data / "rowmill.db").rmdir()
    (data / "rowmill.db").write_bytes(whole)
    with closing(sqlite3.connect(data / "rowmill.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    assert "upgrade Rowmill" in told(rowmill.inside("job", "list"), 1, home=rowmill.home).err


@pytest.mark.parametrize("statement", ["CREATE TABLE job (x)", "CREATE TABLE worker (x)"])
def test_a_database_of_another_program(rowmill: Rowmill, statement: str) -> None:
    data = emptied(rowmill)
    with closing(sqlite3.connect(data / "rowmill.db")) as connection:
        connection.execute(statement)
        connection.commit()
    assert "another program's" in told(rowmill.inside("job", "list"), 1, home=rowmill.home).err


def test_a_database_that_is_a_pipe(rowmill: Rowmill) -> None:
    data = emptied(rowmill)
    os.mkfifo(data / "rowmill.db")
    assert "rowmill.db is a named pipe" in told(rowmill.inside("job", "list"), 2, home=rowmill.home).err


def test_a_job_that_is_named_twice_is_deleted_once(rowmill: Rowmill) -> None:
    rows(rowmill)
    told(rowmill.inside("run", "in.parquet", "-o", "out", *EMBED), 0, home=rowmill.home)
    job = json.loads(rowmill.inside("job", "list", "--json").out)["jobs"][0]["id"]
    done = told(rowmill.inside("job", "delete", job, job[-8:], "--json"), 0, home=rowmill.home)
    assert json.loads(done.out)["deleted"] == [job]


def test_a_database_that_another_process_has_locked(
    rowmill: Rowmill, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = emptied(rowmill)
    (data / "rowmill.db").write_bytes(whole)
    with closing(sqlite3.connect(data / "rowmill.db")) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr("storage.sql.driver_errors.BUSY_SECONDS", 0.1)
        rows(rowmill)
        done = told(rowmill.inside("run", "in.parquet", "-o", "out", *EMBED), 1, home=rowmill.home)
    assert "rowmill.db was locked by another process" in done.err


# -- streams ---------------------------------------------------------------------------------------------------------


def shell(rowmill: Rowmill, redirection: str, *words: str) -> Done:
    line = f'"$@" {redirection}'
    done = subprocess.run(
        ["bash", "-c", line, "bash", *rowmill.command(*words)],
        cwd=rowmill.home, env=rowmill.environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ("> /dev/full", 1),
        ("> /dev/full 2> /dev/full", 1),
        ("2> /dev/full", 0),
    ],
)
def test_streams_that_are_closed_or_full(rowmill: Rowmill, redirection: str, code: int) -> None:
    rows(rowmill)
    done = shell(rowmill, redirection, "run", "in.parquet", "-o", "out", *EMBED, "--json")
    assert done.code == code, done
    assert "Traceback" not in done.err
    assert (rowmill.home / "out" / "_SUCCESS").exists()
    assert not list(rowmill.home.parent.glob("data/logs/crash*"))
    assert done.code == 0 or "2>" in redirection or "stdout cannot be written (no space left on device)" in done.err


def test_a_job_that_was_stored_is_said_though_stdout_is_full(rowmill: Rowmill) -> None:
    rows(rowmill)
    done = shell(rowmill, "> /dev/full", "job", "submit", "in.parquet", "-o", "out", *EMBED)
    assert done.code == 1
    (job,) = rowmill.inside("job", "list", "--json").document["jobs"]
    assert f"Job {job['id']} is stored" in done.err


def test_help_on_a_full_disk(rowmill: Rowmill) -> None:
    assert "stdout cannot be written" in told(shell(rowmill, "> /dev/full", "--help"), 1).err
