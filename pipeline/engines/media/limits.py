"""How long and how large the media of a row may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.spec.error_codes import RowErrorCode
from storage.errors import RowError

AUDIO_SECONDS, VIDEO_SECONDS = 600.0, 3600.0
VIDEO_FRAMES = 768
"""The most that vLLM's own loaders take, whatever the model."""
MEDIA_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """``media_bytes``: of all that a row has, decoded. What is beyond a limit is the row error ``media_too_long``."""

    audio_seconds: float = AUDIO_SECONDS
    video_seconds: float = VIDEO_SECONDS
    video_frames: int = VIDEO_FRAMES
    media_bytes: int = MEDIA_BYTES

    @classmethod
    def of(cls, options: Mapping[str, Any], window_seconds: float | None = None) -> MediaLimits:
        """From the engine options ``max_…``; ``window_seconds`` is what the model hears at most, if there is an end."""
        seconds = float(options.get("max_audio_seconds", AUDIO_SECONDS))
        return cls(
            audio_seconds=min(seconds, window_seconds or seconds),
            video_seconds=float(options.get("max_video_seconds", VIDEO_SECONDS)),
            video_frames=int(options.get("max_video_frames", VIDEO_FRAMES)),
            media_bytes=int(options.get("max_media_bytes", MEDIA_BYTES)),
        )

    def check_audio(self, seconds: float, n_bytes: int) -> None:
        """Raise :class:`RowError` beyond a limit."""
        most = self.audio_seconds
        _refuse_beyond(seconds, most, f"the sound has more than {most:g} s (max_audio_seconds)")
        self._check_bytes(n_bytes, "decoded it has")

    def check_video(self, seconds: float, frames: int, n_bytes: int) -> None:
        """Raise :class:`RowError` beyond a limit. ``frames``: those that are taken."""
        most = self.video_seconds
        _refuse_beyond(seconds, most, f"the video has {seconds:.1f} s; at most {most:g} (max_video_seconds)")
        most = self.video_frames
        _refuse_beyond(frames, most, f"the video gives {frames} frames; at most {most} (max_video_frames)")
        self._check_bytes(n_bytes, "decoded it has")

    def check_row(self, n_bytes: int) -> None:
        """Raise :class:`RowError` if all images, sounds and videos of a row, decoded, are beyond the limit."""
        self._check_bytes(n_bytes, "with it, the row's decoded media have")

    def _check_bytes(self, n_bytes: int, what: str) -> None:
        _refuse_beyond(n_bytes, self.media_bytes, f"{what} more than {self.media_bytes} bytes (max_media_bytes)")


def _refuse_beyond(value: float, most: float, message: str) -> None:
    if value > most:
        raise RowError(RowErrorCode.MEDIA_TOO_LONG, message)
