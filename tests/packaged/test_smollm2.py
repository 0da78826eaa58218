"""SmolLM2, a real chat model: what vLLM answers in a job is what Transformers answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.smollm2 import build_smollm2
from pipeline import Client
from pipeline.config.settings import Settings

QUESTIONS = ["Name the capital of France.", "Tell a story about the harbour at dawn.", "What is 2 + 2?"]


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_smollm2_answers_on_vllm_as_on_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build_smollm2(tmp_path / "smollm2")
    pq.write_table(pa.table({"text": QUESTIONS}), tmp_path / "in.parquet")
    with Client(settings=Settings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")) as client:
        status = client.run(
            input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), model=str(folder), task="chat",
            prompt="{text}", sampling={"temperature": 0, "max_tokens": 12},
            engine_options={"dtype": "float32", "enforce_eager": True, "max_model_len": 256},
        )  # fmt: skip
    assert (status.state, status.rows_failed) == ("completed", 0)
    answers = pq.read_table(tmp_path / "out" / "data")["output"].to_pylist()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            said = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(said, skip_special_tokens=True)
    assert "Paris" in answers[0]
