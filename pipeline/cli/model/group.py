"""``rowmill model``: all of its commands together."""

from __future__ import annotations

from pipeline.cli.model import benchmark, registry, validate
from pipeline.cli.model.commands import app as app

app.command(name="benchmark")(benchmark.benchmark)
app.command(name="validate")(validate.validate)
registry.register(app)
