"""Settings: which source wins, which source is named, and what is hidden."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.settings import Origin, Settings, load_settings
from storage.errors import InvalidSettings
from storage.redaction import redact, redact_text


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "config" / "rowmill" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def project_file(tmp_path: Path, user_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project" / "rowmill.toml"


def origin(name: str, **given: object) -> Origin:
    loaded = load_settings(given, dict.fromkeys(given, "--setting"))
    return next(item for item in loaded.origins if item.name == name)


def test_the_stronger_source_wins_and_is_named(
    project_file: Path, user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert origin("flush_rows") == Origin("flush_rows", 8192, "default", "default")
    user_file.write_text("flush_rows = 1\n")
    assert origin("flush_rows") == Origin("flush_rows", 1, "user", str(user_file))
    project_file.write_text("flush_rows = 2\n")
    assert origin("flush_rows") == Origin("flush_rows", 2, "project", str(project_file))
    monkeypatch.setenv("ROWMILL_FLUSH_ROWS", "3")
    assert origin("flush_rows") == Origin("flush_rows", 3, "env", "ROWMILL_FLUSH_ROWS")
    assert origin("flush_rows", flush_rows="4") == Origin("flush_rows", 4, "flag", "--setting")
    assert Settings().flush_rows == 3


def test_rowmill_config_names_another_project_file(project_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project_file.write_text("flush_rows = 2\n")
    other = project_file.parent / "other.toml"
    other.write_text("flush_rows = 5\n")
    monkeypatch.setenv("ROWMILL_CONFIG", str(other))
    assert origin("flush_rows").value == 5
    monkeypatch.setenv("ROWMILL_CONFIG", "nowhere.toml")
    with pytest.raises(InvalidSettings, match=r"nowhere\.toml.*ROWMILL_CONFIG"):
        Settings()


def test_storage_options_merge_leaf_by_leaf(project_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project_file.write_text('[storage_options.s3]\nendpoint_url = "http://h"\nsecret = "from file"\n')
    monkeypatch.setenv("ROWMILL_STORAGE_OPTIONS__S3__SECRET", "0123")
    monkeypatch.setenv("ROWMILL_STORAGE_OPTIONS__S3__ANON", "False")
    monkeypatch.setenv("ROWMILL_STORAGE_OPTIONS__S3__CONFIG_KWARGS", '{"retries": 3}')
    assert Settings().storage_options == {
        "s3": {"endpoint_url": "http://h", "secret": "0123", "anon": False, "config_kwargs": {"retries": 3}}
    }
    assert origin("storage_options.s3.endpoint_url").source == str(project_file)
    assert origin("storage_options.s3.secret").source == "ROWMILL_STORAGE_OPTIONS__S3__SECRET"


def test_storage_options_as_one_json_variable(project_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWMILL_STORAGE_OPTIONS", '{"s3": {"anon": true}}')
    assert Settings().storage_options == {"s3": {"anon": True}}
    assert origin("storage_options.s3.anon").source == "ROWMILL_STORAGE_OPTIONS"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ROWMILL_LEASE_SECONDS", "-1", ("lease_seconds", "greater than 0", "'-1'", "ROWMILL_LEASE_SECONDS")),
        ("ROWMILL_FLUSH_ROWS", "many", ("flush_rows", "integer", "'many'", "ROWMILL_FLUSH_ROWS")),
        ("ROWMILL_STORAGE_OPTIONS", "{", ("storage_options", "not valid JSON", "ROWMILL_STORAGE_OPTIONS")),
        ("ROWMILL_LOG_LEVEL", "loud", ("log_level", "'debug'", "'loud'", "ROWMILL_LOG_LEVEL")),
    ],
)
def test_a_bad_variable_is_named(
    project_file: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidSettings) as caught:
        Settings()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flush_row = 1\n", ("'flush_row'", "did you mean 'flush_rows'")),
        ("flush_rows = 'x'\n", ("flush_rows", "integer")),
        ("flush_rows = \n", ("not valid TOML", "line 1")),
    ],
)
def test_a_bad_file_is_named(project_file: Path, text: str, words: tuple[str, ...]) -> None:
    project_file.write_text(text)
    with pytest.raises(InvalidSettings) as caught:
        Settings()
    for word in (*words, str(project_file)):
        assert word in str(caught.value)


def test_a_bad_flag_is_named_even_over_a_good_variable(project_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWMILL_MAX_LOSSES", "3")
    with pytest.raises(InvalidSettings, match=r"max_losses.*'none'.*--setting"):
        load_settings({"max_losses": "none"}, {"max_losses": "--setting"})
    with pytest.raises(InvalidSettings, match="did you mean 'max_losses'"):
        load_settings({"max_loses": "1"}, {"max_loses": "--setting"})


def test_an_empty_variable_says_nothing_and_an_unknown_one_is_warned_of(
    project_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWMILL_DATABASE_URL", "")
    monkeypatch.setenv("ROWMILL_DATABASE_URI", "x")
    loaded = load_settings()
    assert loaded.settings.database_url is None
    assert loaded.warnings == (
        "ROWMILL_DATABASE_URI is set, but there is no such setting; did you mean ROWMILL_DATABASE_URL?",
    )


def test_home_is_expanded_and_levels_may_be_upper_case(project_file: Path) -> None:
    project_file.write_text('data_dir = "~/x"\nlog_level = "INFO"\n')
    assert Settings().data_dir == Path.home() / "x"
    assert Settings().effective_database_url == f"sqlite:///{Path.home() / 'x' / 'rowmill.db'}"
    assert Settings().log_level == "info"


def test_secrets_do_not_show_in_the_repr(project_file: Path) -> None:
    shown = repr(Settings(database_url="postgresql://u:hunter2@h/d", storage_options={"s3": {"secret": "hunter2"}}))
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("value", "name", "shown"),
    [
        ("postgresql://u:p@ss@h/d", "", "postgresql://u:***@h/d"),
        ("redis://:pw@h:6379/0", "", "redis://:***@h:6379/0"),
        ("postgresql://u@h/d?password=pw&sslmode=require", "", "postgresql://u@h/d?password=***&sslmode=require"),
        ("sqlite:////data/rowmill.db", "", "sqlite:////data/rowmill.db"),
        (
            {"key": "AK", "endpoint_url": "http://h", "anon": False},
            "",
            {"key": "***", "endpoint_url": "http://h", "anon": False},
        ),
        ({"client_kwargs": {"aws_session_token": "t"}}, "", {"client_kwargs": {"aws_session_token": "***"}}),
        ({"token": {"private": "x"}}, "", {"token": "***"}),
        ({"token": None, "use_auth": True}, "", {"token": None, "use_auth": True}),
        ("AK", "account_key", "***"),
        (["http://u:p@h"], "", ["http://u:***@h"]),
    ],
)
def test_redaction(value: object, name: str, shown: object) -> None:
    assert redact(value, name) == shown


def test_redaction_of_text() -> None:
    assert redact_text("cannot reach 'amqp://u:pw@h//' now") == "cannot reach 'amqp://u:***@h//' now"
