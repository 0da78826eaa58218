"""What runs first in vLLM's engine process, in place of the main module of the program that started it.

Started with ``spawn``, a process imports its parent's main module; the engine has no use for it, and a script without
the ``if __name__ == "__main__"`` guard would run twice. So it is given this module instead, which settles the process:
all its output goes to a pipe that the parent reads (never to the parent's standard output), Ctrl-C in the terminal does
not reach it (the parent decides when it ends), and its id is reported, so that it can be watched from its first moment.
"""

from __future__ import annotations

import os

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
    output = os.open(pipe, os.O_WRONLY)
    os.write(output, f"{HELLO}{os.getpid()}\n".encode())
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    # Progress bars are for terminals; every redraw would be a line of log.
    os.environ.setdefault("TQDM_DISABLE", "1")


if __name__ == "__mp_main__":
    settle()
