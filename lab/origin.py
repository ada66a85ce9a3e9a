"""Records the origin of measured values: machine, code, versions, settings. Runs never mix values of two origins."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.code_state import ROOT, code_state, described
from nvlm_trt.errors import NvlmError

PACKAGES = ("nvlm-trt", "onnxruntime", "numpy", "torch", "transformers")
LOAD = "load"  # differs whenever it is read
BUSY = 0.5


@dataclass(frozen=True)
class Origin:
    """Says on which machine, with which code, versions and settings a run measures."""

    machine: dict[str, Any]
    code: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, Any]

    @classmethod
    def here(cls, settings: Mapping[str, Any], packages: Sequence[str] = PACKAGES) -> Origin:
        """Reads machine, checkout and installed packages. Raises NvlmError if nvlm_trt comes from elsewhere."""
        require_own_package()
        facts = machine()
        if facts[LOAD] > BUSY:
            print(f"note: the machine is busy (load {facts[LOAD]:.1f}); its numbers will scatter", file=sys.stderr)
        return cls(
            facts, code_state(), versions(packages), json.loads(json.dumps(settings, default=str, allow_nan=False))
        )

    def difference(self, record: Mapping[str, Any]) -> str | None:
        """Names the first part in which a run's JSON record differs from this origin; None if nothing differs.

        Raises KeyError, TypeError or AttributeError if `record` is not the record of a run."""
        there, here = without_load(record["machine"]), without_load(self.machine)
        if there != here:
            return f"another machine measured it ({_changed(there, here)})"
        if record["code"] != self.code:
            return f"other code measured it ({described(record['code'])} there, {described(self.code)} here)"
        if record["versions"] != self.versions:
            return f"it has other versions ({_changed(record['versions'], self.versions)})"
        if record["settings"] != self.settings:
            return f"it has other settings ({_changed(record['settings'], self.settings)})"
        return None


def machine() -> dict[str, Any]:
    """Reads the facts that the numbers depend on. The load is the work of other processes just before."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    kilobytes = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    identity = "\n".join([platform.node(), *_lines("/etc/machine-id")])
    return {
        "id": hashlib.sha256(identity.encode()).hexdigest()[:12],  # tells two machines of one kind apart
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(kilobytes[0] / 1e6, 1) if kilobytes else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        LOAD: os.getloadavg()[0],
    }


def without_load(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != LOAD}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def origin_line(record: Mapping[str, Any]) -> str:
    """Writes the line that goes with every table: when, where and with which code its values were measured."""
    when = record["measured"]
    facts, installed = record["machine"], record["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in {"Python": facts["python"], **installed}.items())
    return (
        f"Measured {when['first']} to {when['last']} on {facts['processor']}, {facts['cores']} cores, "
        f"{facts['memory_gb']} GB, {facts['system']}; {described(record['code'])}; {packages}"
    )


def require_own_package() -> None:
    """Raises NvlmError unless nvlm_trt is imported from this checkout, whose code the results name."""
    found = importlib.util.find_spec("nvlm_trt")
    assert found is not None, "lab imports nvlm_trt"
    assert found.origin is not None, "nvlm_trt is a regular package"
    if Path(found.origin).resolve().parent != ROOT / "nvlm_trt":
        raise NvlmError(f"nvlm_trt comes from {found.origin}, not from this checkout; run the command in {ROOT}")


def _changed(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
