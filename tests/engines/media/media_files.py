"""Sounds and videos to test with, made on the spot."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import numpy.typing as npt

RATE = 16_000
Samples = npt.NDArray[np.float32]


def tone(seconds: float = 1.0, pitch: float = 440.0, rate: int = RATE) -> Samples:
    """float32 [n]: a tone whose pitch rises, below 0.5."""
    at = np.arange(round(seconds * rate)) / rate
    return np.asarray(0.4 * np.sin(2 * np.pi * pitch * at * (1 + at / 4)), np.float32)


def sound(samples: Samples, kind: str = "wav", codec: str = "pcm_f32le", rate: int = RATE) -> bytes:
    """A file of one channel, or of as many as ``samples`` has rows."""
    channels = np.atleast_2d(samples)
    layout = "mono" if len(channels) == 1 else "stereo"
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels), format="fltp", layout=layout)
        frame.sample_rate = rate
        convert = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for part in [*convert.resample(frame), *convert.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return out.getvalue()


def frames(seed: int, count: int = 12, size: tuple[int, int] = (64, 48)) -> npt.NDArray[np.uint8]:
    """uint8 [count, height, width, 3]: colours that change from frame to frame."""
    noise = np.random.default_rng(seed)
    small = noise.integers(0, 255, (count, 3, 4, 3), dtype=np.uint8)
    return small.repeat(size[1] // 3, axis=1).repeat(size[0] // 4, axis=2)


def video(pictures: npt.NDArray[np.uint8], kind: str = "mp4", codec: str = "mpeg4", rate: int = 4) -> bytes:
    """A file with these pictures, ``rate`` of them a second."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()
