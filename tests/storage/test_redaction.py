"""What is hidden, what stays, and that neither takes long."""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.spec.job_spec import parse
from storage import errors, logs, redaction
from storage.redaction import holds_credentials, redact_text, redact_url, remember, secrets_of_url

SECRET = "s3cr3tPW"
SCHEMES = ("postgresql", "redis", "amqp", "s3", "https", "postgresql+psycopg")
SECRETS = st.text(string.ascii_letters + string.digits + "!$*+,-._~/%@:", min_size=6, max_size=20).map(
    lambda text: f"Zq7{text}7qZ"
)


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(redaction, "_known", {})
    monkeypatch.setattr(redaction, "_pattern", None)
    yield


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql:/u:s3cr3tPW@h/db", "postgresql:/u:***@h/db"),
        ("postgresql//u:s3cr3tPW@h/db", "postgresql//u:***@h/db"),
        ("u:s3cr3tPW@h/db", "u:***@h/db"),
        ("postgresql://u:s3c:r3t/P@W@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u@h/db?options=-c%20password=s3cr3tPW", "postgresql://u@h/db?options=-c%20password=***"),
        ("cannot read s3://AK:s3cr3tPW@b/x.parquet: no", "cannot read s3://AK:***@b/x.parquet: no"),
        ("s3://b/a,postgresql://u:s3cr3tPW@h", "s3://b/a,postgresql://u:***@h"),
        ("amqp://a:s3cr3tPW@h;amqp://b:s3cr3tPW@i", "amqp://a:***@h;amqp://b:***@i"),
        ("https://s3cr3tPW@github.com/x", "https://***@github.com/x"),
        ("https://a.blob/c/x?sv=1&sig=s3cr3tPW%3D&se=2", "https://a.blob/c/x?sv=1&sig=***&se=2"),
        ("host=h password=s3cr3tPW user=u", "host=h password=*** user=u"),
        ("AWS_SECRET_ACCESS_KEY=s3cr3tPW", "AWS_SECRET_ACCESS_KEY=***"),
        ("AccountName=a;AccountKey=s3cr3tPW==;x", "AccountName=a;AccountKey=***;x"),
        ("{'secret': 's3cr3t PW', 'key': 1}", "{'secret': '***', 'key': 1}"),
        ('{"session_token": "s3cr3tPW"}', '{"session_token": "***"}'),
        ("Authorization: Bearer s3cr3tPWs3cr3tPW", "Authorization: Bearer ***"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "--sampling max_tokens=3, tokenizer=mine: no such option",
        "s3://bucket/a:b@c.parquet",
        "abfs://container@account.dfs.core.windows.net/x",
        "http://127.0.0.1:9000/bucket/x?versionId=3",
        "at 12:30:11 shard 7 of job 01a2 failed",
        "postgresql://USER:PASSWORD@HOST:5432/DATABASE",
        "password authentication failed for user 'u'",
        "sqlite:////data/rowmill.db",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text


@given(scheme=st.sampled_from(SCHEMES), user=st.text(string.ascii_lowercase, max_size=8), secret=SECRETS)
@example(scheme="postgresql", user="u", secret="Zq7a://b@c7qZ")
def test_no_password_of_a_url_is_shown(scheme: str, user: str, secret: str) -> None:
    for url in (f"{scheme}://{user}:{secret}@host:1/x", f"{scheme}:/{user}:{secret}@host/x"):
        # Of a password with '://' in it, as of any other, nothing that tells it may be left.
        for shown in (redact_url(url), redact_text(f"the URL '{url}' is wrong")):
            assert secret not in shown
            assert "Zq7" not in shown
            assert "7qZ" not in shown


@given(st.text(max_size=200))
def test_redacting_twice_changes_nothing(text: str) -> None:
    assert redact_text(redact_text(text)) == redact_text(text)


@given(st.text(string.ascii_letters + string.digits + " .,-_()", max_size=200))
def test_ordinary_words_stay(text: str) -> None:
    if not any(word in text.lower() for word in ("bearer", "basic")):
        assert redact_text(text) == text


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "a:",
        "a@",
        "://",
        "a://",
        "a:b@",
        "a://b:c@d",
        "?key=",
        "&sig=",
        "password= ",
        "'password': '",
        "bearer ",
        "'",
    ],
)
def test_a_megabyte_of_anything_is_looked_through(piece: str) -> None:
    """Quadratic time would take hours for each: the suite's own time limit would end it."""
    text = piece * (1_000_000 // len(piece))
    assert len(redact_text(text)) <= 4 * len(text)


def test_known_secrets_are_hidden_everywhere_in_every_form() -> None:
    remember(['p%40ss/w"rd'], shown="postgresql://u:***@h/db")
    for text in ('p%40ss/w"rd', 'p@ss/w"rd', json.dumps({"x": 'p@ss/w"rd'})):
        assert redact_text(f"the server said {text}.") == f"the server said {text}.".replace(
            text, text.replace('p%40ss/w"rd', "***").replace('p@ss/w"rd', "***").replace('p@ss/w\\"rd', "***")
        )


def test_what_anybody_could_guess_damages_no_message() -> None:
    remember(["rowmill", "x"], shown="postgresql://rowmill:***@h/rowmill")
    assert redact_text("run 'rowmill db upgrade', exit x") == "run 'rowmill db upgrade', exit x"
    remember(["a1b2"])
    assert redact_text("a1b2 is hidden, xa1b2x is another word") == "*** is hidden, xa1b2x is another word"


def test_the_secrets_of_a_malformed_url_are_found() -> None:
    assert secrets_of_url("postgresql:/u:s3cr3t PW@h/db") == ["s3cr3t PW"]
    assert secrets_of_url("postgresql://u@h/db?options=-c password=s3cr3tPW") == ["s3cr3tPW"]
    assert secrets_of_url("sqlite:///x.db") == []


@pytest.mark.parametrize("kind", [errors.RowmillError, errors.InvalidJob, errors.InvalidSettings, errors.Unreachable])
def test_no_error_of_ours_holds_a_secret(kind: type[errors.RowmillError]) -> None:
    error = kind(f"cannot reach redis://:{SECRET}@h")
    assert SECRET not in str(error)
    assert SECRET not in repr(vars(error))


def test_logs_hold_no_secret() -> None:
    formatter = logs.RedactedFormatter(logging.Formatter("%(message)s"))
    try:
        raise ValueError(f"amqp://u:{SECRET}@h")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "redis://:%s@h", (SECRET,), (type(error), error, None))
    shown = formatter.format(record)
    assert SECRET not in shown
    assert "redis://:***@h" in shown


