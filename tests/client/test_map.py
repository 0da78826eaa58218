"""``client.map``: a data frame in, a table with its columns and the results out, by a job that can be resumed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline import Client
from pipeline.client import frames
from pipeline.config.settings import Settings
from storage.errors import InvalidInput, InvalidJob, InvalidModel, InvalidSettings
from storage.objects.store import ObjectStore
from storage.states import AttemptState, JobState
from tests.client.scripts import BEFORE, ROWS, Place
from tests.examples import examples

N = 300
GENERATE: dict[str, Any] = {"model": "fake", "task": "generate", "prompt": "{text}"}
TABLE = pa.table({"id": range(N), "text": [f"text {n}" if n % 50 else None for n in range(N)]})


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings) as client:
        yield client


class Stream:
    """Nothing but the protocol."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return TABLE.__arrow_c_stream__(requested_schema)


class Array:
    """Nothing but the other one."""

    def __arrow_c_array__(self, requested_schema: object = None) -> object:
        return TABLE.combine_chunks().to_batches()[0].__arrow_c_array__(requested_schema)


def dataset(folder: Path) -> ds.Dataset:
    pq.write_table(TABLE, folder / "texts.parquet", row_group_size=70)
    return ds.dataset(folder / "texts.parquet")


KINDS: dict[str, Callable[[Path], object]] = {
    "table": lambda folder: TABLE,
    "chunked table": lambda folder: pa.concat_tables([TABLE.slice(0, 7), TABLE.slice(7, 200), TABLE.slice(207)]),
    "record batch": lambda folder: TABLE.combine_chunks().to_batches()[0],
    "reader": lambda folder: TABLE.to_reader(max_chunksize=11),
    "dataset": dataset,
    "scanner": lambda folder: dataset(folder).scanner(),
    "pandas": lambda folder: TABLE.to_pandas(),
    "polars": lambda folder: pl.from_arrow(TABLE),
    "duckdb": lambda folder: duckdb.from_arrow(TABLE),
    "stream": lambda folder: Stream(),
    "array": lambda folder: Array(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_library(client: Client, tmp_path: Path, kind: str) -> None:
    found = client.map(KINDS[kind](tmp_path), **GENERATE)
    assert isinstance(found, pa.Table)
    assert found.schema.names[:3] == ["id", "text", "output"]
    assert found.column("id").to_pylist() == list(range(N))
    assert found.column("text").to_pylist() == TABLE.column("text").to_pylist()
    failed = [n for n, error in enumerate(found.column("error").to_pylist()) if error]
    assert failed == list(range(0, N, 50))
    assert all(str(out).endswith(f"text {n}") for n, out in enumerate(found.column("output").to_pylist()) if n % 50)


def test_the_same_call_again_returns_what_is_there(client: Client, tmp_path: Path) -> None:
    rows_file = tmp_path / "rows"
    fields = GENERATE | {"engine_options": {"rows_file": str(rows_file)}}
    first = client.map(KINDS["table"](tmp_path), **fields)
    computed = rows_file.stat().st_size
    assert client.map(KINDS["chunked table"](tmp_path), **fields).equals(first)
    assert rows_file.stat().st_size == computed
    assert len(client.jobs()) == 1
    other = client.map(TABLE, **fields | {"prompt": "Other: {text}"})
    assert not other.equals(first)
    assert len(client.jobs()) == 2
    client.map(TABLE.slice(1), **fields)
    assert len(client.jobs()) == 3


def test_the_index_of_a_pandas_frame_comes_back(client: Client) -> None:
    texts = ["b", "a", "c"]
    for index in (None, pd.Index([5, 7, 7], name="key"), pd.Index(["x", "y", "z"]), pd.RangeIndex(10, 40, 10)):
        frame = pd.DataFrame({"text": texts}, index=index)
        found = client.map(frame, **GENERATE).to_pandas()
        pd.testing.assert_index_equal(found.index, frame.index)
        assert list(found["text"]) == texts
        assert list(found.columns[:2]) == ["text", "output"]
    dropped = client.map(frame, keep_columns=[], **GENERATE)
    assert dropped.schema.names[0] == "output"


def test_types_stay_what_they_are(client: Client) -> None:
    frame = pl.DataFrame(
        {
            "text": ["u", "v", None],
            "category": pl.Series(["p", "q", "p"], dtype=pl.Categorical),
            "list": [["a"], [], None],
            "struct": [{"x": "1", "y": [2]}, None, {"x": None, "y": []}],
            "bytes": [b"\0", None, b""],
            "time": pl.Series([0, 1, None]).cast(pl.Datetime("us", "UTC")),
        }
    )
    found = client.map(frame, **GENERATE)
    assert pa.types.is_dictionary(found.schema.field("category").type)
    back = pl.DataFrame(pl.from_arrow(found.select(frame.columns)))
    assert back.to_dicts() == frame.to_dicts()


def test_frames_without_rows(client: Client) -> None:
    found = client.map(TABLE.slice(0, 0), **GENERATE)
    assert found.num_rows == 0
    assert found.schema.names[:3] == ["id", "text", "output"]
    assert found.schema.names[-1] == "error"


def test_a_reader_that_was_read_before_is_no_silent_table_without_rows(client: Client) -> None:
    reader = TABLE.to_reader()
    reader.read_all()
    with pytest.warns(UserWarning, match="gave no rows; it can be read only once"):
        assert client.map(reader, **GENERATE).num_rows == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pl.DataFrame(), "no columns"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "Duplicate column names"),
        (pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), "'text' belongs to 2 columns"),
        (pl.LazyFrame({"text": ["a"]}), r"collect\(\) it"),
        (pl.Series("text", ["a"]), "it is one column, a Series"),
        (pd.Series(["a"], name="text"), "it is one column, a Series"),
        (pa.chunked_array([["a"]]), "it is one column, a ChunkedArray"),
        (pa.Table, "it is the class Table"),
        (({"text": word} for word in "ab"), "it is a generator"),
        (
            pa.RecordBatchReader.from_batches(pa.schema([("text", pa.string())]), (1 / 0 for _ in "a")),
            r"division by zero\b[^\n]*$",
        ),
        ({"text": ["a"]}, "it is a dict; it takes a pandas"),
        (None, "it is a NoneType"),
        (pa.table({"text": ["a"], "when": pa.array([None], pa.month_day_nano_interval())}), "column 'when' is month"),
        (pd.DataFrame({"text": ["a"], "thing": [object()]}), "cannot be read"),
    ],
)
def test_what_is_no_table_of_ours_is_refused(client: Client, data: object, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as raised:
        client.map(data, **GENERATE)
    assert raised.value.field == "data"
    assert client.jobs() == []


def test_fields_are_checked_before_any_row_is_read(client: Client, settings: Settings) -> None:
    reader = TABLE.to_reader()
    for name in ("input", "output", "overwrite", "idempotency_key"):
        with pytest.raises(InvalidJob, match=f"{name}: map"):
            client.map(reader, **GENERATE | {name: "x"})
    with pytest.raises(InvalidJob, match="nonsense"):
        client.map(reader, nonsense=1, **GENERATE)
    with pytest.raises(InvalidModel):
        client.map(reader, **GENERATE | {"model": "no/such/model"})
    fleet = settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    with Client(settings=fleet) as other, pytest.raises(InvalidSettings, match="map_dir"):
        other.map(reader, **GENERATE)
    assert reader.read_all().num_rows == N
    with pytest.raises(InvalidInput, match="no column"):
        client.map(TABLE, **GENERATE | {"prompt": "{nothing}"})


def test_a_stream_that_breaks_leaves_nothing(client: Client, settings: Settings) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield TABLE.to_batches()[0]
        raise ZeroDivisionError("mine")

    with pytest.raises(InvalidInput, match="mine"):
        client.map(pa.RecordBatchReader.from_batches(TABLE.schema, batches()), **GENERATE)
    assert [path for path in (settings.data_dir / "map").rglob("*") if path.is_file()] == []


def test_a_killed_call_goes_on(settings: Settings, tmp_path: Path) -> None:
    place = Place(tmp_path)
    call = (
        "import pyarrow.parquet as pq\n[FIELDS.pop(name) for name in ('input', 'output')]\n"
        "{end}\ntable = client().map(pq.read_table(INPUT), progress=True, **FIELDS)\nprint(table.num_rows)"
    )
    call = call.replace("INPUT", repr(place.values["input"]))
    killed = place.run(call.format(end="kill_later(signal.SIGTERM)"))
    assert killed.returncode == -15, killed.stderr
    assert place.computed() == BEFORE
    with Client(settings=settings.model_copy(update={"data_dir": place.data_dir})) as client:
        (status,) = client.jobs()
        assert (status.interrupted, status.rows_done) == (True, BEFORE)
    place.gate.touch()
    done = place.run(call.format(end=""))
    assert (done.returncode, done.stdout.strip()) == (0, str(ROWS)), done.stderr
    assert place.computed() == ROWS, "no flushed row is computed again"
    with Client(settings=settings.model_copy(update={"data_dir": place.data_dir})) as client:
        (status,) = client.jobs()
        states = [attempt.state for attempt in client.job(status.id).attempts()]
        assert states == [AttemptState.RELEASED, AttemptState.SUCCEEDED]


def test_a_cancelled_or_failed_job_goes_on(client: Client, tmp_path: Path) -> None:
    fields = GENERATE | {"max_failed_rows": 1}
    with pytest.raises(Exception, match="max_failed_rows"):
        client.map(TABLE, **fields)
    (status,) = client.jobs()
    assert status.state is JobState.FAILED
    with pytest.raises(Exception, match="max_failed_rows"):
        client.map(TABLE, **fields)
    assert [item.id for item in client.jobs()] == [status.id]


def test_what_nobody_uses_any_more_is_deleted(client: Client, settings: Settings, tmp_path: Path) -> None:
    client.map(TABLE, **GENERATE)
    client.map(TABLE.slice(1), **GENERATE)
    folders = {path.parent for path in (settings.data_dir / "map").glob("*/used-*")}
    assert len(folders) == 2
    (newest, older) = (client.jobs()[0].output, client.jobs()[1].output)
    stale = next(folder for folder in folders if older.startswith(str(folder)))
    (marker,) = stale.glob("used-*")
    marker.rename(stale / f"used-{int(time.time()) - 8 * 86_400}")
    (settings.data_dir / "map" / "new-1-abandoned.parquet").touch()
    client.map(TABLE.slice(1), **GENERATE)
    assert not stale.exists()
    assert [status.output for status in client.jobs()] == [newest]
    assert not list((settings.data_dir / "map").glob("new-*"))
    assert client.map(TABLE, **GENERATE).num_rows == N


@given(cuts=st.lists(st.integers(0, 700), max_size=6), seed=st.integers(0, 3))
@hypothesis_settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_rows_are_the_same_file(tmp_path: Path, cuts: list[int], seed: int) -> None:
    """However they are cut into batches, and whatever dictionaries the batches have."""
    values = [None if (n + seed) % 13 == 0 else f"value {(n * 7) % (5 + seed)}" for n in range(700)]
    plain = pa.table({"a": range(700), "b": values, "c": [[v, v] if v else None for v in values]})
    bounds = sorted({0, 700, *cuts})
    pieces = [plain.slice(low, high - low) for low, high in itertools.pairwise(bounds)]
    encoded = [piece.append_column("d", piece.column("b").combine_chunks().dictionary_encode()) for piece in pieces]
    whole = plain.append_column("d", plain.column("b").combine_chunks().dictionary_encode())
    store = ObjectStore({})
    one = frames.write(store, str(tmp_path / "one.parquet"), frames.reader_of(whole))
    other = frames.write(store, str(tmp_path / "other.parquet"), frames.reader_of(pa.concat_tables(encoded)))
    assert one.sha256 == other.sha256
    assert pq.read_table(tmp_path / "one.parquet").select(["a", "b", "c"]).equals(plain)
