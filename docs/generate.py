"""Writes the pages of ``docs/reference`` that follow from the code: states, row errors, settings, engine options, the
client, the fake engine, the log, the job schema.

``make docs`` runs it; a test compares the committed files with what it would write. With ``--check`` it writes nothing
and ends with 1 when a file is out of date.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.client.client import Client
from pipeline.client.handle import JobHandle
from pipeline.config.settings import Settings
from pipeline.engines.fake.faults import FakeOptions
from pipeline.engines.onnx.runtime.options import OnnxOptions
from pipeline.engines.vllm.options.engine_args import OWN_OPTIONS
from pipeline.spec import error_codes
from pipeline.spec.job_spec import JobSpec
from storage import states
from storage.log_actions import Action
from storage.logs import FIELDS

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
ORIGIN = "<!-- Generated from {source} by `make docs`; do not edit. -->"

MACHINES: tuple[tuple[str, type[StrEnum], Mapping[Any, frozenset[Any]], frozenset[Any]], ...] = (
    ("Job", states.JobState, states.JOB, states.TERMINAL_JOB),
    ("Shard", states.ShardState, states.SHARD, frozenset()),
    ("Attempt", states.AttemptState, states.ATTEMPT, frozenset()),
    ("Request", states.RequestState, states.REQUEST, frozenset()),
    ("Fire", states.FireState, states.FIRE, frozenset()),
    ("Revision of a model", states.RevisionState, states.REVISION, frozenset()),
    ("Batch", states.BatchState, states.BATCH, frozenset()),
)
"""Heading, enum, table, and the states in which it rests although the table leads on."""

LEVELS = {
    "debug": ("debug",),
    "info": ("info",),
    "warning": ("warning",),
    "error": ("error",),
    "exception": ("error",),
    "failure": ("warning", "error"),
    "critical": ("critical",),
}
"""Method of a log → the levels of its records: a ``failure`` that is not of ours is an error."""


def attribute_docs(cls: type) -> dict[str, str]:
    """Name → docstring of every attribute of a class that has one, in order, as Markdown on one line."""
    tree = ast.parse(inspect.getsource(cls))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    found = {}
    for attribute, doc in pairwise(body):
        target = attribute.target if isinstance(attribute, ast.AnnAssign) else None
        if isinstance(attribute, ast.Assign):
            target = attribute.targets[0]  # type: ignore[assignment]
        if (
            isinstance(target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
            and isinstance(doc.value.value, str)
        ):
            found[target.id] = markdown(doc.value.value)
    return found


def markdown(doc: str) -> str:
    """A docstring as Markdown: code in single backticks, one line."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(doc.split()))
    return text.replace("``", "`")


