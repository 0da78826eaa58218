"""``rowmill key``: shown once, listed without the key, ended."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Rowmill


def test_a_key_from_create_to_revoke(rowmill: Rowmill) -> None:
    assert rowmill.inside("tenant", "add", "acme").code == 0
    words = ("key", "create", "--tenant", "acme", "--scope", "submit", "--scope", "read", "--expires", "30d", "--json")
    made = rowmill.inside(*words)
    assert made.code == 0 and made.document["key"].startswith("rm_")
    assert made.document["scopes"] == ["read", "submit"]
    listed = rowmill.inside("key", "list")
    assert made.document["id"] in listed.out and made.document["key"] not in listed.out and "valid" in listed.out
    rotated = rowmill.inside("key", "rotate", made.document["id"], "--json")
    assert rotated.document["key"] != made.document["key"]
    assert rowmill.inside("key", "revoke", rotated.document["id"]).code == 0
    states = [key["revoked_at"] is None for key in rowmill.inside("key", "list", "--json").document["keys"]]
    assert states == [False, False]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("create", "--tenant", "nobody", "--scope", "read"), 6, "rowmill tenant add nobody"),
        (("create", "--tenant", "nobody", "--scope", "write"), 2, "scopes are submit, read, admin"),
        (("create", "--tenant", "a", "--scope", "read", "--expires", "soon"), 2, "--expires: 'soon' is not a duration"),
        (("create", "--tenant", "a", "--scope", "read", "--expires", "0d"), 2, "more than 0 seconds"),
        (("revoke", "key_nothing"), 6, "rowmill key list"),
    ],
)
def test_a_mistake_is_told_plainly(rowmill: Rowmill, words: tuple[str, ...], code: int, said: str) -> None:
    done = rowmill.inside("key", *words)
    assert (done.code, done.out) == (code, "")
    assert said in done.err
