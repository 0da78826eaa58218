"""The form in which the doctor's checks report, those of engines included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from storage.redaction import redact_text

Status = Literal["ok", "warn", "fail", "skip"]
"""``skip``: not installed, not configured or not asked for; nothing to worry about."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ``remedy`` is what to do; ``facts`` are the same findings for programs; ``unreachable`` marks an
    outside system that does not answer."""

    name: str
    status: Status
    detail: str
    remedy: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    unreachable: bool = False

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON values, with the passwords in URLs hidden."""
        return {
            "name": self.name,
            "status": self.status,
            "detail": redact_text(self.detail),
            "remedy": self.remedy,
            "facts": dict(self.facts),
            "unreachable": self.unreachable,
        }
