"""What must not be shown: passwords in URLs, values whose names say that they are secret, and the secrets in use.

All of it takes time linear in the text. Text is cut into words first (runs without white space and quotes), and each
word is looked at with string searches that move forward only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
PLACEHOLDER = "PASSWORD"
"""What messages and the documentation write where a password goes: it is shown."""

_WORD = re.compile(r"[^\s'\"<>`]+")
_SCHEME_END = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,40}$")
_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]*\]|[^:\[\]]*):\d{1,5}")
_SECRET_NAME = re.compile(r"(?i)key|secret|token|pass|pwd|credential|auth|sas|signature|connection_string|cookie")
_SECRET_PARAMETER = re.compile(r"(?i)pass|pwd|secret|token|key|sig|credential")
_SENSITIVE = (
    r"(?:password|passwd|passphrase|pwd|secret|secret_?key|secret_?access_?key|signature|sig"
    r"|(?:access|account|api|private|shared)_?key|(?:access|api|auth|bearer|id|refresh|sas|security|session)_?token)"
)
_ASSIGNED = re.compile(
    rf"(?i)({_SENSITIVE}(?:\s{{0,2}}=|%3D|['\"]\s{{0,2}}[:=])\s{{0,2}})(\"[^\"]+\"|'[^']+'|[^\s'\",;&)}}\]]+)"
)
"""``password=…`` and ``"secret_key": "…"``, wherever they stand."""
_CREDENTIAL_PARAMETER = re.compile(rf"(?i)(?:[\w-]*[-_])?(?:token|credential|{_SENSITIVE})=.")
_BEARER = re.compile(r"(?i)\b(bearer|basic) {1,2}([A-Za-z0-9._~+/=-]{8,})")
_HTTP = ("http", "https")
_SHORTEST, _SHORTEST_WORD = 4, 8
"""Characters of a secret that is looked for in all text; the second number for one of small letters alone."""


def redact_text(text: str) -> str:
    """The text with the passwords of URLs, secret parameters and the secrets in use (:func:`remember`) hidden."""
    text = redact_known(text)
    if "@" in text or "=" in text or ":" in text:
        text = _WORD.sub(lambda match: redact_url(match[0]), text)
        text = _ASSIGNED.sub(lambda match: match[1] + _hidden_like(match[2]), text)
    return _BEARER.sub(rf"\1 {HIDDEN}", text)


def _hidden_like(value: str) -> str:
    quote = value[0] if value[0] in "'\"" else ""
    return f"{quote}{HIDDEN}{quote}"


def redact_url(url: str) -> str:
    """The URL, well formed or not, with its password and secret parameters hidden. All of ``url`` is one URL."""
    if "@" not in url and "=" not in url:
        return url
    shown, at = [], 0
    for lo, hi in _secret_spans(url):
        if hi > at:
            shown += [url[at : max(lo, at)], HIDDEN]
            at = hi
    return "".join([*shown, url[at:]])


def redact(value: object, name: str = "") -> Any:
    """The value as it may be shown: secrets replaced by ``***``, by their names and inside URLs.

    Everything below a name such as ``key``, ``token`` or ``credentials`` is hidden, except ``None``, ``""`` and
    booleans. A value whose name ends in ``url`` is one URL, whatever characters it holds.
    """
    if value is None or value == "" or isinstance(value, bool):
        return value
    if name and _SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return redact_text(redact_url(value) if name.endswith("url") else value)


def holds_credentials(url: str) -> bool:
    """Whether a URL carries a password, a key or a signed query. Plain paths never do."""
    scheme, separator, rest = url.partition("://")
    if not separator or _SCHEME_END.fullmatch(scheme) is None:
        return False
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    named = bool(at) and (":" in user or scheme.lower() in _HTTP)
    # A bucket's name has no colon, so this is a key whose secret has a slash. Only a host may have a port.
    odd = not at and ":" in authority and _PORT.fullmatch(authority) is None
    # In an object's name '?' is a wildcard, after which the name goes on: only exact names of parameters count.
    query = re.split("[?&;]", rest)[1:]
    return named or odd or any(_CREDENTIAL_PARAMETER.match(parameter) for parameter in query)


# -- the secrets in use ----------------------------------------------------------------------------------------------

_known: dict[str, None] = {}
_pattern: re.Pattern[str] | None = None


def remember(secrets: Iterable[str], *, shown: str = "") -> None:
    """Hide these values from now on, wherever they occur in what this process says, logs or stores.

    Values that anybody could guess from ``shown`` (the rest of the setting) or that are too short to be told from
    ordinary text are left out: hiding them would damage every message. Percent-encoded and quoted forms are hidden too.
    """
    global _pattern
    before = len(_known)
    for secret in secrets:
        for form in (secret, unquote(secret)):
            if _is_telling(form) and form not in shown:
                escaped = (repr(form)[1:-1], json.dumps(form)[1:-1])
                _known.update(dict.fromkeys((form, *escaped)))
    if len(_known) != before:
        # The longest first, so that no part of a secret is left where another is its beginning.
        forms = sorted(_known, key=lambda form: (-len(form), form))
        _pattern = re.compile("|".join(map(_occurrence, forms)))


def redact_known(text: str) -> str:
    """The text with the secrets in use hidden, and nothing else changed."""
    return text if _pattern is None else _pattern.sub(HIDDEN, text)


def redact_known_values(value: Any) -> Any:
    """:func:`redact_known` of every text in a JSON value; keys stay."""
    if _pattern is None:
        return value
    if isinstance(value, str):
        return redact_known(value)
    if isinstance(value, Mapping):
        return {key: redact_known_values(inner) for key, inner in value.items()}
    return [redact_known_values(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def secrets_of_url(url: str) -> list[str]:
    """The parts of a URL, well formed or not, that :func:`redact_url` hides."""
    return [url[lo:hi] for lo, hi in _secret_spans(url) if hi > lo]


def secrets_of(value: object, name: str = "") -> list[str]:
    """The texts in a setting that :func:`redact` hides."""
    if isinstance(value, Mapping):
        return [found for key, inner in value.items() for found in _secrets_below(inner, str(key), name)]
    if isinstance(value, (list, tuple)):
        return [found for inner in value for found in secrets_of(inner, name)]
    if not isinstance(value, str):
        return []
    return [value] if name and _SECRET_NAME.search(name) else secrets_of_url(value)


def _secrets_below(value: object, key: str, name: str) -> list[str]:
    return secrets_of(value, name if name and _SECRET_NAME.search(name) else key)


def _is_telling(secret: str) -> bool:
    plain = secret.isalpha() and secret.islower()
    return len(secret) >= (_SHORTEST_WORD if plain else _SHORTEST)


def _occurrence(secret: str) -> str:
    if len(secret) >= _SHORTEST_WORD:
        return re.escape(secret)
    return rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])"


# -- what is secret in a URL -----------------------------------------------------------------------------------------


def _secret_spans(url: str) -> Iterator[tuple[int, int]]:
    """Where secrets stand in ``url``, in order of their beginnings within each kind; they may overlap."""
    spans = [*_password_spans(url), *_parameter_spans(url)]
    return iter(sorted((lo, hi) for lo, hi in spans if hi > lo and url[lo:hi] != PLACEHOLDER))


def _password_spans(url: str) -> Iterator[tuple[int, int]]:
    """``user:PASSWORD@``, also after one slash or none, and where the password holds slashes or at-signs.

    What is doubtful is hidden: too much is better than too little.
    """
    last_at = url.rfind("@")
    if last_at < 0:
        return
    marks = [match.start() for match in re.finditer("://", url)]
    start = _after_scheme(url)
    if not marks or 0 < start < marks[0]:
        # One slash too few, or no scheme: everything from the first colon that no slash follows.
        colon = url.find(":", start)
        if 0 <= colon < last_at:
            yield colon + 1, last_at
        return
    for n, mark in enumerate(marks):
        start = mark + 3
        if start > last_at:
            return
        end = len(url) if n + 1 == len(marks) else _scheme_start(url, start, marks[n + 1])
        slash = min((at for at in (url.find(c, start, end) for c in "/?#") if at >= 0), default=end)
        authority = url[start:slash]
        if ":" not in authority and "@" not in authority:
            continue
        at = url.rfind("@", start, end)
        if at < 0:
            ends = end == len(url) or url[end - 1] in ",;|=("
            if ":" not in authority or (ends and _PORT.fullmatch(authority)):
                continue
            at = last_at  # a password that itself holds '://'
        colon = url.find(":", start, at)
        if colon >= 0:
            yield colon + 1, at
        elif url[_scheme_start(url, 0, mark) : mark].lower() in _HTTP:
            yield start, at  # a token in place of a user


def _after_scheme(url: str) -> int:
    match = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,40}:/+", url)
    return match.end() if match else 0


def _scheme_start(url: str, lo: int, mark: int) -> int:
    """Where the scheme that ends at ``mark`` begins."""
    found = _SCHEME_END.search(url[max(lo, mark - 41) : mark])
    return mark - len(found[0]) if found else mark


def _parameter_spans(url: str) -> Iterator[tuple[int, int]]:
    """Values of parameters whose names look secret, after the first ``?``: also ``options=-c password=…``."""
    query = url.find("?")
    if query < 0:
        return
    for match in re.finditer(r"[^?&;]+", url[query + 1 :]):
        name = _SECRET_PARAMETER.search(match[0])
        if name is None:
            continue
        equals = match[0].find("=", name.end())
        if equals >= 0:
            yield query + 1 + match.start() + equals + 1, query + 1 + match.end()
