"""Which models vLLM can run for a task, as far as their files say it. Imports nothing of vLLM."""

from __future__ import annotations

from pipeline.models.model import Model
from pipeline.spec.job_spec import JobSpec, Task
from storage.errors import InvalidModel


def check_model(model: Model, spec: JobSpec, *, pools: bool) -> None:
    """Raises :class:`InvalidModel`. ``pools``: the task wants no text of it."""

    def refuse(what: str) -> InvalidModel:
        return InvalidModel(f"{model.name!r} {what}", field="model")

    if model.path is None:
        raise refuse("is built in; engine 'vllm' runs a model directory")
    if not model.architectures:
        if model.onnx_files or model.path.suffix == ".onnx":
            raise refuse("is an ONNX graph; it runs on engine 'onnx', with task embed, classify, score or tensor")
        raise refuse("has no config.json that names its architecture; vLLM needs one")
    kind = ", ".join(model.architectures)
    if not model.autoregressive and not pools:
        raise refuse(
            f"is a {kind}, which does not generate text; engine 'vllm' runs decoder language models (…ForCausalLM). "
            "Use task embed, classify or score with engine 'onnx'"
        )
    if model.config.get("is_encoder_decoder") and (spec.task is not Task.GENERATE or spec.audio_column is None):
        raise refuse(
            f"is a {kind} with an encoder and a decoder; of these, engine 'vllm' runs those that transcribe, with task "
            "generate, audio_column and a prompt for the decoder"
        )
    chosen = spec.engine_options.get("load_format", "auto") != "auto"
    if not chosen and model.path.is_dir() and not any(model.path.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in model.path.glob(pattern))
        if pickles:
            raise refuse(f"has pickled weights only ({pickles[0]}), which can run code; convert them to safetensors")