@pytest.mark.parametrize(
    ("url", "holds"),
    [
        ("s3://AK:s3cr3tPW@b/x", True),
        ("s3://AK:s3cr/3tPW@b/x", True),
        ("https://u:s3cr3tPW@h/x", True),
        ("https://s3cr3tPW@h/x", True),
        ("https://h/x?sv=1&sig=s3cr3tPW", True),
        ("https://h/x?X-Amz-Signature=s3cr3tPW", True),
        ("az://c/x?token=s3cr3tPW", True),
        ("s3://b/a:b@c", False),
        ("s3://b/0?/monkey=1/*.parquet", False),
        ("abfs://c@account.dfs.core.windows.net/x", False),
        ("http://h:80/x", False),
        ("/a:b@c/x", False),
        ("a:b@c", False),
    ],
)
def test_credentials_in_a_url(url: str, holds: bool) -> None:
    assert holds_credentials(url) is holds


@pytest.mark.parametrize("field", ["input", "output", "model"])
def test_a_job_with_credentials_is_refused_without_repeating_them(field: str) -> None:
    fields = {"input": "a.parquet", "output": "out", "model": "fake", "task": "embed", "column": "text"}
    with pytest.raises(errors.InvalidJob, match=rf"{field}.*storage_options\.s3") as caught:
        parse(fields | {field: f"s3://AK:{SECRET}@b/x"})
    assert SECRET not in str(caught.value)
