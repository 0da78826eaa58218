"""What one call on a vLLM engine has measured."""

from __future__ import annotations

from pipeline.engines.vllm.process.scheduler_stats import Gauges


class Measures:
    """What one call has measured and not handed on yet: its seconds of rendering, and the engine's gauges meanwhile.

    Two calls at the same time measure the same engine: each of them its mean state while the call lasted. What happens
    once (``preemptions``) is told to one of them.
    """

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges
        self._sums = gauges.sums()
        self._given = 0.0
        self.render_seconds = 0.0

    def rest(self) -> dict[str, float]:
        """What has been added since this was asked last."""
        now, rendered = self._gauges.sums(), self.render_seconds
        found = {name: value - self._sums[name] for name, value in now.items()}
        found["preemptions"] = self._gauges.new_preemptions()
        found["render_seconds"] = rendered - self._given
        self._sums, self._given = now, rendered
        return found
