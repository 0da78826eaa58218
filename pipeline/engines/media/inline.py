"""Images and other media that stand in a text column themselves: ``data:`` URIs (RFC 2397) and plain Base64."""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from storage.errors import InvalidInput

_DATA = re.compile(r"\s*data:([^,]{0,200}),", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_URL_SAFE = re.compile(r"[A-Za-z0-9_\-\s]+={0,2}\s*")
_PLAIN = str.maketrans("-_", "+/")
"""From the alphabet for URLs and file names, which often comes without padding (RFC 4648)."""
_SHORTEST = 64
"""Characters below which text is a name, whatever it looks like."""
_HEAD = 24
_SIGNATURES = (
    b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"OggS", b"fLaC", b"ID3",
    b"\x1a\x45\xdf\xa3", b"\0\0\0",
)  # fmt: skip
"""What files of images, sounds and videos begin with; MP4 and AVIF begin with the size of a small box."""


def content(text: str) -> bytes | None:
    """The bytes that ``text`` itself holds, or ``None`` where it is a URI or a path.

    Raises :class:`InvalidInput` for a ``data:`` URI or Base64 that is damaged.
    """
    uri = _DATA.match(text)
    if uri is not None:
        data = text[uri.end() :]
        if not uri[1].lower().endswith(";base64"):
            return unquote_to_bytes(data)
        return _decoded(data, "the data: URI")
    if len(text) < _SHORTEST:
        return None
    if _URL_SAFE.fullmatch(text) is not None and ("-" in text or "_" in text):
        plain = "".join(text.translate(_PLAIN).split())
        padded = plain + "=" * (-len(plain) % 4)
        # Or it is a long name.
        return _decoded(padded, "the text") if _decoded(plain[:_HEAD], "the text").startswith(_SIGNATURES) else None
    if _BASE64.fullmatch(text) is None:
        return None
    # A path has no dot only where its files have no suffix: the first bytes tell.
    if text.startswith("/") and not _decoded(text[:_HEAD], "the text").startswith(_SIGNATURES):
        return None
    return _decoded(text, "the text")


def _decoded(text: str, what: str) -> bytes:
    try:
        return binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"{what} is damaged Base64: {error}") from None
