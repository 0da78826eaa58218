"""Images, videos and sounds with prompts: the answers are those of ``LLM.generate`` and ``LLM.chat``."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from pipeline.engines.base import EngineContext, Permissions, RowBatch, RowFailure
from pipeline.engines.testing import run
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.process.permissions import RowFiles
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec, Task
from storage.objects.store import ObjectStore
from tests.engines.media import media_files
from tests.engines.media.media_files import RATE, sound, tone
from tests.engines.vllm import support
from tests.engines.vllm.models.tiny_omni import AUDIO, FRAME_TOKENS, IMAGE, VIDEO, build_omni
from tests.engines.vllm.reference import Question, Reference

pytestmark = pytest.mark.vllm

WINDOW_BYTES = 100_000
SHARED = {
    "dtype": "float32",
    "max_model_len": 192,
    "trust_remote_code": True,
    "limit_mm_per_prompt": {"image": 1, "video": 1, "audio": 2},
    "media_io_kwargs": {"video": {"num_frames": 4}},
    # Nothing has to be measured for a cache of a given size.
    "skip_mm_profiling": True,
}
OPTIONS = {**SHARED, "max_audio_seconds": 4, "max_video_seconds": 20, "media_window_bytes": WINDOW_BYTES}
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def image(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (*reversed(size), 3), dtype=np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def still(pixels: Any) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


IMAGES = [image(seed) for seed in range(3)]
TEXTS = ["What is it?", "And this?", "x"]
TONES = [tone(1.0, 440), tone(1.5, 1800), np.random.default_rng(0).standard_normal(RATE).astype(np.float32) / 5]
SOUNDS = [sound(samples) for samples in TONES]
SLOW = sound(tone(1.0, 440, rate=8000), rate=8000)
FILMS = [media_files.video(media_files.frames(seed)) for seed in range(3)]
STILLS = [media_files.frames(seed, 3) for seed in range(3, 5)]


def url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def talk(text: str, *parts: tuple[str, str]) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = [{"type": kind, kind: {"url": where}} for kind, where in parts]
    user = {"role": "user", "content": [*said, {"type": "text", "text": text}]}
    return [{"role": "system", "content": "Be brief."}, user]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    build_omni(folder)
    for at in range(3):
        (folder / f"{at}.png").write_bytes(IMAGES[at])
        (folder / f"{at}.wav").write_bytes(SOUNDS[at])
        (folder / f"{at}.mp4").write_bytes(FILMS[at])
        np.save(folder / f"{at}.npy", TONES[at])
    np.save(folder / "slow.npy", tone(1.0, 440, rate=8000))
    for at, pixels in enumerate(STILLS):
        np.save(folder / f"stills{at}.npy", pixels)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    def heard(name: str, rate: int = RATE) -> dict[str, Any]:
        return {"prompt": f"{AUDIO}Say it.", "media_files": {"audio": [[str(folder / name), rate]]}}

    pictures = [
        {"prompt": f"{IMAGE}What is it?", "media_files": {"image": [str(folder / f"{at}.png")]}} for at in range(3)
    ]
    sounds = [*(heard(f"{at}.npy") for at in range(3)), heard("slow.npy", 8000)]
    films = [
        {"prompt": f"{VIDEO}What happens?", "media_files": {"video": [str(folder / f"stills{at}.npy")]}}
        for at in range(2)
    ]
    seen = [talk(text, ("image_url", url("image/png", data))) for text, data in zip(TEXTS, IMAGES, strict=True)]
    watched = [talk(text, ("video_url", url("video/mp4", data))) for text, data in zip(TEXTS, FILMS, strict=True)]
    listened = [talk(text, ("audio_url", url("audio/wav", data))) for text, data in zip(TEXTS, SOUNDS, strict=True)]
    every = talk(
        "All?",
        ("image_url", url("image/png", IMAGES[0])),
        ("video_url", url("video/mp4", FILMS[0])),
        ("audio_url", url("audio/wav", SOUNDS[0])),
        ("audio_url", url("audio/wav", SOUNDS[1])),
    )
    asked: list[Question] = [("generate", [pictures + sounds + films], GREEDY, None)]
    asked.append(("chat", [[*seen, *watched, *listened, every]], GREEDY, None))
    reference = Reference(tmp_path_factory.mktemp("reference"), [(str(folder / "omni"), SHARED, asked)])
    yield reference
    reference.close()


@pytest.fixture(scope="module")
def engine(folder: Path, reference: Reference) -> Iterator[VllmEngine]:
    fetch = RowFiles(ObjectStore({}), [str(folder)])
    context = EngineContext(folder / "cache", fetch=fetch, permissions=Permissions(frozenset({"trust_remote_code"})))
    engine = VllmEngine(support.model_at(folder / "omni"), Task.GENERATE, OPTIONS, context)
    engine.load()
    yield engine
    engine.close()


def make_spec(task: str = "generate", **fields: Any) -> JobSpec:
    return support.make_spec(task, **{"engine_options": OPTIONS, "sampling": GREEDY, **fields})


def seeing(**fields: Any) -> JobSpec:
    return make_spec(**{"prompt": f"{IMAGE}What is it?", "image_column": "photo", **fields})


def hearing(**fields: Any) -> JobSpec:
    return make_spec(**{"prompt": f"{AUDIO}Say it.", "audio_column": "call", **fields})


def watching(**fields: Any) -> JobSpec:
    return make_spec(**{"prompt": f"{VIDEO}What happens?", "video_column": "film", **fields})


def talking(**fields: Any) -> JobSpec:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{text}"}]
    return make_spec("chat", messages=turns, **fields)


def answers(engine: VllmEngine, spec: JobSpec, **columns: Any) -> list[Any]:
    batch = pa.RecordBatch.from_pydict(columns)
    found = run(engine, spec, [RowBatch(np.arange(batch.num_rows), batch)])
    return [found[row] for row in range(batch.num_rows)]


def same(found: list[Any], wanted: list[Any]) -> None:
    for answer, known in zip(found, wanted, strict=True):
        assert not isinstance(answer, RowFailure), answer
        assert [answer["output"]] == known["texts"]
        assert answer["prompt_tokens"] == len(known["tokens"])


def codes(found: list[Any]) -> list[str | None]:
    """The error of each row; none for one that was answered."""
    return [answer.code if isinstance(answer, RowFailure) else None for answer in found]


# ---- the answers are vLLM's own ----


def test_prompts_with_an_image(folder: Path, engine: VllmEngine, reference: Reference) -> None:
    """From bytes, from URIs, and from both in a struct."""
    wanted = reference.answers()[0][0][:3]
    assert len({known["texts"][0] for known in wanted}) == 3, "the images make a difference"
    same(answers(engine, seeing(), photo=IMAGES), wanted)
    assert len(wanted[0]["tokens"]) > FRAME_TOKENS, "they have places in the prompt"
    paths = [str(folder / f"{at}.png") for at in range(3)]
    same(answers(engine, seeing(), photo=paths), wanted)
    pairs = [{"bytes": None, "path": paths[0]}, {"bytes": IMAGES[1], "path": None}, {"bytes": IMAGES[2], "path": "x"}]
    same(answers(engine, seeing(), photo=pairs), wanted)


def test_prompts_with_a_sound(folder: Path, engine: VllmEngine, reference: Reference) -> None:
    """From bytes, URIs and numbers; at another rate than the model's, resampled as vLLM does without torchaudio."""
    wanted = reference.answers()[0][0][3:7]
    assert len({known["texts"][0] for known in wanted[:3]}) == 3, "the sounds make a difference"
    same(answers(engine, hearing(), call=[*SOUNDS, SLOW]), wanted)
    same(answers(engine, hearing(), call=[str(folder / f"{at}.wav") for at in range(3)]), wanted[:3])
    numbers = pa.array([samples.tolist() for samples in TONES], pa.list_(pa.float32()))
    same(answers(engine, hearing(audio_sampling_rate=RATE), call=numbers), wanted[:3])
    rated = [{"array": TONES[1], "sampling_rate": RATE}, {"array": tone(1.0, 440, rate=8000), "sampling_rate": 8000}]
    kind = pa.struct({"array": pa.list_(pa.float32()), "sampling_rate": pa.int32()})
    same(answers(engine, hearing(), call=pa.array(rated, kind)), [wanted[1], wanted[3]])


