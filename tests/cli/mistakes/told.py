"""What it means that a command told a user what is wrong."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Done

CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 124, 130}
"""Those that the reference documents."""
EMBED = ("-m", "fake", "-t", "embed", "--column", "text", "-q")


def told(done: Done, *codes: int, home: Path | None = None) -> Done:
    """The command ended with one of ``codes`` (any that is documented), and left no log of a crash."""
    assert done.code in (codes or CODES), done
    assert "defect in Rowmill" not in done.out + done.err, done.err
    assert "Traceback" not in done.out + done.err, done.err
    assert done.code in (0, 130) or done.err.strip()
    assert home is None or not list(home.parent.glob("data/logs/crash*"))
    return done


def deep(levels: int, kind: str = "list") -> str:
    """JSON text that is nested so deep."""
    return "[" * levels + "]" * levels if kind == "list" else '{"a":' * levels + "1" + "}" * levels