def levels_of_actions() -> dict[str, str]:
    """Name of an ``Action`` → the levels at which the code logs it, lowest first."""
    found: dict[str, set[str]] = {}
    for path in (path for package in ("pipeline", "storage", "tasks") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS:
                for word in node.keywords:
                    name = ast.unparse(word.value)
                    if word.arg == "action" and name.startswith("Action."):
                        found.setdefault(name.removeprefix("Action."), set()).update(LEVELS[node.func.attr])
    order = list(dict.fromkeys(level for levels in LEVELS.values() for level in levels))
    return {name: ", ".join(sorted(levels, key=order.index)) for name, levels in found.items()}


def table(*rows: tuple[str, ...]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def diagram(kind: type[StrEnum], moves: Mapping[Any, frozenset[Any]], resting: frozenset[Any]) -> str:
    """The state machine in Mermaid. It begins with the first state of the enum."""

    def lines() -> Iterator[str]:
        yield "stateDiagram-v2"
        yield f"    [*] --> {next(iter(kind))}"
        for state in kind:
            for target in (target for target in kind if target in moves[state]):
                yield f"    {state} --> {target}"
            if state in resting or not moves[state]:
                yield f"    {state} --> [*]"

    return "\n".join(["```mermaid", *lines(), "```"])


STATES = """\
What may follow what. Anything else raises `IllegalTransition` and changes nothing; every move is an entry in the \
job's events."""

ROW_ERRORS = f"""\
A row that cannot be computed is in the output all the same: its `error` holds a `code` from this table and a \
`message` of at most {error_codes.MESSAGE_LIMIT} characters, and its result columns are null. The codes are stable; \
the messages are for people."""

FAKE = """\
`model="fake"` runs every task without a model. Answers follow from a row's content alone, so that tests of your own \
can rest on them: `generate` and `chat` give `fake:`, eight hexadecimal digits of the prompt's SHA-256 and the \
beginning of the prompt; `embed` a unit vector of eight elements; `classify` one of three labels; `score` a number \
from 0 to 1; `tensor` one column `output`, the sum of the row's numbers. A token is a word."""

FAULTS = """\
Given as `engine_options` (`--set` on the command line). A row is matched by its text: the rendered prompt, the text \
column (for a pair, both), or the sum of the row's numbers."""


LOG = """\
Every process logs to standard error, from `log_level` on. Secrets are hidden in every record, tracebacks included.

`log_level` is `warning` unless you set it, so records of level `info` do not show. To see when a worker claims a \
shard and how an attempt ends, start the worker with `ROWMILL_LOG_LEVEL=info`, or [set \
`log_level`](../how-to/settings.md) in its configuration.

`log_format=console` (the default) writes a line for people: time, level, module, text, and the fields in brackets.

```
2026-03-01 12:00:00,123 WARNING pipeline.jobs.plan_queue: job 0192… could not be planned, trying again later: … \\
[action=plan.postponed tenant=ada job_id=0192… worker=host:812:5f0c11aa]
```

`log_format=json` writes one JSON object on every line, for records of Rowmill and of the libraries it uses (Celery, \
SQLAlchemy, uvicorn, vLLM's processes), and for Python's warnings. `rowmill worker start`, `rowmill serve` and \
`rowmill beat` then write nothing else to standard error, once their settings are read: their notices have \
`action=command.notice`, the error that ends them `command.failed`. Other commands go on telling people about their \
progress; `-q` leaves that out.

Every object has `event` (the text), `level`, `logger`, `timestamp` (UTC, ISO 8601), and `exception` (the traceback) \
where there is one. Records of Rowmill have an `action`. Whatever is logged during the planning, an attempt or the \
publishing of a job carries its ids too, as far as they are known: {fields}. `shard` and `attempt` are the numbers \
that `rowmill job show` shows."""

ACTIONS = """\
These names are stable; the texts are for people. Where `error` stands beside `warning`, it is for an unexpected \
error."""

SETTINGS = """\
How a process runs; a job never carries any of it. Where they are set: [Configure it](../how-to/settings.md). A size \
is in bytes."""

ENGINE_OPTIONS = """\
Given with `--set NAME=VALUE`, or as the job's `engine_options`."""

ONNX = """\
`engine="onnx"`. Another name for `threads` is `intra_op_num_threads`."""

VLLM_ARGUMENTS = "https://docs.vllm.ai/en/latest/configuration/engine_args.html"
VLLM = f"""\
`engine="vllm"`: every [engine argument of vLLM]({VLLM_ARGUMENTS}) under its own name, with vLLM's defaults for \
offline use, except for a few that Rowmill decides itself, and those that [the operator has to \
allow](../how-to/engine-options.md). On a CPU the default of `enforce_eager` is true, and the cache takes 4 GiB, or a \
quarter of the memory. And Rowmill's own:"""

CLIENT = """\
`from pipeline import Client, JobSpec, JobFailed, JobCancelled, RowmillError`. `Client(data_dir="…")` takes any of the \
[settings](settings.md) by its name; the others are read as the command line reads them. Whatever goes wrong is a \
`RowmillError`: a wrong argument too, and the call of a client that is closed."""


def states_page() -> str:
    parts = [ORIGIN.format(source="`storage/states.py`"), "# States", STATES]
    for heading, kind, moves, resting in MACHINES:
        docs = attribute_docs(kind)
        rows = [
            (
                f"`{state}`",
                ", ".join(f"`{target}`" for target in kind if target in moves[state]) or "–",
                docs[state.name],
            )
            for state in kind
        ]
        about = markdown(inspect.getdoc(kind) or "")
        parts += [f"## {heading}", about, diagram(kind, moves, resting), table(("State", "Moves to", "Meaning"), *rows)]
    return "\n\n".join(parts) + "\n"


def row_errors_page() -> str:
    docs = attribute_docs(error_codes.RowErrorCode)
    rows = [(f"`{code}`", docs[code.name]) for code in error_codes.RowErrorCode]
    origin = ORIGIN.format(source="`pipeline/spec/error_codes.py`")
    return "\n\n".join([origin, "# Row errors", ROW_ERRORS, table(("Code", "Meaning"), *rows)]) + "\n"


def fake_engine_page() -> str:
    docs = attribute_docs(FakeOptions)
    rows = []
    for name, field in FakeOptions.model_fields.items():
        rows.append((f"`{name}`", default(field), docs[name]))
    parts = [
        ORIGIN.format(source="`pipeline/engines/fake/faults.py`"),
        "# The fake engine",
        FAKE,
        "## Scripted faults",
        FAULTS,
        table(("Option", "Default", "Meaning"), *rows),
        markdown((inspect.getdoc(FakeOptions) or "").partition("\n\n")[2]),
    ]
    return "\n\n".join(parts) + "\n"


def logs_page() -> str:
    docs = attribute_docs(Action)
    levels = levels_of_actions()
    rows = [(f"`{action}`", levels[action.name], docs[action.name]) for action in Action]
    parts = [
        ORIGIN.format(source="`storage/log_actions.py` and the calls of logs"),
        "# The log",
        LOG.format(fields=", ".join(f"`{name}`" for name in FIELDS[1:])),
        "## Actions",
        ACTIONS,
        table(("Action", "Level", "Meaning"), *rows),
    ]
    return "\n\n".join(parts) + "\n"


def default(field: Any) -> str:
    """A field's default as a reader would type it."""
    value = field.default
    if field.default_factory is not None or value is None:
        return "–"
    return f"`{json.dumps(value, default=str)}`"


def settings_page() -> str:
    docs = attribute_docs(Settings)
    places = {"data_dir": "`~/.local/share/rowmill`", "cache_dir": "`~/.cache/rowmill`"}
    rows = [
        (f"`{name}`", places.get(name) or default(field), docs.get(name, ""))
        for name, field in Settings.model_fields.items()
    ]
    origin = ORIGIN.format(source="`pipeline/config/settings.py`")
    return "\n\n".join([origin, "# Settings", SETTINGS, table(("Setting", "Default", "Meaning"), *rows)]) + "\n"


def engine_options_page() -> str:
    docs = attribute_docs(OnnxOptions)
    onnx = [(f"`{name}`", default(field), docs[name]) for name, field in OnnxOptions.model_fields.items()]
    own = [(f"`{name}`", markdown(meaning)) for name, meaning in OWN_OPTIONS.items()]
    parts = [
        ORIGIN.format(
            source="`pipeline/engines/onnx/runtime/options.py` and `pipeline/engines/vllm/options/options.toml`"
        ),
        "# Engine options",
        ENGINE_OPTIONS,
        "## ONNX Runtime",
        ONNX,
        table(("Option", "Default", "Meaning"), *onnx),
        "## vLLM",
        VLLM,
        table(("Option", "Meaning"), *own),
    ]
    return "\n\n".join(parts) + "\n"


def client_page() -> str:
    parts = [ORIGIN.format(source="`pipeline/client/client.py` and `handle.py`"), "# The Python client", CLIENT]
    for cls in (Client, JobHandle):
        rows = []
        for name, member in vars(cls).items():
            function = member.fget if isinstance(member, property) else member
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            call = "" if isinstance(member, property) else signature(function)
            rows.append((f"`{name}{call}`", markdown(inspect.getdoc(function) or "")))
        parts += [f"## {cls.__name__}", markdown(inspect.getdoc(cls) or ""), table(("Call", "What it does"), *rows)]
    return "\n\n".join(parts) + "\n"


def signature(function: Any) -> str:
    """Its parameters and defaults, without types."""
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]
    return str(inspect.Signature(plain))


def job_schema() -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobSpec.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def pages() -> dict[Path, str]:
    """File → what it should hold."""
    return {
        REFERENCE / "states.md": states_page(),
        REFERENCE / "row-errors.md": row_errors_page(),
        REFERENCE / "settings.md": settings_page(),
        REFERENCE / "engine-options.md": engine_options_page(),
        REFERENCE / "client.md": client_page(),
        REFERENCE / "fake-engine.md": fake_engine_page(),
        REFERENCE / "logs.md": logs_page(),
        REFERENCE / "job-spec.schema.json": job_schema(),
    }


def main(arguments: list[str]) -> int:
    found = pages()
    stale = [path for path, text in found.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" not in arguments:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found[path], encoding="utf-8")
        verb = "is out of date" if "--check" in arguments else "written"
        sys.stderr.write(f"{path.relative_to(REFERENCE.parent.parent)} {verb}\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
