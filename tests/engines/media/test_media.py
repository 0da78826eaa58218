"""Sounds decoded, columns read, limits kept, and room for what is prepared: without a model."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.engines.media import audio, columns, containers
from pipeline.engines.media.limits import MediaLimits
from pipeline.engines.vllm.requests.media_budget import MediaMemoryBudget
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec, parse
from storage.errors import EngineMissing, InvalidInput, RowError
from tests.engines.media.media_files import RATE, sound, tone

LIMITS = MediaLimits()
KINDS = {
    "WAV of float": ("wav", "pcm_f32le"),
    "WAV of 16 bits": ("wav", "pcm_s16le"),
    "WAV of 24 bits": ("wav", "pcm_s24le"),
    "FLAC": ("flac", "flac"),
    "MP3": ("mp3", "libmp3lame"),
    "Ogg": ("ogg", "libopus"),
    "MP4": ("mp4", "aac"),
    "WebM": ("webm", "libopus"),
}


def spec(**fields: Any) -> JobSpec:
    return parse({"input": "i", "output": "o", "model": "m", "task": "generate", "prompt": "p", **fields})


def refused(make: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        make()
    return caught.value.code, caught.value.message


# ---- sounds ----


@pytest.mark.parametrize("kind", KINDS)
def test_formats(kind: str) -> None:
    rate = 48_000
    samples = tone(0.5, rate=rate)
    found, found_rate = audio.decode(sound(samples, *KINDS[kind], rate=rate), LIMITS)
    assert found_rate == rate
    assert found.dtype == np.float32
    assert found.ndim == 1
    if kind == "WAV of float":
        np.testing.assert_array_equal(found, samples)
    elif kind in ("WAV of 16 bits", "WAV of 24 bits", "FLAC"):
        np.testing.assert_allclose(found, samples, atol=2**-15)
    else:
        assert abs(len(found) - len(samples)) < 0.06 * rate
        assert 0.35 < np.abs(found[2000:-4000]).max() < 0.45


def test_channels_become_their_mean() -> None:
    left, right = tone(), tone(pitch=660)
    found, _ = audio.decode(sound(np.stack([left, right])), LIMITS)
    np.testing.assert_array_equal(found, np.stack([left, right]).mean(axis=0))


@pytest.mark.parametrize("kind", ["WAV of float", "WAV of 16 bits", "FLAC", "MP4", "WebM"])
def test_a_file_that_ends_too_early(kind: str) -> None:
    data = sound(tone(2.0, rate=48_000), *KINDS[kind], rate=48_000)
    code, _ = refused(lambda: audio.decode(data[: len(data) // 2], LIMITS))
    assert code == RowErrorCode.INVALID_AUDIO


@pytest.mark.parametrize("data", [b"", b"nothing", b"RIFF\x10\x00\x00\x00WAVE", bytes(4000), b"\xff\xfb\x90\x00" * 40])
def test_no_sound_at_all(data: bytes) -> None:
    code, message = refused(lambda: audio.decode(data, LIMITS))
    assert code == RowErrorCode.INVALID_AUDIO
    assert message.startswith("not a sound that can be decoded")


def test_no_file_makes_it_open_another(tmp_path: Path) -> None:
    """A playlist names files and addresses; FFmpeg would open them."""
    hidden = tmp_path / "hidden.wav"
    hidden.write_bytes(sound(tone()))
    for data in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{hidden}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {hidden}\n",
    ):
        assert refused(lambda data=data: audio.decode(data.encode(), LIMITS))[0] == RowErrorCode.INVALID_AUDIO


def test_limits_of_sounds() -> None:
    """They hold while it is decoded: silence takes little room in a file."""
    silence = sound(np.zeros(300 * 8000, np.float32), "flac", "flac", rate=8000)
    code, message = refused(lambda: audio.decode(silence, MediaLimits(audio_seconds=60)))
    assert (code, "60 s" in message) == (RowErrorCode.MEDIA_TOO_LONG, True)
    small = MediaLimits(media_bytes=100_000)
    assert refused(lambda: audio.decode(sound(tone(2.0)), small))[0] == RowErrorCode.MEDIA_TOO_LONG
    numbers = pa.array(tone(2.0))
    assert refused(lambda: audio.from_numbers(numbers, 1000, MediaLimits(audio_seconds=3)))[0] == "media_too_long"
    assert MediaLimits.of({"max_audio_seconds": 90}, 30).audio_seconds == 30
    assert MediaLimits.of({"max_audio_seconds": 9}, 30).audio_seconds == 9


@pytest.mark.parametrize(
    ("values", "rate", "code"),
    [
        ([], RATE, RowErrorCode.INVALID_AUDIO),
        ([0.0, None], RATE, RowErrorCode.MISSING_VALUE),
        ([0.0, float("nan")], RATE, RowErrorCode.NOT_FINITE),
        ([0.0, 0.1], None, RowErrorCode.INVALID_AUDIO),
        ([0.0, 0.1], 0, RowErrorCode.INVALID_AUDIO),
    ],
)
def test_numbers_that_are_no_sound(values: list[float | None], rate: int | None, code: str) -> None:
    assert refused(lambda: audio.from_numbers(pa.array(values, pa.float64()), rate, LIMITS))[0] == code


def test_numbers() -> None:
    found, rate = audio.from_numbers(pa.array([0.5, -0.25], pa.float64()), 8000, LIMITS)
    assert (found.tolist(), found.dtype, rate) == ([0.5, -0.25], np.float32, 8000)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(EngineMissing, match=r"rowmill\[audio\]"):
        audio.check_installed()


# ---- files ----


@pytest.mark.parametrize("kind", ["WAV of float", "WAV of 16 bits", "MP4"])
@given(share=st.floats(0, 0.99))
@example(share=0.5875)
@example(share=0.0055)
def test_files_that_are_cut(kind: str, share: float) -> None:
    data = sound(tone(0.1), *KINDS[kind])
    assert not containers.is_cut(data)
    cut = data[: int(share * len(data))]
    # Less than a box is no box; what is cut between two, or in the head of one, is whole to look at.
    unseen = any(end <= len(cut) < end + 8 for end in _box_ends(data)) if kind == "MP4" else len(cut) < 12
    assert containers.is_cut(cut) != unseen


def _box_ends(data: bytes) -> list[int]:
    ends = [0]
    while ends[-1] < len(data):
        ends.append(ends[-1] + int.from_bytes(data[ends[-1] : ends[-1] + 4], "big"))
    return ends


def test_files_that_do_not_say() -> None:
    data = sound(tone(0.1))
    for length in (0, 2**31 - 1, 2**32 - 1):
        assert not containers.is_cut(data[:4] + length.to_bytes(4, "little") + data[8:])
    assert not containers.is_cut(b"\x00\x00\x00\x00mdat" + bytes(100))
    assert containers.is_cut(b"\x00\x00\x00\x01mdat" + (200).to_bytes(8, "big") + bytes(100))


@given(st.binary(max_size=64))
def test_any_bytes(data: bytes) -> None:
    assert containers.is_cut(data) in (True, False)
    assert containers.video_container(b"#EXTM3U\n" + data) is None


# ---- columns ----

PAIR = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SAMPLED = pa.struct({"array": pa.list_(pa.float64()), "path": pa.string(), "sampling_rate": pa.int64()})


@pytest.mark.parametrize(
    ("modality", "kind"),
    [
        *(("audio", kind) for kind in (pa.binary(), pa.string(), PAIR, pa.list_(pa.binary()), SAMPLED)),
        *(("audio", kind) for kind in (pa.list_(pa.float32()), pa.list_(pa.list_(pa.float64())))),
        *(("video", kind) for kind in (pa.binary(), pa.large_string(), PAIR, pa.list_(pa.binary()), pa.list_(PAIR))),
    ],
)
def test_types_of_columns(modality: str, kind: pa.DataType) -> None:
    columns.check_column(spec(audio_column="x", audio_sampling_rate=8000), modality, kind, "x")


@pytest.mark.parametrize(
    ("modality", "kind"),
    [
        *(("audio", kind) for kind in (pa.int64(), pa.list_(pa.int16()), pa.struct({"array": pa.binary()}))),
        *(("video", kind) for kind in (pa.float32(), pa.list_(pa.float32()), pa.list_(pa.list_(pa.binary())))),
    ],
)
def test_other_types_of_columns(modality: str, kind: pa.DataType) -> None:
    with pytest.raises(InvalidInput) as caught:
        columns.check_column(spec(audio_column="x", audio_sampling_rate=8000), modality, kind, "x")
    assert caught.value.field == f"{modality}_column"


def test_numbers_need_a_rate() -> None:
    with pytest.raises(InvalidInput, match="audio_sampling_rate"):
        columns.check_column(spec(audio_column="x"), "audio", pa.list_(pa.float32()), "x")


def test_what_a_row_has() -> None:
    batch = pa.RecordBatch.from_pydict(
        {
            "heard": pa.array([[0.5, 1.0], None], pa.list_(pa.float32())),
            "seen": pa.array([[b"abc", b"d"], []], pa.list_(pa.binary())),
            "film": pa.array([b"ab", None]).dictionary_encode(),
            "both": pa.array([{"bytes": None, "path": "x"}, {"bytes": None, "path": None}], PAIR),
        }
    )
    found = columns.media_of({"audio": "heard", "video": "seen"}, batch, 0)
    assert [len(found.items["audio"]), len(found.items["video"]), found.in_frames, found.n_bytes] == [1, 2, True, 12]
    found = columns.media_of({"video": "film", "image": "both"}, batch, 0)
    assert (found.in_frames, found.n_bytes) == (False, 3)
    for column in batch.schema.names:
        code, message = refused(lambda name=column: columns.media_of({"video": name}, batch, 1))
        assert (code, repr(column) in message) == (RowErrorCode.MISSING_VALUE, True)


# ---- room ----


@given(
    sizes=st.lists(st.integers(0, 60), max_size=30),
    limit=st.integers(1, 100),
    threads=st.integers(1, 4),
    cancelled=st.sets(st.integers(0, 29)),
    broken=st.sets(st.integers(0, 29)),
)
def test_room(sizes: list[int], limit: int, threads: int, cancelled: set[int], broken: set[int]) -> None:
    """Whatever finishes, fails or is cancelled: the bound holds, all others get their turn, and nothing is left."""
    room = MediaMemoryBudget(limit, len, threads)
    done: list[int] = []

    async def request(at: int, size: int) -> None:
        def make() -> bytes:
            if at in broken:
                raise ValueError("broken")
            return bytes(size)

        try:
            made = await room.make(str(at), make)
            await asyncio.sleep(0)
            done.append(len(made))
        finally:
            room.leave(str(at))

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(request(at, size)) for at, size in enumerate(sizes)]
        await asyncio.sleep(0)
        for at in cancelled:
            if at < len(tasks):
                tasks[at].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    asyncio.run(all_of_them())
    room.close()
    assert len(done) == len([at for at in range(len(sizes)) if at not in cancelled | broken])
    assert room.most < limit + threads * 61
    assert (room._sum, room._making, len(room._held)) == (0, 0, 0)