def test_prompts_with_frames(engine: VllmEngine, reference: Reference) -> None:
    wanted = reference.answers()[0][0][7:]
    assert wanted[0]["texts"] != wanted[1]["texts"], "the frames make a difference"
    found = [[still(pixels) for pixels in film] for film in STILLS]
    same(answers(engine, watching(video_frame_rate=2), film=found), wanted)


def test_messages_with_media(engine: VllmEngine, reference: Reference) -> None:
    """They go before the text of the user's last message. Files of videos are decoded as vLLM does it."""
    wanted = reference.answers()[0][1]
    assert len({known["texts"][0] for known in wanted}) == 10, "all of them make a difference"
    same(answers(engine, talking(image_column="p"), p=[[data] for data in IMAGES], text=TEXTS), wanted[:3])
    same(answers(engine, talking(video_column="v"), v=FILMS, text=TEXTS), wanted[3:6])
    same(answers(engine, talking(audio_column="a"), a=SOUNDS, text=TEXTS), wanted[6:9])
    every = talking(image_column="p", video_column="v", audio_column="a")
    same(answers(engine, every, p=IMAGES[:1], v=FILMS[:1], a=[SOUNDS[:2]], text=["All?"]), wanted[9:])


def test_text_alone(engine: VllmEngine) -> None:
    spec = support.make_spec(engine_options=OPTIONS, sampling=GREEDY)
    assert answers(engine, spec, text=["Name a river."])[0]["completion_tokens"] == 8


