"""From what a job calls its model to the model on disk: a registered revision, verified, or a path."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from pipeline.registry import files, names, remote
from storage.errors import InvalidModel, NotFound
from storage.objects.store import ObjectStore
from storage.records import Job
from storage.registry import reports, revisions
from storage.registry.records import Owned, Revision
from storage.sql.database import Database


@dataclass(frozen=True, slots=True)
class Resolver:
    """Reads the registry and the models' files. ``notify`` tells the user something worth a line."""

    database: Database
    store: ObjectStore
    cache_dir: Path
    notify: Callable[[str], None] = lambda message: None

    def named(self, text: str, tenant: str | None) -> Revision | None:
        """The revision that ``text`` means for a tenant; ``None`` where it is a path.

        A registered name goes before a path of the same name, which is ``./NAME``. Raises :class:`InvalidModel` for a
        registered name without an active revision, or without the revision or alias that is asked for.
        """
        found = names.parse(text)
        owned = None if found is None else revisions.visible(self.database, tenant, found.name)
        if found is None or owned is None:
            return None
        there = os.path.lexists(text)
        try:
            revision = self._meant(owned, found)
        except NotFound as error:
            if there:
                self.notify(f"model {text!r} is the path: {error}")
                return None
            raise InvalidModel(str(error), field="model") from error
        except InvalidModel as error:
            raise InvalidModel(f"{error.message}{f'; the path is ./{text}' if there else ''}", field="model") from None
        if there:
            self.notify(f"model {text!r} is the registered one, {revision.reference}; the path is './{text}'")
        return revision

    def is_registered(self, text: str, tenant: str | None) -> bool:
        """Whether ``text`` means a registered model for a tenant, whatever revisions that has."""
        found = names.parse(text)
        return found is not None and revisions.visible(self.database, tenant, found.name) is not None

    def model(self, revision: Revision) -> Model:
        """The model of a revision, fetched where it lies on an object store; each file is verified against its digest.

        Raises :class:`InvalidModel` naming the file that is not the one that was registered.
        """
        artifacts = revisions.artifacts(self.database, revision.id)
        place = revision.place
        if remote.is_remote(place):
            place = str(remote.fetched(self.store, revision, artifacts, self.cache_dir, self.notify))
        if artifacts:
            files.verify(revision.reference, Path(place), artifacts, self.cache_dir)
        model = resolve(place, self.cache_dir)
        files.refuse_others(revision.reference, model, revision.digest, artifacts)
        return model

    def of_job(self, job: Job, name: str) -> Model:
        """The model that a job was submitted with; ``name`` is its model's path where that is not registered."""
        if job.model is None:
            return resolve(name, self.cache_dir)
        revision = revisions.by_id(self.database, str(job.model["revision_id"]))
        if revision is None:
            raise InvalidModel(f"{name} was removed from the registry; submit a new job", field="model")
        return self.model(revision)

    def kept(self, revision: Revision) -> dict[str, Any]:
        """What a job keeps of the revision that it was submitted with, its reports included."""
        found = reports.of_revision(self.database, revision)
        return {
            "name": revision.model.name,
            "tenant": revision.model.tenant,
            "revision": revision.number,
            "revision_id": revision.id,
            "digest": revision.digest,
            "state": str(revision.state),
            "reports": [{"id": report.id, "verdict": report.verdict, "at": report.at} for report in found],
        }

    def chosen(self, owned: Owned, asked: names.Reference) -> Revision | None:
        """The revision of the number or alias that is asked for; ``None`` of a name alone. Raises :class:`NotFound`."""
        if asked.number is not None:
            return revisions.get(self.database, owned, asked.number)
        return None if asked.alias is None else revisions.by_alias(self.database, owned, asked.alias)

    def _meant(self, owned: Owned, asked: names.Reference) -> Revision:
        found = self.chosen(owned, asked) or revisions.active(self.database, owned)
        if found is None:
            newest = revisions.listed(self.database, model=owned)[-1]
            raise InvalidModel(
                f"no revision of model {owned} is active: activate one ('rowmill model activate {owned.name}'), or "
                f"name one ({newest.reference})",
                field="model",
            )
        return found
