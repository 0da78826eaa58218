"""The house around the code: the direction of imports, the Makefile's targets, documents that agree with the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from pipeline.cli.main import app
from pipeline.config.settings import Settings
from pipeline.spec.error_codes import RowErrorCode
from storage import errors

ROOT = Path(__file__).resolve().parents[2]
_GENERATED = {".venv", ".git", "demo-output", "build", "dist", "site"}


def _files(*suffixes: str) -> list[Path]:
    """Files of the project, not of its environment or caches, with one of these suffixes; all of them without any."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [n for n in folders if n not in _GENERATED and not (n.startswith(".") and n.endswith("cache"))]
        folders[:] = [n for n in folders if n not in ("__pycache__", ".hypothesis")]
        found += [Path(folder, name) for name in names if not suffixes or name.endswith(suffixes)]
    return sorted(found)


DOCUMENTS = [path for path in _files(".md") if "node_modules" not in path.parts]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(path: Path, language: str) -> Iterator[str]:
    for match in re.finditer(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        yield match[1]


def test_imports_go_one_way() -> None:
    lint = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 kept" not in done.stdout


def _modules_loaded_by(*names: str) -> set[str]:
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {module.partition(".")[0] for module in done.stdout.split()}


def _modules_of(package: str) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]


def test_importing_loads_no_engine() -> None:
    """The base install has none of these, and whoever submits a job should not wait for them."""
    loaded = _modules_loaded_by(*_modules_of("pipeline"), *_modules_of("storage"))
    assert not loaded & {"vllm", "torch", "onnxruntime", "onnx", "transformers", "tokenizers", "sentence_transformers"}


@pytest.mark.parametrize("module", ["pipeline", "pipeline.spec.job_spec", "storage.states", "storage.errors"])
def test_importing_a_pure_module_loads_neither_database_nor_arrow(module: str) -> None:
    assert not _modules_loaded_by(module) & {"sqlalchemy", "alembic", "celery", "pyarrow", "fsspec"}


TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_the_target(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_alone_lists_the_targets() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert listed == set(TARGETS) == set(phony[1].replace("\\\n", " ").split())
    assert listed >= {"install", "demo", "unit", "check", "test", "vllm", "conformance", "dist", "dist-check", "site"}


def test_the_site_has_every_page() -> None:
    """`make site` refuses a page that its navigation leaves out. The decisions have a page that lists them."""
    named = set(re.findall(r"^ *- (?:.*: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert named == {page for page in pages if not re.match(r"adr/\d", page)}


def test_constraints_are_portable() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.lstrip().startswith("#")]
    assert pins
    for pin in pins:
        assert re.fullmatch(r"[a-z0-9._-]+==[0-9][^ +/]*( ; .+)?", pin), f"not portable: {pin}"


def test_no_file_names_the_machine_it_was_written_on() -> None:
    folders = [str(ROOT), sys.prefix, str(Path.home()), *map(os.environ.get, ("PIP_FIND_LINKS", "UV_FIND_LINKS"))]
    telling = sorted({name for name in folders if name and name.count("/") >= 2})
    for path in _files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for name in telling:
            assert name not in text, f"{_name(path)} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_resolve(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_commands_in_documents_exist(document: Path) -> None:
    """Every ``rowmill`` command line in a document names a real command and real options."""
    for block in _blocks(document, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["rowmill"]:
                _check_command(words)


def _check_command(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{shlex.join(words)}: no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("-"):
            assert word.partition("=")[0] in known | {"--help"}, f"{shlex.join(words)}: no option {word!r}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_python_in_documents_compiles(document: Path) -> None:
    for block in _blocks(document, "python"):
        compile(block, str(document), "exec")


def test_the_pages_on_errors_have_every_code() -> None:
    errors_page = (ROOT / "docs/how-to/errors.md").read_text()
    assert set(re.findall(r"`([a-z0-9_]+)`", errors_page)) >= {str(code) for code in RowErrorCode}
    reference = (ROOT / "docs/reference/cli.md").read_text()
    exit_codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    assert exit_codes <= {int(code) for code in re.findall(r"^\| (\d+) \|", reference, re.MULTILINE)}


def test_the_page_on_settings_names_real_ones() -> None:
    page = (ROOT / "docs/how-to/settings.md").read_text()
    table = page[page.index("| To | set |") :].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)\b", table)) - {"rowmill"}
    assert named and named <= set(Settings.model_fields)


def test_compose_file_holds_together() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    compose = yaml.safe_load(text)
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, f"{name} depends on {needed}"
            has_health = "healthcheck" in services[needed]
            assert how["condition"] != "service_healthy" or has_health, f"{name} waits for the health of {needed}"
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert source.startswith(".") or source in compose["volumes"], f"{name}: volume {source} is not declared"
        for variable in service.get("environment", {}):
            if variable.startswith("ROWMILL_"):
                assert variable.removeprefix("ROWMILL_").lower() in Settings.model_fields, f"{name}: {variable}"
    asked = set(re.findall(r"\$\{(\w+):(?:\?|-\d)", text))
    given = set(re.findall(r"^(\w+)=", (ROOT / "deploy/example.env").read_text(), re.MULTILINE))
    assert asked == given


def test_the_dockerfile_copies_what_the_wheel_needs() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), f"COPY {source}"
            assert f"!{source}" in ignored, f".dockerignore hides {source}"
