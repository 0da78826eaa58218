"""What vLLM's own entry points answer, computed in a process of its own that runs beside the first tests."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import psutil

from tests.engines.vllm import support

# One engine after another, each for its questions: (model, options, [[entry point, arguments, sampling, adapter], …]).
# They run in that very process: vLLM's own processes take ten seconds of CPU each to import what this one has.
SCRIPT = """
import gc, json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

def main():
    found = []
    for model, options, questions in json.load(sys.stdin):
        llm = LLM(model, enforce_eager=True, **options)
        found.append([answers(llm, *question) for question in questions])
        del llm
        gc.collect()
    with open(sys.argv[1], "w") as out:
        json.dump(found, out)

def answers(llm, entry, arguments, sampling, adapter):
    options = {"use_tqdm": False}
    if sampling is not None:
        many = [params(one) for one in sampling] if isinstance(sampling, list) else params(sampling)
        options["sampling_params"] = many
    if adapter is not None:
        options["lora_request"] = LoRARequest(adapter, sum(adapter.encode()), adapter)
    arguments = [[with_media(one) for one in argument] if isinstance(argument, list) else argument
                 for argument in arguments]
    keywords = arguments.pop() if isinstance(arguments[-1], dict) else {}
    return [outline(done) for done in getattr(llm, entry)(*arguments, **keywords, **options)]

def with_media(prompt):
    if not (isinstance(prompt, dict) and "media_files" in prompt):
        return prompt
    import numpy as np
    import PIL.Image
    from vllm.multimodal.audio import resample_audio_pyav
    found = {}
    for kind, files in prompt["media_files"].items():
        if kind == "image":
            found[kind] = [PIL.Image.open(file).convert("RGB") for file in files]
        elif kind == "video":
            found[kind] = [np.load(file) for file in files]
        else:
            sounds = [(np.load(file), rate) for file, rate in files]
            found[kind] = [(resample_audio_pyav(sound, orig_sr=rate, target_sr=16000), 16000) for sound, rate in sounds]
    return {"prompt": prompt["prompt"], "multi_modal_data": found}

def params(sampling):
    given = dict(sampling)
    if "structured_outputs" in given:
        given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
    return SamplingParams(**given)

def outline(done):
    out = done.outputs
    if isinstance(out, list):
        texts = [one.text for one in sorted(out, key=lambda one: one.index)]
        logprobs = [
            [[token, {t: p.logprob for t, p in at.items()}] for token, at in zip(one.token_ids, one.logprobs)]
            for one in out if one.logprobs is not None
        ]
        return {"texts": texts, "tokens": list(done.prompt_token_ids), "logprobs": logprobs,
                "reasons": [one.finish_reason for one in out], "made": sum(len(one.token_ids) for one in out)}
    value = out.embedding if hasattr(out, "embedding") else out.probs if hasattr(out, "probs") else out.score
    return {"value": value, "tokens": list(done.prompt_token_ids)}

if __name__ == "__main__":
    main()
"""

Question = tuple[str, list[Any], Any, str | None]


class Reference:
    """A started process; :meth:`answers` waits for it."""

    def __init__(self, folder: Path, engines: list[tuple[str, dict[str, Any], list[Question]]]) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] = support.start(folder, SCRIPT, "found.json")
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(engines))
        self._process.stdin.close()
        self._process.stdin = None
        self._found: list[Any] | None = None

    def answers(self) -> list[Any]:
        """For each engine, for each of its questions, the answers."""
        if self._found is None:
            _, errors = self._process.communicate()
            assert self._process.returncode == 0, errors
            self._found = json.loads((self._folder / "found.json").read_text())
        return self._found

    def close(self) -> None:
        """End it, with the engine that it may be running: that would hold its output open for ever."""
        if self._process.poll() is None:
            family = psutil.Process(self._process.pid)
            for process in (*family.children(recursive=True), family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.communicate()
