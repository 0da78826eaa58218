"""What vLLM's processes write: read, logged, and the last of it remembered, since it says why one of them has ended."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from pipeline.engines.vllm.process import child
from storage.log_actions import Action
from storage.logs import get_logger

log = get_logger(__name__)

STOP_SECONDS = 10.0
"""How long the engine's processes may take to end when asked, before they are killed."""

# What vLLM may write before a line: "(EngineCore pid=12) ERROR 08-01 12:00:00 [core.py:1] ".
_BEFORE = re.compile(r"^(?:\([^()]*pid=\d+\) ?)*(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^(?:[a-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Interrupt|Exit)): (.*)$")
_NOT_THE_CAUSE = "See root cause above"


def first_lines(error: BaseException | str, limit: int = 400) -> str:
    """The message of an error in one line, without the documentation links that pydantic adds."""
    text = str(error) or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if "errors.pydantic.dev" not in line]
    line = " ".join(line for line in lines if line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


class Output:
    """Reads what the engine's processes write, logs it, and remembers the last of it.

    All of it is logged as information, tracebacks too: what the user has to know is raised, as :meth:`reason`.
    """

    def __init__(self, on_process: Callable[[int], None]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rowmill-vllm-"))
        self.pipe = self._folder / "output"
        os.mkfifo(self.pipe, mode=0o600)
        self._on_process = on_process
        self._tail: deque[str] = deque(maxlen=400)
        self.lines = 0
        """How many came."""
        self._thread = threading.Thread(target=self._read, name="vllm-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self.pipe.open(errors="replace") as lines:  # waits until a process opens its end
            for line in lines:
                if line.startswith(child.HELLO):
                    self._on_process(int(line.removeprefix(child.HELLO)))
                    continue
                self.lines += 1
                self._tail.append(_BEFORE.sub("", line.rstrip()))
                log.info("vllm: %s", line.rstrip(), action=Action.ENGINE_OUTPUT)

    def reason(self) -> tuple[str, str] | None:
        """Type and message of the last exception that a process reported, or ``None``."""
        lines = list(self._tail)
        for index in range(len(lines) - 1, -1, -1):
            match = _EXCEPTION.match(lines[index])
            if match and _NOT_THE_CAUSE not in match[2]:
                more = [line for line in lines[index + 1 : index + 4] if line and not line.startswith("Traceback")]
                return match[1], first_lines(" ".join([match[2], *more]))
        return None

    def wait_for_end(self, timeout: float) -> None:
        """Until every process has closed its end, so that its last words are here."""
        self._thread.join(timeout)

    def close(self) -> None:
        if self._thread.is_alive():
            # No process ever came: open the other end for it, so that the reader wakes up.
            with contextlib.suppress(OSError):
                os.close(os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK))
        self._thread.join(STOP_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)
