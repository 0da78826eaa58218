"""Transcription: a model with an encoder for the sound and a decoder for the text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.engines.base import EngineContext, RowBatch, RowFailure
from pipeline.engines.testing import run
from pipeline.engines.vllm.engine import VllmEngine
from pipeline.spec.error_codes import RowErrorCode
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidJob, InvalidModel
from tests.engines.media.media_files import RATE, sound, tone
from tests.engines.vllm import support
from tests.engines.vllm.models.tiny_whisper import PROMPT, build_whisper

pytestmark = pytest.mark.vllm

OPTIONS = {"dtype": "float32", "max_model_len": 64, "skip_mm_profiling": True}
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
TONES = [tone(1.0, 440), tone(1.9, 1500), np.random.default_rng(0).standard_normal(RATE).astype(np.float32) / 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(support.model_at(model), Task.GENERATE, OPTIONS, EngineContext(model.parent / "cache"))
    engine.load()
    yield engine
    engine.close()


def make_spec(**fields: Any) -> JobSpec:
    given = {"prompt": PROMPT, "audio_column": "call", "engine_options": OPTIONS, "sampling": GREEDY}
    return support.make_spec(**{**given, **fields})


def answers(engine: VllmEngine, spec: JobSpec, calls: list[Any]) -> list[Any]:
    batch = pa.RecordBatch.from_pydict({"call": calls})
    found = run(engine, spec, [RowBatch(np.arange(batch.num_rows), batch)])
    return [found[row] for row in range(batch.num_rows)]


def own(engine: VllmEngine, samples: Any) -> Any:
    """What vLLM answers, asked by its own entry point."""
    from vllm import SamplingParams

    async def ask() -> Any:
        prompt = {"prompt": PROMPT, "multi_modal_data": {"audio": (samples, RATE)}}
        params = SamplingParams(**GREEDY)
        *_, last = [part async for part in engine._loaded().running.llm.generate(prompt, params, f"own-{id(samples)}")]
        return last

    return engine._loaded().running.call(ask()).result(60)


def test_transcripts(engine: VllmEngine) -> None:
    wanted = [own(engine, samples) for samples in TONES]
    assert len({known.outputs[0].text for known in wanted}) == 3, "the sounds make a difference"
    found = answers(engine, make_spec(), [sound(samples) for samples in TONES])
    for answer, known in zip(found, wanted, strict=True):
        assert answer["output"] == known.outputs[0].text
        assert answer["prompt_tokens"] == len(known.prompt_token_ids) == 4


def test_what_it_does_not_hear(engine: VllmEngine) -> None:
    """vLLM would drop, without a word, what comes after the model's window."""
    data = [sound(tone(2.0)), sound(tone(2.1)), sound(tone(1.0))[:5000], b"x"]
    found = answers(engine, make_spec(), data)
    assert found[0]["completion_tokens"] == 12
    codes = [answer.code for answer in found[1:] if isinstance(answer, RowFailure)]
    assert codes == [RowErrorCode.MEDIA_TOO_LONG, RowErrorCode.INVALID_AUDIO, RowErrorCode.INVALID_AUDIO]


def test_what_it_does_not_see(engine: VllmEngine) -> None:
    with pytest.raises(InvalidJob, match="takes no images; it takes sounds") as caught:
        answers(engine, make_spec(audio_column=None, image_column="call"), [b"x"])
    assert caught.value.field == "image_column"


@pytest.mark.parametrize("fields", [{"audio_column": None}, {"task": "chat"}])
def test_other_tasks_are_refused(model: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidModel, match="those that transcribe"):
        VllmEngine.check(make_spec(**fields), support.model_at(model), pa.schema({"call": pa.binary()}))
