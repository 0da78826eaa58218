"""What ``rowmill doctor`` asks of ONNX Runtime: its builds, and each execution provider, proved by a graph that ran."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from typing import Any

from pipeline.engines.probing import answer, installed, probe
from pipeline.host.gpu import has_gpu
from pipeline.spec.check import Check, Status

ADD_GRAPH = base64.b64decode(
    "CAgSADpCCg4KAXgKAXgSAXkiA0FkZBIGZG9jdG9yWhMKAXgSDgoMCAESCAoCCAIKAggDYhMKAXkSDgoMCAESCAoCCAIKAggDQgQKABAN"
)
"""An ONNX model, opset 13: ``y = x + x`` for a float32 [2, 3]. Bytes, so that the ``onnx`` package is not needed."""

_SECONDS = 60
_REMOTE = {"AzureExecutionProvider": "sends rows to a remote endpoint; Rowmill does not use it"}


def checks() -> Iterator[Check]:
    """Each execution provider of the installed ONNX Runtime, proved by a graph that ran on it."""
    wheels = {
        n: v
        for n, v in installed("onnxruntime").items()
        if not n.startswith(("onnxruntime-extensions", "onnxruntime-genai"))
    }
    if not wheels:
        yield Check("engine onnx", "skip", "ONNX Runtime is not installed", "pip install 'rowmill[onnx]'")
        return
    if len(wheels) > 1:
        both = " and ".join(sorted(wheels))
        remedy = f"pip uninstall {' '.join(sorted(wheels))}, then install one: 'rowmill[onnx]' or 'rowmill[onnx-gpu]'"
        yield Check(
            "engine onnx", "fail", f"{both} are installed, and overwrite each other", remedy, {"wheels": wheels}
        )
        return
    ((wheel, version),) = wheels.items()
    listed = probe(__name__, ["providers"], _SECONDS)
    if not listed["ok"]:
        yield Check("engine onnx", "fail", f"{wheel} {version}: {listed['error']}", f"reinstall {wheel}")
        return
    works = []
    for provider in listed["providers"]:
        name = f"engine onnx, {provider.removesuffix('ExecutionProvider')}"
        if provider in _REMOTE:
            yield Check(name, "skip", _REMOTE[provider])
            continue
        result = probe(__name__, ["run", provider], _SECONDS)
        if result["ok"]:
            works.append(provider)
            yield Check(name, "ok", "ran a graph, all of it placed here", facts=result)
        else:
            why = result.get("error") or f"asked for {provider}, ran on {', '.join(result['active'])}"
            status: Status = "fail" if provider == "CPUExecutionProvider" else "warn"
            yield Check(name, status, why, f"not usable here; jobs that name {provider} would be refused", result)
    detail = f"{wheel} {version}; works: {', '.join(p.removesuffix('ExecutionProvider') for p in works) or 'nothing'}"
    facts = {"wheel": wheel, "version": version, "works": works}
    if not works:
        yield Check("engine onnx", "fail", detail, f"reinstall {wheel}", facts)
    elif has_gpu() and not {"CUDAExecutionProvider", "TensorrtExecutionProvider"} & set(works):
        remedy = f"there is a GPU that it does not use: pip uninstall {wheel}; pip install 'rowmill[onnx-gpu]'"
        yield Check("engine onnx", "warn", detail, remedy, facts)
    else:
        yield Check("engine onnx", "ok", detail, facts=facts)


def run_on(provider: str) -> dict[str, Any]:
    """Run a graph on ``provider`` alone; where its nodes really ran.

    ONNX Runtime hands over to the CPU without an error when a provider does not start, so the session's own list and
    the recorded placement are compared with what was asked (fallback is forbidden as well).
    """
    import numpy as np
    import onnxruntime as ort

    if any(name.startswith("onnxruntime-gpu") for name in installed("onnxruntime")):
        ort.preload_dlls()  # as the engine does: CUDA and cuDNN may be there as wheels only
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(ADD_GRAPH, options, providers=[provider])
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (y,) = session.run(None, {"x": x})
    placement = sorted({part.ep_name for part in session.get_provider_graph_assignment_info()})
    active = session.get_providers()
    ok = active[0] == provider and placement in ([provider], []) and np.array_equal(y, x + x)
    return {"ok": bool(ok), "version": ort.__version__, "active": active, "placement": placement}


def providers() -> dict[str, Any]:
    """The providers that this build of ONNX Runtime holds: what to try, not what works."""
    import onnxruntime as ort

    return {"ok": True, "version": ort.__version__, "providers": ort.get_available_providers()}


if __name__ == "__main__":
    sys.exit(answer({"run": run_on, "providers": providers}, sys.argv[1:]))
