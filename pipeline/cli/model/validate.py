"""``rowmill model validate``: whether a model gives what it should, on a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import errors
from pipeline.cli.command import Invocation, command
from pipeline.cli.model.commands import TaskName, report, row_fields
from pipeline.cli.model.registry import located

if TYPE_CHECKING:
    from pipeline.models.compare import Limits

_SHOWN = (
    "model",
    "against",
    "precision",
    "rows",
    "only_one",
    "max_difference",
    "relative_error",
    "tolerance",
    "cosine_mean",
    "cosine_min",
    "agreement",
    "relative_difference",
    "length_change",
    "spearman",
    "top10_overlap",
    "verdict",
    "reasons",
    "report",
    "state",
)


@command
def validate(
    invocation: Invocation,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A registered model (NAME, NAME@2), a directory or a .onnx file.")
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Rows to compare on; some hundreds are enough.", show_default=False),
    ],
    task: Annotated[TaskName, typer.Option("-t", "--task", metavar="TASK", help="embed, classify, score or tensor.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that it should agree with; by default its checkpoint in PyTorch, else the active revision.",
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(metavar="COLUMN", help="The text or image.")] = None,
    pair_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="The second text of a pair.")] = None,
    prompt_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="embed: a prompt of the model's own, such as query.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="embed: put before every text, such as 'query: '.")
    ] = None,
    graph_input: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=COLUMN", help="tensor: the column of a graph input.")
    ] = None,
    engine_option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the engine's own.")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(metavar="X", help="embed, tensor: least cosine of any row; 0.95 by default.")
    ] = None,
    mean_cosine: Annotated[
        float | None, typer.Option(metavar="X", help="embed, tensor: least mean cosine; 0.985 by default.")
    ] = None,
    length_change: Annotated[
        float | None,
        typer.Option(
            "--max-length-change",
            metavar="X",
            help="embed, tensor: change of a vector's length; 0.1 by default, 0.01 for unit length.",
        ),
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(metavar="X", help="classify: least share of rows with the same label; 0.99 by default."),
    ] = None,
    relative_difference: Annotated[
        float | None,
        typer.Option(
            "--max-relative-difference",
            metavar="X",
            help="classify, score, tensor: root mean square of the differences, over the spread; 0.25 by default.",
        ),
    ] = None,
    max_difference: Annotated[
        float | None, typer.Option(metavar="X", help="Largest difference of any number; not looked at by default.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Whose registered model it is.")] = None,
) -> int:
    """Say whether a model gives what it should on a sample: PASS, or FAIL or INSUFFICIENT and exit code 1.

    The report of a registered model is stored with its revision; only a PASS activates it.
    """
    given = {
        "min_cosine": min_cosine,
        "mean_cosine": mean_cosine,
        "agreement": agreement,
        "max_difference": max_difference,
        "relative_difference": relative_difference,
        "length_change": length_change,
    }
    limits, asked = _limits(task, {name: value for name, value in given.items() if value is not None})
    texts = {"column": column, "pair_column": pair_column, "prompt_name": prompt_name, "prefix": prefix}
    fields = row_fields(graph_input, engine_option, input=inputs, task=task, **texts)
    document = _validated(invocation, model, against, tenant, fields, limits, asked)
    shown = {key: document[key] for key in _SHOWN if document.get(key) not in (None, [], ())}
    report(invocation, document if invocation.as_json else shown)
    return errors.OK if document["verdict"] == "PASS" else errors.ERROR


def _validated(
    invocation: Invocation,
    model: str,
    against: str | None,
    tenant: str | None,
    fields: dict[str, Any],
    limits: Limits,
    asked: frozenset[str],
) -> dict[str, Any]:
    """The report, stored with the revision where the model is a registered one."""
    from pipeline.diagnostics.validation import Request, validate
    from pipeline.registry import names
    from storage.errors import InvalidModel

    settings = invocation.loaded.settings
    reference = None if against is None else located(invocation, against, tenant)
    found = names.parse(model)
    if found is None:
        return validate(settings, Request(model, fields, limits, asked, reference), invocation.notice)
    with invocation.client() as client:
        client.on_notice(invocation.notice)
        if not client.models.known(found.name, tenant):
            return validate(settings, Request(model, fields, limits, asked, reference), invocation.notice)
        revision, broken = client.models.get(model, tenant), None
        active = client.models.active(found.name, tenant)
        alternative = (
            None if active is None or active.id == revision.id else client.models.path(active.reference, tenant)
        )
        try:
            path = client.models.path(revision.reference, tenant)
        except InvalidModel as error:  # a load error is a FAIL, and counts
            path, broken = revision.place, str(error)
        request = Request(path, fields, limits, asked, reference, alternative)
        document = validate(settings, request, invocation.notice, broken)
        document |= {"model": revision.reference, "digest": revision.digest}
        stored = client.models.judged(revision, document["verdict"], document)
        return document | {"report": stored.id, "state": str(client.models.get(revision.reference, tenant).state)}


def _limits(task: TaskName, given: dict[str, float]) -> tuple[Limits, frozenset[str]]:
    """The task's limits, with those that were given in their place, and which these are.

    Raises :class:`~storage.errors.InvalidJob` for one that the task's results have nothing for.
    """
    from dataclasses import asdict, replace

    from pipeline.models.compare import DEFAULTS
    from storage.errors import InvalidJob

    usual = DEFAULTS[task]
    able = {name for name, limit in asdict(usual).items() if limit is not None} | {"max_difference"}
    if task == "embed":
        able.add("relative_difference")
    for name in given:
        if name not in able:
            raise InvalidJob(
                f"the results of task '{task}' have none; limits are {', '.join(sorted(able))}", field=name
            )
    return replace(usual, **given), frozenset(given)
