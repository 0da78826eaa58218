"""``rowmill model add, list, show, history, activate, rollback, retire, alias, remove``: registered models."""

from __future__ import annotations

import os
import time
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import output, values
from pipeline.cli.command import Invocation, command

if TYPE_CHECKING:
    from pipeline.client.client import Client
    from storage.registry.records import ModelEvent, Revision

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model's name.", show_default=False)]
Reference = Annotated[
    str, typer.Argument(metavar="NAME[@REV]", help="A model; a revision by number or alias.", show_default=False)
]
Tenant = Annotated[
    str | None, typer.Option(metavar="TENANT", help="Whose private model it is; by default the operator's.")
]
Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Why, for the history.")]
PANEL = "Registered models"


@command
def add(
    invocation: Invocation,
    name: Name,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A model directory, a .onnx file, or a URL.", show_default=False)
    ],
    task: Annotated[str | None, typer.Option("-t", "--task", metavar="TASK", help="What it is for.")] = None,
    alias: Annotated[str | None, typer.Option(metavar="ALIAS", help="A name for this revision: NAME@ALIAS.")] = None,
    tenant: Annotated[
        str | None,
        typer.Option(metavar="TENANT", help="Make it private to a tenant; by default every tenant may name it."),
    ] = None,
) -> None:
    """Register a model under a name, as a draft: its content is fixed by its digest, which every load verifies."""
    with invocation.client() as client:
        client.on_notice(invocation.notice)
        revision = client.models.add(name, path, task=task, alias=alias, tenant=tenant)
    _tell(invocation, revision)


@command
def list_models(
    invocation: Invocation,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Those that this tenant may name.")] = None,
) -> None:
    """Registered models, and which revision of each is active."""
    with invocation.client() as client:
        found = groupby(client.models.list(tenant), key=lambda revision: revision.model)
        documents = [_model(client, list(revisions)) for _, revisions in found]
    lines = [
        (
            item["name"],
            item["tenant"],
            item["active"],
            len(item["revisions"]),
            ", ".join(f"{alias}={number}" for alias, number in item["aliases"].items()) or None,
            item["revisions"][-1]["task"],
        )
        for item in documents
    ]
    columns = ("model", "tenant", "active", "revisions", "aliases", "task")
    none = "no models; 'rowmill model add NAME PATH' registers one"
    invocation.show_table({"models": documents}, columns, lines, right=("active", "revisions"), none=none)


@command
def show(invocation: Invocation, name: Reference, tenant: Tenant = None) -> None:
    """One model with its revisions, or one revision with its files and reports."""
    with invocation.client() as client:
        found = client.models.get(name, tenant)
        if "@" in name:
            reports = [
                {"id": report.id, "verdict": report.verdict, "at": report.at, "actor": report.actor}
                for report in client.models.reports(name, tenant)
            ]
            document = {**_revision(found), "tenant": tenant, "reports": reports}
        else:
            document = _model(client, client.models.revisions(name, tenant))
    if invocation.as_json:
        output.emit_json({"model": document})
        return
    if "@" in name:
        shown = {key.replace("_", " "): value for key, value in document.items() if key != "reports"}
        output.emit(output.pairs(shown.items()))
        found_reports = [(item["id"], item["verdict"], output.moment(item["at"])) for item in document["reports"]]
        if found_reports:
            output.emit("\n" + output.table(("report", "verdict", "at"), found_reports))
        return
    aliases = ", ".join(f"{alias}={number}" for alias, number in document["aliases"].items())
    output.emit(
        output.pairs([("model", document["name"]), ("tenant", document["tenant"]), ("aliases", aliases or None)])
    )
    lines = [
        (item["revision"], item["state"], item["task"], item["digest"][:16], item["path"])
        for item in document["revisions"]
    ]
    output.emit("\n" + output.table(("revision", "state", "task", "digest", "path"), lines, right=("revision",)))


@command
def show_history(
    invocation: Invocation,
    name: Name,
    at: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="What was active at that time: 2026-11-30T12:00, or 90m, 24h, 7d ago."),
    ] = None,
    tenant: Tenant = None,
) -> None:
    """What happened to a model, the oldest first: who made which revision active when, and why."""
    moment = None if at is None else values.moment(at, "--at", time.time())
    with invocation.client() as client:
        if moment is not None:
            active = client.models.active_at(name, moment, tenant)
            events = [] if active is None else [active]
        else:
            events = client.models.history(name, tenant)
    documents = [_event(event) for event in events]
    columns = ("at", "actor", "what", "revision", "from", "to", "reason")
    lines = [
        (
            output.moment(event.at),
            event.actor,
            event.type + (f" {event.alias}" if event.alias else "") + (", forced" if event.forced else ""),
            event.number,
            event.from_state,
            event.to_state,
            event.reason,
        )
        for event in events
    ]
    document = {"events": documents} if moment is None else {"active": next(iter(documents), None)}
    none = f"no revision of {name} was active then"
    invocation.show_table(document, columns, lines, right=("revision",), none=none)


