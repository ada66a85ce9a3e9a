"""Describes the client's machine and the versions of its packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("nvlm-trt", "tritonclient", "grpcio", "numpy")


def versions() -> dict[str, str]:
    """Returns package -> version, "unknown" for a package that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def machine() -> dict[str, Any]:
    """Returns operating system, CPU, cores that this process may use, and memory in kB (1024 bytes)."""
    return {
        "system": platform.platform(),
        "cpu": _cpu_name() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{psutil.virtual_memory().total >> 10} kB",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cpu_name() -> str | None:
    """Returns the CPU's model name. Neither platform nor psutil knows it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)
