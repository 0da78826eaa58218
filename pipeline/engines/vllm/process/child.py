"""What runs first in vLLM's engine process, in place of the main module of the program that started it.

Started with ``spawn``, a process imports its parent's main module; the engine has no use for it, and a script without
the ``if __name__ == "__main__"`` guard would run twice. So it is given this module instead, which settles the process:
all its output goes to a pipe that the parent reads (never to the parent's standard output), Ctrl-C in the terminal does
not reach it (the parent decides when it ends), and its id is reported, so that it can be watched from its first moment.
"""

from __future__ import annotations

import errno
import os
import time

READER_SECONDS = 60.0
"""How long the parent may take to open its end of the pipe."""
OUTPUT = "_ROWMILL_ENGINE_OUTPUT"
"""Environment variable: the named pipe for the output of the engine's processes."""
HELLO = "rowmill engine process "
"""What the first line that a process writes begins with; its id follows."""


def settle() -> None:
    """Do all this, once: the engine's own workers inherit it."""
    pipe = os.environ.pop(OUTPUT, None)
    if pipe is None:
        return
    os.setpgid(0, 0)
    output = _opened(pipe)
    os.write(output, f"{HELLO}{os.getpid()}\n".encode())
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    # Progress bars are for terminals; every redraw would be a line of log.
    os.environ.setdefault("TQDM_DISABLE", "1")


def _opened(pipe: str) -> int:
    """The pipe, to write to. A parent that is gone will not read it, and nobody knows of this process yet: it ends."""
    parent, deadline = os.getppid(), time.monotonic() + READER_SECONDS
    while True:
        try:
            output = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or os.getppid() != parent or time.monotonic() > deadline:
                os._exit(1)
            time.sleep(0.01)
        else:
            os.set_blocking(output, True)
            return output


if __name__ == "__mp_main__":
    settle()
