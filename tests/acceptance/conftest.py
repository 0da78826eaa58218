"""The command line as a user has it, as in ``tests/cli``."""

from tests.cli.conftest import rowmill

__all__ = ["rowmill"]
