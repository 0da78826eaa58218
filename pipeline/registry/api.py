"""Registered models as users handle them: ``client.models``. Nothing here knows of a command line or of HTTP."""

from __future__ import annotations

import builtins
import getpass
import os
import platform
from pathlib import Path
from typing import Any

import uuid_utils

from pipeline.boundary import Text, boundary
from pipeline.models.resolve import FAKE, resolve
from pipeline.registry import files, names, remote
from pipeline.registry.resolver import Resolver
from pipeline.spec.job_spec import Task
from pipeline.spec.places import plain_place
from storage import locations
from storage.errors import InvalidJob, NotFound
from storage.registry import activation, history, reports, revisions
from storage.registry.records import ModelEvent, Owned, Report, Revision
from storage.states import RevisionState
from storage.tenants import tenants


@boundary
class Models:
    """The models that are registered in the database of a client: ``client.models``.

    A ``reference`` is ``NAME``, ``NAME@2`` (a revision) or ``NAME@alias``. ``tenant`` names the owner: ``None`` is the
    operator, whose models every tenant may name.
    """

    def __init__(self, resolver: Resolver, actor: Text) -> None:
        self._resolver, self._database, self._actor = resolver, resolver.database, actor

    def add(
        self, name: Text, path: Text, *, task: Text | None = None, alias: Text | None = None, tenant: Text | None = None
    ) -> Revision:
        """Register what lies at ``path`` (a directory, a ``.onnx`` file, a URL, ``fake``) as a draft.

        The same content again is the same revision. Raises :class:`~storage.errors.InvalidModel` where no model is.
        """
        names.check_name(name)
        if tenant is not None:
            tenants.check_name(tenant)
        if alias is not None:
            names.check_alias(alias)
        if task is not None and task not in set(Task):
            raise InvalidJob(f"{task!r} is no task; tasks are {', '.join(Task)}", field="task")
        place = _place(path)
        cache_dir = self._resolver.cache_dir
        there = place
        if remote.is_remote(place):
            there = str(remote.fetched_new(self._resolver.store, place, cache_dir, self._resolver.notify))
        model = resolve(there, cache_dir)
        revision, made = revisions.add(
            self._database,
            Owned(tenant, name),
            digest=model.digest,
            place=place,
            task=task,
            artifacts=files.artifacts_of(model, cache_dir),
            actor=self._actor,
        )
        if not made:
            self._resolver.notify(f"{revision.reference} has this content already; it is {revision.state}")
        if alias is not None:
            revisions.set_alias(self._database, revision, alias, actor=self._actor)
        return revision

    def list(self, tenant: Text | None = None) -> builtins.list[Revision]:
        """Every revision, by name and number; of one tenant and the operator if a tenant is given."""
        return revisions.listed(self._database, tenant=tenant)

    def revisions(self, name: Text, tenant: Text | None = None) -> builtins.list[Revision]:
        """The revisions of one model, the oldest first. Raises :class:`~storage.errors.NotFound`."""
        found = revisions.listed(self._database, model=Owned(tenant, name))
        if not found:
            raise NotFound(f"there is no model {Owned(tenant, name)}; 'rowmill model list' shows those there are")
        return found

    def known(self, name: Text, tenant: Text | None = None) -> bool:
        """Whether a model of this name is registered that the tenant may name."""
        return revisions.visible(self._database, tenant, name) is not None

    def aliases(self, name: Text, tenant: Text | None = None) -> dict[str, int]:
        """Alias → number of the revision that it means."""
        return revisions.aliases(self._database, Owned(tenant, name))

    def get(self, reference: Text, tenant: Text | None = None) -> Revision:
        """The revision that is meant; of a ``NAME`` alone the newest. Raises :class:`~storage.errors.NotFound`."""
        asked = names.required(reference)
        found = self._resolver.chosen(Owned(tenant, asked.name), asked)
        return found or self.revisions(asked.name, tenant)[-1]

    def active(self, name: Text, tenant: Text | None = None) -> Revision | None:
        """The revision that jobs get which name the model alone, if any."""
        return revisions.active(self._database, Owned(tenant, name))

    def history(self, name: Text, tenant: Text | None = None) -> builtins.list[ModelEvent]:
        """Every change, the oldest first; also of a model that was removed."""
        return history.events(self._database, Owned(tenant, name))

    def active_at(self, name: Text, at: float, tenant: Text | None = None) -> ModelEvent | None:
        """The activation of what was active at a time (Unix seconds); ``None`` where nothing was."""
        return history.active_at(self._database, Owned(tenant, name), at)

    def activate(
        self, reference: Text, *, force: bool = False, reason: Text | None = None, tenant: Text | None = None
    ) -> Revision:
        """Let jobs that name the model alone get this revision (of a ``NAME`` alone the newest).

        Raises :class:`~storage.errors.ActivationRefused` unless its newest validation passed (``force`` goes without,
        and the history says so), when it is active already, or when another one became active meanwhile; and
        :class:`~storage.errors.InvalidModel` when its files are not those that were registered.
        """
        revision = self.get(reference, tenant)
        replacing = revisions.active(self._database, revision.model)
        if revision.state is not RevisionState.ACTIVE:
            self._resolver.model(revision)
        return activation.activate(
            self._database, revision, replacing=replacing, actor=self._actor, reason=reason, forced=force
        )

    def rollback(self, name: Text, *, reason: Text | None = None, tenant: Text | None = None) -> Revision:
        """Make the revision active that was so before the one that is.

        Raises :class:`~storage.errors.ActivationRefused` when there is none, and as :meth:`activate` does.
        """
        owned = Owned(tenant, name)
        replacing = revisions.active(self._database, owned)
        target = activation.previous(self._database, owned)
        self._resolver.model(target)
        return activation.roll_back(self._database, target, replacing=replacing, actor=self._actor, reason=reason)

    def retire(self, reference: Text, *, reason: Text | None = None, tenant: Text | None = None) -> Revision:
        """Withdraw a revision; of a ``NAME`` alone the active one. Jobs that were submitted with it go on."""
        asked = names.required(reference)
        if asked.is_name:
            active = self.active(asked.name, tenant)
            if active is None:
                self.revisions(asked.name, tenant)
                raise InvalidJob(f"no revision of {asked.name} is active; name one, {asked.name}@1", field="NAME")
            return activation.retire(self._database, active, actor=self._actor, reason=reason)
        return activation.retire(self._database, self.get(reference, tenant), actor=self._actor, reason=reason)

    def set_alias(self, reference: Text, alias: Text, *, tenant: Text | None = None) -> Revision:
        """Let ``NAME@alias`` mean this revision. Jobs that were submitted keep theirs."""
        names.check_alias(alias)
        revision = self.get(reference, tenant)
        revisions.set_alias(self._database, revision, alias, actor=self._actor)
        return revision

    def remove(self, reference: Text, *, tenant: Text | None = None) -> builtins.list[Revision]:
        """Forget a revision, or of a ``NAME`` alone all of them; the history and the files stay.

        Raises :class:`~storage.errors.Conflict` for one that is active, or that a live job uses.
        """
        asked = names.required(reference)
        found = self.revisions(asked.name, tenant) if asked.is_name else [self.get(reference, tenant)]
        # The active one first: where it stands in the way nothing is removed.
        for revision in sorted(found, key=lambda item: item.state is not RevisionState.ACTIVE):
            revisions.remove(self._database, revision, actor=self._actor)
        return found

    def reports(self, reference: Text, tenant: Text | None = None) -> builtins.list[Report]:
        """What validations of a revision found, the newest first."""
        return reports.of_revision(self._database, self.get(reference, tenant))

    def judged(self, revision: Revision, verdict: Text, document: dict[str, Any]) -> Report:
        """Store the report of a validation with the revision that it is about, and let the verdict count."""
        report = Report(str(uuid_utils.uuid7()), verdict, self._database.clock(), self._actor, document)
        activation.judged(self._database, revision, report)
        return report

    def path(self, reference: Text, tenant: Text | None = None) -> str:
        """Where the files of a revision lie on this machine, fetched and verified; of a ``NAME`` alone the newest."""
        return self._resolver.model(self.get(reference, tenant)).name


def person() -> str:
    """Who the history names: the user of this process, and its host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def _place(path: str) -> str:
    """An absolute path, or a URL."""
    if path == FAKE:
        return FAKE
    try:
        plain_place(path)
    except ValueError as error:
        raise InvalidJob(str(error), field="PATH") from None
    place = locations.normalize(path)
    if remote.is_remote(place) or not os.path.exists(place):  # noqa: PTH110 - false, too, for what can be no path
        return place
    # The name of a file counts, not that of the file it leads to: hubs keep "model.onnx" under a hash.
    file = Path(place)
    return str(file.parent.resolve() / file.name if file.is_file() else file.resolve())
