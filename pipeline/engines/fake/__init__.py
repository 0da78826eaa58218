"""The engine ``fake``: answers without a model, for tests of pipelines and of engines that wrap another one."""

from __future__ import annotations

from pipeline.engines.fake.engine import FakeEngine

__all__ = ["FakeEngine"]