@command
def activate(
    invocation: Invocation,
    name: Reference,
    force: Annotated[
        bool, typer.Option("--force", help="Activate it without a validation that passed; the history says so.")
    ] = False,
    reason: Reason = None,
    tenant: Tenant = None,
) -> None:
    """Let jobs that name the model alone get this revision, by default the newest. Its validation must be a PASS."""
    with invocation.client() as client:
        client.on_notice(invocation.notice)
        revision = client.models.activate(name, force=force, reason=reason, tenant=tenant)
    _tell(invocation, revision)


@command
def rollback(invocation: Invocation, name: Name, reason: Reason = None, tenant: Tenant = None) -> None:
    """Make the revision active again that was active before the present one."""
    with invocation.client() as client:
        client.on_notice(invocation.notice)
        revision = client.models.rollback(name, reason=reason, tenant=tenant)
    _tell(invocation, revision)


@command
def retire(invocation: Invocation, name: Reference, reason: Reason = None, tenant: Tenant = None) -> None:
    """Withdraw a revision, by default the active one. Jobs that were submitted with it go on."""
    with invocation.client() as client:
        revision = client.models.retire(name, reason=reason, tenant=tenant)
    _tell(invocation, revision)


@command
def set_alias(
    invocation: Invocation,
    name: Reference,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="NAME@ALIAS then means this revision.")],
    tenant: Tenant = None,
) -> None:
    """Give a revision, by default the newest, a name; or let a name mean another revision from now on."""
    with invocation.client() as client:
        revision = client.models.set_alias(name, alias, tenant=tenant)
    _tell(invocation, revision)


@command
def remove(invocation: Invocation, name: Reference, tenant: Tenant = None) -> None:
    """Forget a revision, by default all of them. The history stays, and so do the files."""
    with invocation.client() as client:
        removed = [revision.reference for revision in client.models.remove(name, tenant=tenant)]
    invocation.show({"removed": removed}, f"{', '.join(removed)} removed")


def register(app: typer.Typer) -> None:
    """Put the commands into ``rowmill model``."""
    commands = {
        "add": add,
        "list": list_models,
        "show": show,
        "history": show_history,
        "activate": activate,
        "rollback": rollback,
        "retire": retire,
        "alias": set_alias,
        "remove": remove,
    }
    for name, function in commands.items():
        app.command(name=name, rich_help_panel=PANEL)(function)


def located(invocation: Invocation, text: str, tenant: str | None = None) -> str:
    """The path of a registered model that a command is given by its name; any other text is a path itself."""
    from pipeline.registry import names

    if names.parse(text) is None:
        return text
    with invocation.client() as client:
        client.on_notice(invocation.notice)
        found = names.required(text)
        if client.models.known(found.name, tenant):
            if os.path.lexists(text):
                invocation.notice(f"model {text!r} is the registered one; the path is './{text}'")
            active = None if "@" in text else client.models.active(found.name, tenant)
            return client.models.path(text if active is None else active.reference, tenant)
    return text


def _tell(invocation: Invocation, revision: Revision) -> None:
    facts = {
        "name": revision.model.name,
        "revision": revision.number,
        "digest": revision.digest,
        "state": str(revision.state),
    }
    invocation.show(facts, output.pairs(facts.items()))


def _model(client: Client, revisions: list[Revision]) -> dict[str, Any]:
    owner = revisions[0].model
    active = [item.number for item in revisions if item.state == "active"]
    return {
        "name": owner.name,
        "tenant": owner.tenant,
        "active": next(iter(active), None),
        "aliases": client.models.aliases(owner.name, owner.tenant),
        "revisions": [_revision(item) for item in revisions],
    }


def _revision(revision: Revision) -> dict[str, Any]:
    return {
        "name": revision.model.name,
        "revision": revision.number,
        "digest": revision.digest,
        "state": str(revision.state),
        "path": revision.place,
        "task": revision.task,
        "created_at": revision.created_at,
    }


def _event(event: ModelEvent) -> dict[str, Any]:
    return {
        "at": event.at,
        "actor": event.actor,
        "from": event.from_state,
        "to": event.to_state,
        "reason": event.reason,
        "forced": event.forced,
        "type": event.type,
        "revision": event.number,
        "digest": event.digest,
        "alias": event.alias,
    }
