"""What one attempt at a shard holds, from its claim to its end."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from pipeline.engines.base import Cancellation
from pipeline.execution.attempt_steps import AttemptSteps
from pipeline.inputs.input_rows import InputRows
from pipeline.models import adapters
from pipeline.models.model import Model
from pipeline.output import owner
from pipeline.planning.plan import PlanRecord
from pipeline.process.heartbeat import JOB_STOPPING, LEASE_LOST
from pipeline.process.metrics import Measures
from pipeline.process.runtime import Runtime
from pipeline.requests import job as requests
from pipeline.spec.job_spec import JobSpec, stored
from storage import locations
from storage.errors import InvalidModel, LeaseLost
from storage.log_actions import Action
from storage.logs import get_logger
from storage.queue import attempts
from storage.records import Claim
from storage.sql.database import Database
from storage.sql.retry import retry_write

log = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """Belongs to one attempt. ``spec`` is the job's, with the options that the input's columns decide.

    ``cancel`` fires when the attempt has to stop, and its reason says why. ``directory`` is the attempt's own folder
    of part files. ``measures`` says where its time goes, and ``steps`` notes what it is at.
    """

    runtime: Runtime
    claim: Claim
    spec: JobSpec
    plan: PlanRecord
    model: Model
    cancel: Cancellation
    measures: Measures
    steps: AttemptSteps
    directory: str

    @classmethod
    def open(cls, runtime: Runtime, claim: Claim, cancel: Cancellation, measures: Measures) -> AttemptContext:
        """Read what the claim's job was planned with.

        Raises :class:`InvalidModel` when the model or an adapter changed since, and what :func:`owner.check` raises
        when the output belongs to another job.
        """
        job, shard = claim.job, claim.shard
        spec, plan = stored(job.spec), PlanRecord.from_json(job.plan)
        owner.check(runtime, job)
        model = runtime.models.of_job(claim.job, spec.model)
        if model.digest != plan.model_digest:
            raise InvalidModel(f"{spec.model} changed after the job was planned; submit a new job", field="model")
        _check_adapters(runtime, spec, plan)
        return cls(
            runtime=runtime,
            claim=claim,
            spec=requests.settled(job.engine, spec, model, plan.schema),
            plan=plan,
            model=model,
            cancel=cancel,
            measures=measures,
            steps=AttemptSteps(runtime.database, claim),
            directory=locations.attempt_dir(
                job.output_uri, job.id, shard.idx, shard.gen, claim.attempt_no, secrets.token_hex(4)
            ),
        )

    @property
    def rows(self) -> InputRows:
        """The shard's rows in the input."""
        return self.runtime.input_rows(self.claim.sources, self.claim.shard.slices, self.plan.schema)

    def check_adapters(self) -> None:
        """Raise :class:`InvalidModel` for an adapter that is not the one that the job was planned with."""
        _check_adapters(self.runtime, self.spec, self.plan)

    def check_lease(self) -> None:
        """Raise :class:`LeaseLost` when the attempt was told that it no longer holds its shard."""
        if self.cancel.reason == LEASE_LOST:
            raise LeaseLost(f"attempt {self.claim.attempt_no} no longer holds shard {self.claim.shard.id}")

    def record(self, write: Callable[Concatenate[Database, Claim, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Write about this claim to the database, again while the database does not answer."""
        return retry_write(lambda: write(self.runtime.database, self.claim, *args, **kwargs))

    def hand_back(self, stats: Mapping[str, Any]) -> None:
        """End an attempt that was told to stop, after everything it finished was flushed.

        The shard is cancelled when its job is being wound down, else ready for another attempt. Raises
        :class:`LeaseLost` when fenced.
        """
        self.check_lease()
        if self.cancel.reason == JOB_STOPPING:
            self.record(attempts.cancel, stats=stats)
            return
        self.record(attempts.release, stats=stats)
        log.info("shard %s is handed back: %s", self.claim.shard.id, self.cancel.reason, action=Action.ATTEMPT_RELEASED)


def _check_adapters(runtime: Runtime, spec: JobSpec, plan: PlanRecord) -> None:
    for name, found in adapters.digests(spec.adapters, runtime.settings.cache_dir).items():
        if not plan.has_adapter(name, found):
            raise InvalidModel("it changed after the job was planned; submit a new job", field=f"adapters.{name}")
