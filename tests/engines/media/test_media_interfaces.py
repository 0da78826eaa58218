"""Rows that would harm their worker, told apart before vLLM's engine has any part in it."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from pipeline.engines.media import audio, containers
from pipeline.engines.media.columns import Media
from pipeline.engines.media.limits import MediaLimits
from pipeline.engines.vllm.prompts.media import MediaInputs
from pipeline.engines.vllm.prompts.video import VideoLoader
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import parse
from storage.errors import RowError, TransientError
from tests.engines.media.media_files import RATE, frames, sound, tone, video

SDP = b"\nv=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45678 RTP/AVP 26\na=x:"


def loader() -> VideoLoader:
    pytest.importorskip("vllm")
    kwargs = {"video": {"video_backend": "opencv", "num_frames": 4}}
    return VideoLoader(SimpleNamespace(multimodal_config=SimpleNamespace(media_io_kwargs=kwargs)), MediaLimits())


@pytest.mark.vllm
def test_no_video_makes_it_open_a_socket(capfd: pytest.CaptureFixture[str]) -> None:
    """FFmpeg takes this for SDP, though it begins as MPEG-TS does, and would listen where that says."""
    data = (b"G" + SDP).ljust(188, b"x") + b"G" + b"x" * 99
    assert containers.video_container(data) == "MPEG-TS"
    with pytest.raises(RowError) as caught:
        loader().decode(data)
    assert caught.value.code == RowErrorCode.INVALID_VIDEO
    assert "not on whitelist" in capfd.readouterr().err


@pytest.mark.parametrize("mark", [b"GIF8", b"FLV", b"OggS"])
def test_marks_are_whole(mark: bytes) -> None:
    assert containers.video_container(mark + SDP) is None


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        *((kind, "mpeg4") for kind in ("mp4", "mov", "matroska", "avi")),
        *((kind, "mpeg2video") for kind in ("mpeg", "mpegts")),
        *(("flv", "flv"), ("webm", "libvpx"), ("ogg", "libvpx")),
    ],
)
def test_containers_that_open(kind: str, codec: str) -> None:
    found, _ = loader().decode(video(frames(0), kind, codec, rate=25))
    assert len(found)


def test_a_sound_whose_rate_changes() -> None:
    two = [sound(tone(0.5, rate=rate), "mp3", "libmp3lame", rate=rate) for rate in (48_000, 32_000)]
    with pytest.raises(RowError, match="sampling rate changes") as caught:
        audio.decode(b"".join(two), MediaLimits())
    assert caught.value.code == RowErrorCode.INVALID_AUDIO


# ---- rows ----


def inputs(most: int, **options: int) -> MediaInputs:
    """Without a model: what is asked of one is how many it takes."""
    pytest.importorskip("vllm")
    resampler = SimpleNamespace(method="pyav", target_sr=RATE)
    limits = {"image": most, "audio": most}
    info = SimpleNamespace(
        supported_mm_limits=limits, allowed_mm_limits=limits, data_parser=SimpleNamespace(audio_resampler=resampler)
    )
    renderer = SimpleNamespace(get_mm_processor=lambda: SimpleNamespace(info=info))
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=9, is_multimodal_model=True, architectures=[]))
    spec = parse({"input": "i", "output": "o", "model": "m", "task": "generate", "prompt": "p"} | COLUMNS)
    running: Any = SimpleNamespace(config=config, llm=SimpleNamespace(renderer=renderer))
    return MediaInputs(running, spec, None, options)


COLUMNS = {"image_column": "photo", "audio_column": "call"}


def code(made: MediaInputs, modality: str, items: list[bytes]) -> str:
    media = Media({modality: [pa.scalar(item) for item in items]}, False, 0)
    with pytest.raises(RowError) as caught:
        made._loaded(media)
    return caught.value.code


@pytest.mark.vllm
def test_rows_are_counted_before_they_are_decoded() -> None:
    for modality in ("image", "audio"):
        assert code(inputs(1), modality, [b"nothing", b"nothing"]) == RowErrorCode.INVALID_VALUE


@pytest.mark.vllm
def test_what_a_row_has_is_limited_in_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    PIL.Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(out, "PNG")
    made = inputs(99, max_media_bytes=70_000)
    decoded: list[bytes] = []
    load = made._images.load_bytes
    monkeypatch.setattr(made._images, "load_bytes", lambda data: decoded.append(data) or load(data))
    assert code(made, "image", [out.getvalue()] * 9) == RowErrorCode.MEDIA_TOO_LONG
    assert len(decoded) == 2, "the third is refused by its head"
    assert code(made, "audio", [sound(tone(0.5))] * 9) == RowErrorCode.MEDIA_TOO_LONG


@pytest.mark.vllm
@pytest.mark.parametrize("error", [AssertionError("no place"), RuntimeError("no place"), ValueError("no place")])
def test_a_prompt_that_does_not_fit_its_media(error: Exception) -> None:
    """As vLLM says it: ``Failed to apply prompt replacement for mm_items`` is an assertion."""

    def render() -> None:
        raise error

    with pytest.raises(RowError, match="no place") as caught:
        inputs(1)._made(render)
    assert caught.value.code == RowErrorCode.INVALID_VALUE


@pytest.mark.vllm
@pytest.mark.parametrize("error", [MemoryError(), TransientError("later")])
def test_what_is_not_the_row_s_fault(error: Exception) -> None:
    def render() -> None:
        raise error

    with pytest.raises(type(error)):
        inputs(1)._made(render)
