"""Images with prompts, for multimodal models: the answers are those of ``LLM.generate`` and ``LLM.chat``."""

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

from pipeline.engines.base import EngineContext, RowBatch, RowFailure
from pipeline.engines.vllm import VllmEngine
from pipeline.job_spec import JobSpec, Task
from pipeline.row_errors import RowErrorCode
from storage.errors import InvalidInput
from tests.engines import vllm_support as support
from tests.engines.contract import run
from tests.engines.tiny_blip2 import TOKENS, build_blip2
from tests.engines.vllm_reference import Question, Reference

pytestmark = pytest.mark.vllm

OPTIONS = {"dtype": "float32", "max_model_len": 128}
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def image(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (*reversed(size), 3), dtype=np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


IMAGES = [image(seed) for seed in range(3)]
TEXTS = ["What is it?", "And this?", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    build_blip2(folder)
    for at, data in enumerate(IMAGES):
        (folder / f"{at}.png").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    files = [str(folder / f"{at}.png") for at in range(3)]
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in IMAGES]
    talks = [
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
            },
        ]
        for url, text in zip(urls, TEXTS, strict=True)
    ]
    prompts = [{"prompt": "What is it?", "image_files": [file]} for file in files]
    asked: list[Question] = [("generate", [prompts], GREEDY, None), ("chat", [talks], GREEDY, None)]
    reference = Reference(tmp_path_factory.mktemp("reference"), [(str(folder / "blip2"), OPTIONS, asked)])
    yield reference
    reference.close()


@pytest.fixture(scope="module")
def engine(folder: Path, reference: Reference) -> Iterator[VllmEngine]:
    def fetch(uri: str) -> bytes:
        if not uri.startswith(str(folder)):
            raise InvalidInput(f"{uri} lies outside")
        return Path(uri).read_bytes()

    context = EngineContext(folder / "cache", fetch=fetch)
    engine = VllmEngine(support.model_at(folder / "blip2"), Task.GENERATE, OPTIONS, context)
    engine.load()
    yield engine
    engine.close()


def make_spec(task: str = "generate", **fields: Any) -> JobSpec:
    if task == "generate":
        fields.setdefault("prompt", "What is it?")
    given = {"image_column": "photo", "engine_options": OPTIONS, "sampling": GREEDY}
    return support.make_spec(task, **{**given, **fields})


def answers(engine: VllmEngine, spec: JobSpec, **columns: Any) -> list[Any]:
    batch = pa.RecordBatch.from_pydict(columns)
    found = run(engine, spec, [RowBatch(np.arange(batch.num_rows), batch)])
    return [found[row] for row in range(batch.num_rows)]


def same(found: list[Any], wanted: list[Any]) -> None:
    for answer, known in zip(found, wanted, strict=True):
        assert not isinstance(answer, RowFailure), answer
        assert [answer["output"]] == known["texts"]
        assert answer["prompt_tokens"] == len(known["tokens"])


def test_prompts_with_an_image(folder: Path, engine: VllmEngine, reference: Reference) -> None:
    """From bytes, from URIs, and from both in a struct."""
    wanted = reference.answers()[0][0]
    assert len({known["texts"][0] for known in wanted}) == 3, "the images make a difference"
    same(answers(engine, make_spec(), photo=IMAGES), wanted)
    assert len(wanted[0]["tokens"]) > TOKENS, "they have places in the prompt"
    paths = [str(folder / f"{at}.png") for at in range(3)]
    same(answers(engine, make_spec(), photo=paths), wanted)
    pairs = [{"bytes": None, "path": paths[0]}, {"bytes": IMAGES[1], "path": None}, {"bytes": IMAGES[2], "path": "x"}]
    same(answers(engine, make_spec(), photo=pairs), wanted)


def test_messages_with_images(engine: VllmEngine, reference: Reference) -> None:
    """They go before the text of the user's last message."""
    wanted = reference.answers()[0][1]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{text}"}]
    spec = make_spec("chat", messages=turns)
    same(answers(engine, spec, photo=[[data] for data in IMAGES], text=TEXTS), wanted)


def test_bad_images_fail_alone(folder: Path, engine: VllmEngine, tmp_path: Path) -> None:
    data = [IMAGES[0], IMAGES[0][:200], b"nothing", b"", None]
    found = answers(engine, make_spec(), photo=pa.array(data, pa.binary()))
    assert found[0]["completion_tokens"] == 8
    assert [answer.code for answer in found[1:4]] == [RowErrorCode.INVALID_IMAGE] * 3
    assert found[4].code == RowErrorCode.MISSING_VALUE
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    found = answers(engine, make_spec(), photo=[str(folder / "0.png"), str(tmp_path / "secret.png")])
    assert found[0]["completion_tokens"] == 8
    assert found[1].code == RowErrorCode.UNREADABLE_URI
    assert "lies outside" in found[1].message


def test_prompts_that_do_not_fit_their_images(engine: VllmEngine) -> None:
    many = answers(engine, make_spec(), photo=[[IMAGES[0]], IMAGES[:2], [IMAGES[0], None]])
    assert many[0]["completion_tokens"] == 8
    assert many[1].code == RowErrorCode.INVALID_VALUE, "the model takes one image"
    assert many[2].code == RowErrorCode.MISSING_VALUE
    long = answers(engine, make_spec(prompt="{text}"), photo=IMAGES[:2], text=["the " * 124, "short"])
    assert long[0].code == RowErrorCode.PROMPT_TOO_LONG
    assert long[1]["completion_tokens"] == 8


def test_text_alone(engine: VllmEngine) -> None:
    spec = support.make_spec(engine_options=OPTIONS, sampling=GREEDY)
    assert answers(engine, spec, text=["Name a river."])[0]["completion_tokens"] == 8
