"""Implements `nvlm-trt doctor`: examines the machine, and an engine against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_trt import terminal
from nvlm_trt.commands.shared_options import JsonOption

if TYPE_CHECKING:
    from nvlm_trt.diagnosis.finding import Finding


def doctor(
    engine: Annotated[Path | None, typer.Argument(help="Engine directory to examine against this machine.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Write FILE.zip for an issue report: findings, versions, manifest; no secrets.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Examine this machine: packages, backends, processor, GPUs, tritonserver, memory, disk, ports.

    Exit status 2: an error, something does not work; 1: a warning, it works with a risk; 0: neither.

    Example: nvlm-trt doctor engines/nvlm-h --bundle report.zip
    """
    from nvlm_trt.diagnosis.bundle import write_bundle
    from nvlm_trt.diagnosis.engine_check import examine_engine
    from nvlm_trt.diagnosis.finding import exit_status
    from nvlm_trt.diagnosis.hardware import examine_hardware
    from nvlm_trt.diagnosis.server import examine_server
    from nvlm_trt.diagnosis.software import examine_software

    findings = [*examine_software(), *examine_hardware(), *examine_server()]
    if engine is not None:
        findings += examine_engine(engine)
    status = exit_status(findings)
    if as_json:
        records = [finding.model_dump() for finding in findings]
        print(json.dumps({"status": status, "findings": records}, indent=2, allow_nan=False))
    else:
        for finding in findings:
            _print(finding)
    if bundle is not None:
        names = write_bundle(bundle, findings, engine)
        terminal.note(f"wrote {bundle}: {', '.join(names)}")
    raise typer.Exit(status)


def _print(finding: Finding) -> None:
    severity = finding.severity.name.lower()
    print(f"{severity:8}{finding.name}: {finding.detail}")
    if finding.remedy is not None:
        print(f"{'':8}  {finding.remedy}")
