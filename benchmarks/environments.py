"""Virtual environments for the peers of the benchmarks: each peer has its own, installed when it is first asked for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NEVER = "; sys_platform == 'never'"
SECONDS = 1800
"""Most that an installation, or an attempt, may take."""
SCRIPTS = Path(__file__).parent / "peers"


@dataclass(frozen=True, slots=True)
class Peer:
    """``requirements`` for pip, and packages that are ``left_out`` though something asks for them."""

    requirements: Sequence[str]
    left_out: Sequence[str] = ()


def working(folder: Path, peers: Mapping[str, Peer], script: str, arguments: Sequence[str]) -> tuple[
    dict[str, list[str]], dict[str, str]
]:  # fmt: skip
    """The command of every peer that works here, and for the others the last line of why not.

    ``python peers/SCRIPT NAME *arguments`` is a peer; with ``--try`` after that its exit status says whether it works.
    Environments are in ``folder``, by name; one that is there with the same requirements is taken as it is.
    """
    found, missing = {}, {}
    for name, peer in peers.items():
        python = folder.resolve() / name / "bin" / "python"
        command = [str(python), str(SCRIPTS / script), name, *arguments]
        reason = _install(python, peer) or _reason([*command, "--try"])
        if reason:
            missing[name] = reason
        else:
            found[name] = command
    return found, missing


def _install(python: Path, peer: Peer) -> str | None:
    environment = python.parent.parent
    stamp, wanted = environment / ".requirements", json.dumps([*peer.requirements, *peer.left_out])
    if stamp.exists() and stamp.read_text() == wanted:
        return None
    uv = str(Path(sys.executable).with_name("uv"))
    shutil.rmtree(environment, ignore_errors=True)
    # As the Makefile does: PyTorch's CPU build out of the wheels that pip knows, else out of PyTorch's index.
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    if links:
        os.environ["UV_FIND_LINKS"] = links.replace(" ", ",")
    backend = [] if links else ["--torch-backend", "cpu"]
    if reason := _reason([uv, "venv", "-q", "--python", sys.executable, str(environment)]):
        return reason
    overrides = environment / "left-out.txt"
    overrides.write_text("".join(f"{package} {NEVER}\n" for package in peer.left_out))
    install = [uv, "pip", "install", "-q", *backend, "--overrides", str(overrides), "--python", str(python)]
    if reason := _reason([*install, *peer.requirements]):
        return reason
    stamp.write_text(wanted)
    return None


def _reason(command: list[str]) -> str | None:
    """``None`` when it works, otherwise the last it said."""
    with tempfile.TemporaryFile("w+") as errors:  # not a pipe, which what it leaves running would keep open
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"no end after {SECONDS} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
    return None if process.returncode == 0 else (lines or ["it ended without a word"])[-1][:200]
