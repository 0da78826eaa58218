"""What the first bytes of a sound or video tell: which container it is, and whether the file was cut short."""

from __future__ import annotations

from collections.abc import Callable, Mapping

MP4, AVI = "MP4 or MOV", "AVI"
VIDEOS: Mapping[str, Callable[[bytes], bool]] = {
    MP4: lambda head: head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"),
    "Matroska or WebM": lambda head: head[:4] == b"\x1a\x45\xdf\xa3",
    AVI: lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ",
    "MPEG": lambda head: head[:4] in (b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3"),
    "MPEG-TS": lambda head: head[:1] == b"\x47" and head[188:189] == b"\x47",
    "FLV": lambda head: head[:4] == b"FLV\x01",
    "Ogg": lambda head: head[:5] == b"OggS\x00",
    "GIF": lambda head: head[:6] in (b"GIF87a", b"GIF89a"),
}
"""Containers of videos that are opened, and their marks."""
_UNKNOWN = 2**31 - 2**16
"""RIFF files that were written to a pipe say that they are this long, or longer."""
_MOST_BOXES = 10_000


def video_container(data: bytes) -> str | None:
    """Its name, or ``None`` for what is none of them."""
    return next((name for name, test in VIDEOS.items() if test(data[:256])), None)


def is_cut(data: bytes) -> bool:
    """Whether a RIFF file (WAV, AVI) or an MP4 is shorter than it says. Others do not say."""
    if data[:4] == b"RIFF" and len(data) >= 12:
        return len(data) - 7 < int.from_bytes(data[4:8], "little") < _UNKNOWN
    return VIDEOS[MP4](data[:8]) and _boxes_end(data) > len(data)


def _boxes_end(data: bytes) -> int:
    """Where the last of the file's boxes ends (ISO/IEC 14496-12, 4.2: size, type, and the size again if it is long)."""
    at = 0
    for _ in range(_MOST_BOXES):
        if at + 8 > len(data):
            break
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: to the end of the file
            return len(data)
        at += size
    return at
