"""Sounds to samples: encoded ones by PyAV, which brings FFmpeg with it; numbers as they are.

The result is one channel, the mean of all (as vLLM's own loaders make it), at the rate that the file has.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engines.media import containers
from pipeline.engines.media.limits import MediaLimits
from pipeline.spec.error_codes import RowErrorCode
from storage.errors import EngineMissing, RowError

Samples = npt.NDArray[np.float32]
Sound = tuple[Samples, int]
"""float32 [n], between -1 and 1 as a rule, and the sampling rate in Hz."""

FORMATS = "wav,w64,aiff,flac,mp3,ogg,mov,matroska,webm,aac,amr,caf,au"
"""FFmpeg's names of the containers that are read. Others, such as playlists, make it open further files."""
_TOLD_EXACTLY = ("flac", "mov", "matroska")
"""Containers whose head says how long the sound is; others leave it to be estimated."""
_RATES = range(1_000, 768_001)


def check_installed() -> None:
    """Raise :class:`EngineMissing` without PyAV."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise EngineMissing(
            f"sounds are decoded by the package av, which cannot be imported ({error}); install rowmill[audio]",
            field="audio_column",
        ) from error


def decode(data: bytes, limits: MediaLimits) -> Sound:
    """An encoded sound, or the first sound of a video. Raises :class:`RowError`: ``invalid_audio`` for what cannot be
    decoded to its end, ``media_too_long`` beyond the limits, as soon as that shows."""
    import av

    if containers.is_cut(data):
        raise _broken("the file ends before its sound does")
    try:
        # A protocol is what FFmpeg opens further files by.
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
        with av.open(io.BytesIO(data), options=options) as container:
            return _decoded(container, limits)
    except RowError:
        raise
    except Exception as error:  # FFmpeg's errors come as many kinds of exception
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _broken(f"{reason} ({len(data)} bytes)") from None


def _decoded(container: Any, limits: MediaLimits) -> Sound:
    import av

    if not container.streams.audio:
        raise _broken("there is no sound in it")
    stream = container.streams.audio[0]
    rate = int(stream.rate or 0)
    if rate not in _RATES:
        raise _broken(f"its sampling rate is {rate} Hz")
    # Neither rate nor channels change here: only the type of the samples, to float32, channel after channel.
    convert = av.AudioResampler(format="fltp")
    parts: list[Samples] = []
    count = 0
    for frame in _frames(container, stream):
        if frame is not None and frame.sample_rate != rate:
            raise _broken(f"its sampling rate changes from {rate} to {frame.sample_rate} Hz")
        for part in convert.resample(frame):
            parts.append(part.to_ndarray().mean(axis=0, dtype=np.float32))
            count += len(parts[-1])
            limits.check_audio(count / rate, 4 * count)
    if not count:
        raise _broken("there is no sound in it")
    told = _told_seconds(container, stream)
    if told is not None and count / rate < 0.98 * told - 0.1:
        raise _broken(f"the file ends after {count / rate:.1f} of {told:.1f} s")
    return np.concatenate(parts), rate


def _frames(container: Any, stream: Any) -> Any:
    yield from container.decode(stream)
    yield None  # what the converter still holds


def _told_seconds(container: Any, stream: Any) -> float | None:
    if not container.format.name.startswith(_TOLD_EXACTLY):
        return None
    told = [float(stream.duration * stream.time_base)] if stream.duration and stream.time_base else []
    told += [container.duration / 1_000_000] if container.duration else []
    return min(told, default=None)


def from_numbers(values: Any, rate: Any, limits: MediaLimits) -> Sound:
    """Samples that are numbers already, one channel, as an Arrow array. Raises :class:`RowError`."""
    if rate is None or int(rate) != rate or int(rate) not in _RATES:
        raise RowError(RowErrorCode.INVALID_AUDIO, f"its sampling rate is {rate}, not a whole number of usual Hz")
    if not len(values):
        raise _broken("it has no samples")
    limits.check_audio(len(values) / rate, 4 * len(values))
    if values.null_count:
        raise RowError(RowErrorCode.MISSING_VALUE, "there is a null among the samples")
    samples = np.asarray(values.to_numpy(zero_copy_only=False), np.float32)
    if not np.isfinite(samples).all():
        raise RowError(RowErrorCode.NOT_FINITE, "a sample is NaN or infinite")
    return samples, int(rate)


def _broken(why: str) -> RowError:
    return RowError(RowErrorCode.INVALID_AUDIO, f"not a sound that can be decoded: {why}")
