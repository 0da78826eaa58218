"""``rowmill model``: all of its commands together."""

from __future__ import annotations

from pipeline.cli.model import benchmark, registry
from pipeline.cli.model.commands import app as app

app.command(name="benchmark")(benchmark.benchmark)
registry.register(app)
