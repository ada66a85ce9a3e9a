"""Defines what an examination of a machine finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

from pydantic import BaseModel, ConfigDict, field_serializer

from nvlm_trt.errors import NvlmError


class Severity(IntEnum):
    """How much a finding matters; the greatest is the exit status of `nvlm-trt doctor`, notes count as nothing."""

    OK = -1
    NOTE = 0  # something is not there, and need not be
    WARNING = 1  # works, with a risk or a restriction
    ERROR = 2  # does not work


class Finding(BaseModel):
    """One fact about the machine, and what to do about it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    severity: Severity
    detail: str
    remedy: str | None = None

    @field_serializer("severity")
    def _name_of_severity(self, severity: Severity) -> str:
        return severity.name.lower()


def ok(name: str, detail: str) -> Finding:
    return Finding(name=name, severity=Severity.OK, detail=detail)


def note(name: str, detail: str, remedy: str | None = None) -> Finding:
    return Finding(name=name, severity=Severity.NOTE, detail=detail, remedy=remedy)


def warning(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name=name, severity=Severity.WARNING, detail=detail, remedy=remedy)


def error(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name=name, severity=Severity.ERROR, detail=detail, remedy=remedy)


def tried(name: str, check: Callable[[], str], severity: Severity) -> Finding:
    """Make a finding of a check that returns what it found, or raises an error: `what, where; what to do`."""
    try:
        return ok(name, check())
    except NvlmError as fault:
        detail, _, remedy = str(fault).partition("; ")
        return Finding(name=name, severity=severity, detail=detail, remedy=remedy or None)


def exit_status(findings: Sequence[Finding]) -> int:
    """Return 2 for an error, 1 for a warning, 0 without either."""
    return max([0, *(int(finding.severity) for finding in findings)])
