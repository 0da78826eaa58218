"""Any table in, the same table out: what is written, every reader reads, and it equals what went in.

Or the job is refused at submit, naming file and column. Tables are made by pyarrow, Polars, DuckDB and pandas.
The same fifteen examples every time, in CI too; ``TABLES=500`` takes that many, and other ones every time.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import Client
from pipeline.config.settings import Settings
from storage.errors import InvalidInput
from storage.states import JobState
from tests.embedded.arrow_tables import READERS, WRITERS, array, plain, relatives, types, values

EXAMPLES = int(os.environ.get("TABLES", "15"))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("home")
    with Client(settings=Settings(data_dir=home / "data", cache_dir=home / "cache", flush_rows=6)) as client:
        yield client


@st.composite
def files(draw: Any) -> list[pa.Table]:
    """One to three files. Columns may have another type in some of them, be missing, or stand elsewhere."""
    kinds = {f"c{at}": draw(types()) for at in range(draw(st.integers(1, 3)))}
    evolving = draw(st.booleans())
    tables = []
    for number in range(draw(st.integers(1, 3))):
        n_rows = draw(st.integers(0 if number else 1, 12))
        columns = {"text": pa.array([f"{number} {row}" for row in range(n_rows)])}
        for name, kind in kinds.items():
            if evolving and draw(st.integers(0, 9)) == 0:
                continue
            here = draw(relatives(kind)) if evolving and number else kind
            found = draw(st.lists(values(here), min_size=n_rows, max_size=n_rows))
            try:
                columns[name] = array(found, here)
            except pa.ArrowInvalid:  # pyarrow takes some lists of decimals for ones of another precision
                hypothesis.reject()
        order = draw(st.permutations(list(columns))) if evolving else list(columns)
        tables.append(pa.table({name: columns[name] for name in order}))
    return tables


def written(tables: list[pa.Table], folder: Path, draw: Any) -> list[pa.Table]:
    """Write a file for each table; what the files hold, which other writers than pyarrow may have changed."""
    found = []
    for number, table in enumerate(tables):
        file = folder / f"{number}.parquet"
        writer = WRITERS[draw(st.sampled_from(sorted(WRITERS)))]
        try:
            writer(table, file, draw)
            found.append(pq.read_table(file))
            found[-1].validate(full=True)
        except Exception:  # the writer does not know the type, or writes what pyarrow does not read
            pq.write_table(table, file)
            found.append(pq.read_table(file))
    return found


def streamed(tables: list[pa.Table], folder: Path, draw: Any) -> list[pa.Table]:
    for number, table in enumerate(tables):
        with pa.ipc.new_stream(str(folder / f"{number}.arrow"), table.schema) as stream:
            stream.write_table(table, max_chunksize=draw(st.integers(1, 12)))
    return tables


@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize="TABLES" not in os.environ,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(data=st.data())
def test_any_table_comes_back(client: Client, data: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="rowmill-tables-") as home:
        folder = Path(home, "in")
        folder.mkdir()
        write = data.draw(st.sampled_from([written, written, written, streamed]))
        given = write(data.draw(files()), folder, data.draw)
        shard_rows = data.draw(st.sampled_from([4, 100]))
        order = data.draw(st.sampled_from(["input", "input", "prefix"]))
        _check(client, given, Path(home), shard_rows, order, parquet=write is written)


NO_CATEGORY = pa.DictionaryArray.from_arrays(pa.array([0] * 6, pa.uint16()), pa.array([], pa.string()), safe=False)
FOUND: dict[str, Any] = {
    "no category at all below a null struct": pa.array(
        [None], pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))])
    ),
    "no category at all below null lists below a null struct": pa.StructArray.from_arrays(
        [pa.FixedSizeListArray.from_arrays(NO_CATEGORY, 3, mask=pa.array([True, False]))],
        ["a"],
        mask=pa.array([False, True]),
    ),
    "lists of nulls beside what is stored otherwise": pa.array([[None] * 3, [], [None] * 3], pa.large_list(pa.null())),
    "list views of seconds": pa.array([None], pa.list_(pa.list_view(pa.timestamp("s")))),
    "lists of nulls in a struct beside seconds": pa.array(
        [{"a": [None, None], "b": 1}, None], pa.struct([("a", pa.list_(pa.null())), ("b", pa.timestamp("s"))])
    ),
}
"""Columns at which runs of many examples failed. DuckDB's intervals stand in ``tests/inputs/test_several_files``."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(client: Client, tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    column = FOUND[name]
    texts = [f"0 {row}" for row in range(len(column))]
    table = pa.table({"text": texts, "c": column, "d": pa.array([0] * len(column), pa.timestamp("s"))})
    with pa.ipc.new_stream(str(tmp_path / "in/0.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=1)
    _check(client, [table], tmp_path, 100, "input", parquet=False)


@pytest.mark.parametrize("order", ["input", "prefix"])
@pytest.mark.parametrize(
    "other", [pa.nulls(1), pa.array([None], pa.decimal128(7, 2)), None], ids=["null", "decimal", "none"]
)
def test_a_list_view_beside_files_without_a_value(client: Client, tmp_path: Path, other: Any, order: str) -> None:
    (tmp_path / "in").mkdir()
    views = pa.table({"text": ["0 0", "0 1"], "c": pa.array([[[1], None], None], pa.list_view(pa.list_(pa.int8())))})
    given = [views, pa.table({"text": ["1 0"]} | ({} if other is None else {"c": other}))]
    for number, table in enumerate(given):
        pq.write_table(table, tmp_path / f"in/{number}.parquet")
    _check(client, given, tmp_path, 100, order, parquet=True)


def _check(client: Client, given: list[pa.Table], home: Path, shard_rows: int, order: str, *, parquet: bool) -> None:
    folder, out = home / "in", home / "out"
    fields = {"output": str(out), "model": "fake", "task": "generate", "prompt": "{text}", "order": order}
    names = list(dict.fromkeys(name for table in given for name in table.schema.names))
    try:
        status = client.run(input=str(folder), shard_rows=shard_rows, **fields)
    except InvalidInput as error:
        clashing = [name for name in names if len(_kinds(given, name)) > 1 or "list_view" in str(_kinds(given, name))]
        clashing += [name for file in folder.glob("*.parquet") for name in _intervals(file)]
        assert any(repr(name) in error.message for name in clashing), error.message
        assert re.search(r"\d\.(parquet|arrow)", error.message), error.message
        assert not (out / "data").exists()
        return
    assert (status.state, status.rows_failed) == (JobState.COMPLETED, 0)
    parts = sorted((out / "data").glob("*.parquet"))
    result = pa.concat_tables([pq.read_table(part) for part in parts], promote_options="none")
    result.validate(full=True)
    for name in names:
        assert plain(result[name]) == _values(given, name), name
        kinds = _kinds(given, name)
        if len(kinds) == 1 and parquet:
            assert _kind(result[name].type) == _kind(kinds.pop()), name
    if parquet:
        _check_readers(names, given, sorted(folder.iterdir()), parts)


def _values(given: list[pa.Table], name: str) -> list[Any]:
    nothing: list[Any] = []
    for table in given:
        nothing += plain(table[name]) if name in table.schema.names else [None] * table.num_rows
    return nothing


def _kinds(given: list[pa.Table], name: str) -> set[Any]:
    return {table.schema.field(name).type for table in given if name in table.schema.names}


def _intervals(file: Path) -> set[str]:
    """Columns with Parquet's INTERVAL, which pyarrow reads as bytes."""
    schema = pq.ParquetFile(file).schema
    columns = [schema.column(at) for at in range(len(schema))]
    return {column.path.split(".")[0] for column in columns if column.converted_type == "INTERVAL"}


def _kind(kind: Any) -> str:
    """Without what widens where several files or batches have categories of their own."""
    text = str(kind)
    for index in ("int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64"):
        text = text.replace(f"indices={index},", "indices=int32,")
    return text.replace("ordered=1", "ordered=0").replace("element: ", "item: ")


def _check_readers(names: list[str], given: list[pa.Table], files: list[Path], parts: list[Path]) -> None:
    """Each reader finds in the output what it finds in the files, in columns of which they have one type."""
    same = [
        name for name in names if len(_kinds(given, name)) == 1 and all(name in table.schema.names for table in given)
    ]
    for reader, read in READERS.items():
        try:
            before = [read(file).select(same) for file in files]
            wanted = {name: [value for table in before for value in plain(table[name])] for name in same}
        except Exception:  # this reader does not know one of the types
            continue
        after = [read(part).select(same) for part in parts]
        for name in same:
            found = [value for table in after for value in plain(table[name])]
            assert _raw(found) == _raw(wanted[name]), (reader, name, _kinds(given, name))


def _raw(value: Any) -> Any:
    """Text as bytes: a file without Arrow's schema does not tell every reader which bytes are text."""
    if isinstance(value, (list, tuple)):
        return [_raw(item) for item in value]
    if isinstance(value, dict):
        return {name: _raw(item) for name, item in value.items()}
    return value.encode() if isinstance(value, str) else value