# ---- rows that fail alone ----


def test_bad_images(folder: Path, engine: VllmEngine, tmp_path: Path) -> None:
    data = [IMAGES[0], IMAGES[0][:200], b"nothing", b"", None]
    broken = [RowErrorCode.INVALID_IMAGE] * 3
    found = answers(engine, seeing(), photo=pa.array(data, pa.binary()))
    assert codes(found) == [None, *broken, RowErrorCode.MISSING_VALUE]
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    found = answers(engine, seeing(), photo=[str(folder / "0.png"), str(tmp_path / "secret.png")])
    assert codes(found) == [None, RowErrorCode.UNREADABLE_URI]
    assert "lies outside" in found[1].message


def test_bad_sounds(engine: VllmEngine, tmp_path: Path) -> None:
    data = [SOUNDS[0], SOUNDS[0][:9000], b"nothing", sound(tone(5.0)), None]
    found = answers(engine, hearing(), call=pa.array(data, pa.binary()))
    broken = [RowErrorCode.INVALID_AUDIO] * 2
    assert codes(found) == [None, *broken, RowErrorCode.MEDIA_TOO_LONG, RowErrorCode.MISSING_VALUE]
    assert "column 'call'" in found[1].message
    (tmp_path / "secret.wav").write_bytes(SOUNDS[0])
    found = answers(engine, hearing(), call=[str(tmp_path / "secret.wav"), "http://127.0.0.1/x.wav"])
    assert codes(found) == [RowErrorCode.UNREADABLE_URI] * 2
    many = answers(engine, hearing(), call=[SOUNDS[:1], SOUNDS])
    assert codes(many) == [None, RowErrorCode.INVALID_VALUE], "the job allows two"


def test_bad_videos(engine: VllmEngine, tmp_path: Path) -> None:
    cut = media_files.video(media_files.frames(0), "matroska")
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    long = media_files.video(media_files.frames(0, 25), rate=1)
    data = [FILMS[0], FILMS[0][:1500], cut[: len(cut) // 2], playlist, sound(tone()), long]
    found = answers(engine, watching(), film=data)
    assert codes(found) == [None, *[RowErrorCode.INVALID_VIDEO] * 4, RowErrorCode.MEDIA_TOO_LONG]
    frames = [still(pixels) for pixels in STILLS[0]]
    found = answers(engine, watching(), film=[frames, [*frames, IMAGES[0]], [frames[0], b"x"], [], [None]])
    missing = [RowErrorCode.MISSING_VALUE] * 2
    assert codes(found) == [None, RowErrorCode.INVALID_VIDEO, RowErrorCode.INVALID_IMAGE, *missing]
    (tmp_path / "secret.mp4").write_bytes(FILMS[0])
    assert codes(answers(engine, watching(), film=[str(tmp_path / "secret.mp4")])) == [RowErrorCode.UNREADABLE_URI]


def test_prompts_that_do_not_fit_their_media(engine: VllmEngine) -> None:
    many = answers(engine, seeing(), photo=[[IMAGES[0]], IMAGES[:2], [IMAGES[0], None]])
    assert codes(many) == [None, RowErrorCode.INVALID_VALUE, RowErrorCode.MISSING_VALUE]
    spec = seeing(prompt=f"{IMAGE}{{text}}")
    assert codes(answers(engine, spec, photo=IMAGES[:2], text=["the " * 188, "short"])) == ["prompt_too_long", None]


def test_what_is_prepared_has_its_bound(engine: VllmEngine) -> None:
    """However many rows the window takes."""
    rows = 150
    found = answers(engine, watching(), film=[FILMS[row % 3] for row in range(rows)])
    assert codes(found) == [None] * rows
    room = engine._loaded().media
    assert room.n_bytes == WINDOW_BYTES
    one = 4 * 3 * 28 * 28 * 4 + 100
    assert WINDOW_BYTES / 2 < room.most < WINDOW_BYTES + room._threads * 2 * one
