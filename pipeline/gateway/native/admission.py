"""What a job that comes over HTTP may name, beyond what any job may: its caller has no hand on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pipeline.engines import registry
from pipeline.engines.base import Permissions
from pipeline.gateway.auth import Caller
from pipeline.gateway.context import Gateway
from pipeline.models.resolve import FAKE
from pipeline.process.permissions import check_adapters, inside
from pipeline.spec.job_spec import JobSpec, parse
from storage.errors import EngineMissing, InvalidInput, InvalidJob, InvalidModel
from storage.locations import normalize, protocol


def admitted(gateway: Gateway, caller: Caller, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job with the caller's tenant. Raises :class:`InvalidJob` for what only an operator may name."""
    if fields.get("tenant") not in (None, caller.tenant):
        raise InvalidJob("the tenant is that of the API key; leave it out", field="tenant")
    given = {**fields, "tenant": caller.tenant}
    spec = parse(given)
    _check_places(gateway, spec)
    if spec.model != FAKE and not gateway.runtime.models.is_registered(spec.model, spec.tenant):
        raise InvalidModel(
            f"there is no registered model {spec.model!r}; over HTTP a job names registered ones ('rowmill model add')",
            field="model",
        )
    # As in a fleet, also with --embedded: no directory of this machine.
    permissions = Permissions(
        engine_options=frozenset(gateway.settings.allowed_engine_options),
        custom_op_paths=gateway.settings.custom_op_paths,
        own_machine=False,
    )
    check_adapters(spec, permissions)
    if spec.engine_options:
        for engine in registry.names() if spec.engine == "auto" else (spec.engine,):
            with suppress(EngineMissing):
                registry.check_permissions(engine, spec.engine_options, permissions)
    return given


def _check_places(gateway: Gateway, spec: JobSpec) -> None:
    prefixes = [normalize(item.replace("{tenant}", spec.tenant)) for item in gateway.settings.job_uri_prefixes]
    for field, uris in (("input", spec.input), ("output", (spec.output,))):
        for uri in uris:
            if not prefixes:
                raise InvalidInput(
                    "jobs over HTTP may name no place yet: the operator allows some by the setting job_uri_prefixes",
                    field=field,
                )
            relative = protocol(uri) == "file" and not uri.startswith(("/", "file:"))
            if relative or ".." in uri.split("/") or inside(uri, prefixes) is None:
                raise InvalidInput(
                    f"{uri!r} lies outside the places that the operator's setting job_uri_prefixes allows", field=field
                )
