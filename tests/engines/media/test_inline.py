"""What a text column holds itself, and what is only a name."""

from __future__ import annotations

import base64

import pytest

from pipeline.engines.media import inline
from storage.errors import InvalidInput

# Three bytes for four characters, among them those in which the two alphabets differ.
PICTURE = b"\x89PNG\r\n\x1a\n" + b"\xfb\xef\xbe\xff\xff\xff" * 9 + b"\xfb"
SAFE = base64.urlsafe_b64encode(PICTURE).decode()


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(PICTURE).decode(),
        base64.encodebytes(PICTURE).decode(),
        SAFE,
        SAFE.rstrip("="),
        f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}",
    ],
    ids=["plain", "lines", "url-safe", "without padding", "data"],
)
def test_base64_in_any_form_is_its_bytes(text: str) -> None:
    assert inline.content(text) == PICTURE


@pytest.mark.parametrize(
    "text", ["", "a.png", "photos_of_2026-01-31_" * 5, "/photos/" + "a" * 99, "s3://bucket/" + "a" * 99]
)
def test_a_name_is_none(text: str) -> None:
    assert inline.content(text) is None


def test_damage_is_named() -> None:
    with pytest.raises(InvalidInput, match="damaged Base64"):
        inline.content("data:image/png;base64,AAA")
