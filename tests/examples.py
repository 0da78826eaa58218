"""How many examples Hypothesis tries: few by default, all of them with ``HYPOTHESIS_PROFILE=thorough``."""

from __future__ import annotations

import os

import hypothesis

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
_SHARE = 8
"""By default a test tries one in this many of the examples that it has in the thorough profile."""


def examples(thorough: int) -> int:
    """The number for ``settings(max_examples=…)`` of a test that has ``thorough`` examples in the thorough profile."""
    return thorough if PROFILE == "thorough" else max(5, thorough // _SHARE)


def load_profile() -> None:
    """Before any test is collected. How long an example takes is up to the machine, so that none has a deadline."""
    hypothesis.settings.register_profile("rowmill", deadline=None, max_examples=examples(200))
    hypothesis.settings.load_profile("rowmill")
