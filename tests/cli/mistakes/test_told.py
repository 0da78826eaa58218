"""Whatever is given to Rowmill ends in a result, or in a message and a documented exit code: never as a defect.

Settings, URLs, job specifications and files are made up. Nothing here goes beyond the loopback address.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.config.settings import Settings, load_settings
from pipeline.engines.generation import json_schema
from pipeline.schedules.spec import parse_schedule
from pipeline.spec.job_spec import JobSpec, parse
from pipeline.spec.json_text import MAX_DEPTH
from storage.broker import Wakeups
from storage.errors import InvalidJob, InvalidSettings, RowmillError
from storage.objects.errors import STORES, WRAPPERS
from storage.objects.store import ObjectStore
from storage.sql.database import Database
from tests.cli.conftest import Rowmill
from tests.cli.mistakes.told import EMBED, deep, told
from tests.examples import examples

JOB = {"input": "in.parquet", "output": "out", "model": "fake", "task": "generate", "prompt": "{text}"}
in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**18, max_value=10**320)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=12)
    | st.sampled_from(
        ["\ud800", "a\0b", "s3://", "s3://AK:SECRET@b", "dir://x", "~nobody/x", "{", "{}", "{text}", "1" * 400]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


# -- specifications --------------------------------------------------------------------------------------------------


@given(field=st.sampled_from(sorted(JobSpec.model_fields)), value=anything)
@example(field="metadata", value={"a\ud800": "b"})
@example(field="input", value="na\udcffme.parquet")
@settings(max_examples=examples(400))
def test_a_field_of_a_job(field: str, value: Any) -> None:
    with contextlib.suppress(InvalidJob):
        json.dumps(parse({**JOB, field: value}).model_dump(mode="json")).encode()


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 900, 5_000])
@pytest.mark.parametrize("field", ["engine_options", "sampling", "metadata", "chat_template_kwargs", "tools", "input"])
def test_a_field_of_a_job_that_is_nested_deeply(field: str, levels: int) -> None:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    with pytest.raises(InvalidJob, match=rf"{field}.*: (nested more than {MAX_DEPTH} levels deep|Input should be)"):
        parse({**JOB, field: [value] if field == "tools" else value})


@given(
    field=st.sampled_from(["name", "cron", "tz", "overlap", "misfire", "misfire_grace", "incremental", "job"]),
    value=anything,
)
@settings(max_examples=examples(200))
def test_a_field_of_a_schedule(field: str, value: Any) -> None:
    with contextlib.suppress(InvalidJob):
        parse_schedule({"name": "x", "cron": "0 0 * * *", "job": JOB, field: value})


@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
@example(deep(50_000).encode())
@example(b'{"input": ' + deep(50_000, "dict").encode() + b"}")
@example(b'{"engine_options": ' + deep(300, "dict").encode() + b"}")
@example(b"\xef\xbb\xbf{}")
@example(b'{"priority": ' + b"9" * 5000 + b"}")
@settings(parent=in_a_folder, max_examples=examples(40))
def test_a_file_with_a_job(rowmill: Rowmill, content: bytes) -> None:
    for name in ("job.json", "job.toml"):
        (rowmill.home / name).write_bytes(content)
        done = told(rowmill.inside("run", "--spec", name), 2, home=rowmill.home)
        assert name in done.err or "missing" in done.err or ":" in done.err


@pytest.mark.parametrize("text", [deep(50_000), deep(300, "dict")])
@pytest.mark.parametrize("option", ["--set", "--sampling"])
def test_a_value_on_the_command_line(rowmill: Rowmill, option: str, text: str) -> None:
    words = ("run", "in.parquet", "-o", "out", "-m", "fake", "-t", "generate", "-p", "{text}")
    assert f"{MAX_DEPTH} levels" in told(rowmill.inside(*words, option, f"a={text}"), 2, home=rowmill.home).err


def test_a_schema_that_is_nested_deeply() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    for given_as in (schema, json.dumps(schema)):
        with pytest.raises(InvalidJob, match=rf"nested more than {MAX_DEPTH} levels"):
            json_schema.parsed(given_as, "sampling.structured_outputs.json")
        with pytest.raises(InvalidJob):
            parse({**JOB, "sampling": {"structured_outputs": {"json": schema}}})


@pytest.mark.parametrize("words", [("job", "show"), ("run", "--data-dir"), ("config", "show", "--setting")])
def test_arguments_that_are_not_utf8(rowmill: Rowmill, words: tuple[str, ...]) -> None:
    assert "\\udcff" in told(rowmill.inside(*words, "slots=na\udcffme"), 2, home=rowmill.home).err


# -- settings --------------------------------------------------------------------------------------------------------


@given(name=st.sampled_from(sorted(Settings.model_fields)), value=anything)
@example(name="storage_options", value={"s3": "s3cr3tPW"})
@example(name="data_dir", value="~nobody-here/x")
@settings(max_examples=examples(300))
def test_a_setting(name: str, value: Any) -> None:
    try:
        load_settings({name: value})
    except InvalidSettings as error:
        assert "s3cr3tPW" not in str(error)


@given(
    name=st.sampled_from(sorted(Settings.model_fields)),
    text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
)
@example(name="storage_options", text=deep(50_000, "dict"))
@example(name="storage_options", text=f'{{"s3": {deep(300, "dict")}}}')
@example(name="storage_options__s3__x", text=deep(50_000))
@example(name="storage_options__" + "__".join("a" * 400), text="1")
@example(name="data_dir", text="na\udcffme")
@settings(parent=in_a_folder, max_examples=examples(150))
def test_a_variable(rowmill: Rowmill, name: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"ROWMILL_{name.upper()}", text)
        with contextlib.suppress(InvalidSettings):
            load_settings()


@given(st.binary(max_size=80))
@example(b"a = " + b"[" * 50_000)
@example(b"storage_options." + b".".join([b"a"] * 5000) + b" = 1")
@settings(parent=in_a_folder, max_examples=examples(60))
def test_a_settings_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROWMILL_CONFIG", str(tmp_path / "x.toml"))
        with contextlib.suppress(InvalidSettings):
            load_settings()


def test_a_setting_that_is_nested_deeply(rowmill: Rowmill) -> None:
    dotted = "storage_options." + ".".join(["a"] * 5000)
    told(rowmill.inside("config", "show", "--setting", f"{dotted}=1"), 2, home=rowmill.home)


def test_the_secrets_in_use_are_hidden_wherever_they_occur(rowmill: Rowmill) -> None:
    more = {
        "AWS_SECRET_ACCESS_KEY": "s3cr3tPW+1",
        "ROWMILL_DATABASE_URL": f"sqlite:///{rowmill.home}/x.db",
        "ROWMILL_STORAGE_OPTIONS": '{"s3": {"client_kwargs": {"token": "s3cr3tPW+2"}}}',
    }
    rowmill.environment.update(more)
    for secret in ("s3cr3tPW+1", "s3cr3tPW+2"):
        done = told(rowmill.inside("job", "show", f"x{secret}x", "--json"), 6, home=rowmill.home)
        assert secret not in done.out + done.err
        assert "x***x" in done.out
        assert "x***x" in done.err


@pytest.mark.parametrize("words", [("run",), ("job", "submit"), ("job", "estimate")])
@pytest.mark.parametrize("url", ["s3://AK:s3cr3tPW@b/x.parquet", "https://h/x.parquet?sig=s3cr3tPW"])
def test_a_job_with_credentials_is_refused_and_not_stored(rowmill: Rowmill, words: tuple[str, ...], url: str) -> None:
    done = told(rowmill.inside(*words, url, "-o", "out", *EMBED, "--json"), 2, home=rowmill.home)
    assert "storage_options" in done.err
    assert "s3cr3tPW" not in done.out + done.err
    assert rowmill.inside("job", "list", "--json").document["jobs"] == []


# -- URLs ------------------------------------------------------------------------------------------------------------

users = st.sampled_from(["", "u@", "u:p@", ":p@", "u:p@x@", "u:p/q@", "u:%00@", "u:é@"])
hosts = st.sampled_from(
    ["", "127.0.0.1", "[::1]", "[::1", "127.0.0.1,127.0.0.2", "a b", "..", "x" * 70, "%00", "127.0.0.1%41", "\t"]
)
ports = st.sampled_from(["", ":9", ":99x", ":0", ":-1", ":99999", ":", ":9:9"])
paths = st.sampled_from(["", "/", "/0", "/x", "/a/b", "/%00", "/:memory:", "/99999", "/é"])
queries = st.sampled_from([
    "", "?", "?password=x", "?x=1&x=2", "?options=-c%20a=b", "?sslmode=bogus", "?ssl_cert_reqs=bogus", "#x",
    "?host=/x&host=y:z", "?client_encoding=bogus", "?connect_timeout=x", "?mode=memory&uri=true", "?virtual_host=1",
    "?ssl_ca_certs=/nowhere",
])  # fmt: skip


def urls(*schemes: str) -> st.SearchStrategy[str]:
    ends = st.sampled_from(["://", ":/", ":", ""])
    return st.builds(
        lambda *parts: "".join(parts),
        st.sampled_from(schemes),
        ends | st.just("://"),
        users,
        hosts,
        ports,
        paths,
        queries,
    )


databases = urls(
    "postgresql", "postgresql+psycopg", "postgresql+psycopg2", "postgresql+asyncpg", "postgresql+os.path", "postgres",
    "sqlite", "sqlite+aiosqlite", "mysql", "mssql+pyodbc", "oracle", "nonsense", "", "a.b", "x y",
)  # fmt: skip
brokers = urls(
    "redis", "rediss", "redis+socket", "sentinel", "amqp", "amqps", "pyamqp", "memory", "filesystem", "sqla+sqlite",
    "sqs", "kafka", "bogus", "", "os.path", "x y", "redis://127.0.0.1:9;redis",
)  # fmt: skip


@given(databases)
@example("postgresql://u:p@127.0.0.1:9/db?client_encoding=bogus")
@example("postgresql://u:p@127.0.0.1:9/db?sslmode=bogus")
@example("postgresql://a..b/db")
@example("postgresql:///db?host=127.0.0.1," + "x" * 70)
@example("sqlite:////dev/null")
@settings(parent=in_a_folder, max_examples=examples(200))
def test_a_database_url(tmp_path: Path, url: str) -> None:
    with contextlib.chdir(tmp_path), contextlib.suppress(RowmillError):
        database = Database(Settings(database_url=url, data_dir=tmp_path).effective_database_url)
        try:
            database.revision()
        finally:
            database.close()


@given(brokers)
@example("redis://127.0.0.1:9/0")
@example("amqp://u:p@127.0.0.1:9//")
@settings(max_examples=examples(150))
def test_a_broker_url(url: str) -> None:
    with contextlib.suppress(RowmillError):
        wakeups = Wakeups(Settings(broker_url=url).broker_url)
        with contextlib.suppress(RowmillError):
            wakeups.check()
        wakeups.plan()  # whatever the broker is like, what is stored is not lost by it


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("ROWMILL_DATABASE_URL", "postgresql+psycopg2://u:s3cr3tPW@h/db"),
        ("ROWMILL_DATABASE_URL", "postgresql:/u:s3cr3tPW@h/db"),
        ("ROWMILL_BROKER_URL", "sentinel://:s3cr3tPW@127.0.0.1:9"),
        ("ROWMILL_BROKER_URL", "redis://127.0.0.1:9/0?password=s3cr3tPW"),
    ],
)
def test_a_wrong_url_is_refused_before_a_job_is_stored(rowmill: Rowmill, variable: str, url: str) -> None:
    rowmill.environment[variable] = url
    pq.write_table(pa.table({"text": ["a"]}), rowmill.home / "in.parquet")
    done = told(rowmill.inside("job", "submit", "in.parquet", "-o", "out", *EMBED), 2, home=rowmill.home)
    assert variable in done.err
    assert "s3cr3tPW" not in done.out + done.err
    del rowmill.environment[variable]
    assert rowmill.inside("job", "list", "--json").document["jobs"] == []


@pytest.mark.parametrize(
    "name",
    sorted(
        {*fsspec.available_protocols(), "nonsense", "x.y", "S3X"} - STORES - {"local", "arrow_hdfs", "async_wrapper"}
    ),
)
def test_a_file_system_that_is_not_opened(name: str) -> None:
    with pytest.raises(InvalidJob, match="is not opened"):
        ObjectStore().find(f"{name}://127.0.0.1:9/x")


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_no_file_system_that_reaches_through_to_others_is_opened(name: str) -> None:
    with pytest.raises(InvalidJob, match="reach through"):
        ObjectStore({name: {"fs": None}}).find(f"{name}://x")


@pytest.mark.parametrize(
    "url",
    ["ftp://127.0.0.1:9/x", "webhdfs://127.0.0.1:9/x", "hdfs://127.0.0.1:9/x", "hf://datasets/x/y", "github://a:b@c/x"],
)
def test_a_file_system_that_the_operator_asked_for_says_what_is_wrong(url: str) -> None:
    store = ObjectStore({url.partition(":")[0]: {}}, retry_seconds=0)
    with pytest.raises(RowmillError):
        store.find(url)


@pytest.mark.parametrize(
    "options",
    [
        {"nonsense": 1},
        {"key": 5, "secret": []},
        {"config_kwargs": "x"},
        {"client_kwargs": {"x": 1}},
        {"endpoint_url": 7},
    ],
)
def test_options_that_a_store_does_not_take(options: dict[str, Any]) -> None:
    with pytest.raises(RowmillError):
        ObjectStore({"s3": options}, retry_seconds=0).find("s3://bucket/x")


@given(
    scheme=st.sampled_from(["http", "https", "s3", "gs", "az", "abfs"]), rest=st.text("ab/:@[]%?#*\\ é", max_size=12)
)
@settings(max_examples=examples(100))
def test_a_url_without_a_place(scheme: str, rest: str) -> None:
    options = {"s3": {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}}
    store = ObjectStore(options, retry_seconds=0)
    if scheme in ("http", "https"):
        rest = f"127.0.0.1:9{rest}" if not rest or rest[0] in "/:" else f"[{rest}"
    elif scheme != "s3":
        rest = "[" + rest
    with contextlib.suppress(RowmillError):
        store.find(f"{scheme}://{rest}")
