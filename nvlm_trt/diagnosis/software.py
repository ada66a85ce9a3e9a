"""Examines Python, the packages that nvlm-trt was made for, and the backends."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from nvlm_trt.backends.spec import BackendSpec
from nvlm_trt.backends.table import backend_names, find_backend
from nvlm_trt.diagnosis.finding import Finding, Severity, error, note, ok, tried, warning
from nvlm_trt.diagnosis.hardware import has_gpu
from nvlm_trt.extras import EXTRAS

_PACKAGE = "nvlm-trt"
_OLDEST, _TOO_NEW = (3, 10), (3, 14)


def examine_software() -> list[Finding]:
    """Return findings about Python, the package's requirements, its extras and its backends."""
    return [_python(), *_packages(), *_backends()]


def _python() -> Finding:
    version = f"{platform.python_implementation()} {platform.python_version()}"
    if _OLDEST <= sys.version_info[:2] < _TOO_NEW:
        return ok("python", version)
    return error("python", f"{version} is not supported", "install nvlm-trt for Python 3.10 to 3.13")


def _packages() -> Iterator[Finding]:
    """Compare the installed versions with the ranges that this nvlm-trt names."""
    try:
        lines = [Requirement(line) for line in importlib.metadata.requires(_PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        yield warning("packages", f"{_PACKAGE} runs from a folder, so its requirements are unknown", "pip install .")
        return
    yield _group("packages", [line for line in lines if _applies(line, "")], f"pip install --upgrade {_PACKAGE}", True)
    for extra in EXTRAS:
        needed = [line for line in lines if _applies(line, extra) and not _applies(line, "")]
        yield _group(f"extra {extra}", needed, f"pip install '{_PACKAGE}[{extra}]'", False)


def _applies(line: Requirement, extra: str) -> bool:
    return line.name != _PACKAGE and (line.marker is None or line.marker.evaluate({"extra": extra}))


def _group(name: str, needed: list[Requirement], remedy: str, required: bool) -> Finding:
    versions = {line.name: _version(line.name) for line in needed}
    missing = sorted(package for package, version in versions.items() if version is None)
    unfit = sorted(
        f"{line.name} {versions[line.name]} is not {line.specifier}"
        for line in needed
        if (version := versions[line.name]) is not None and not line.specifier.contains(version, prereleases=True)
    )
    if not missing and not unfit:
        return ok(name, ", ".join(f"{package} {version}" for package, version in sorted(versions.items())))
    lacking = [f"{', '.join(missing)} not installed"] if missing else []
    detail = "; ".join([*unfit, *lacking])
    if required:
        return error(name, detail, remedy)
    return warning(name, detail, remedy) if unfit else note(name, detail, remedy)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends() -> Iterator[Finding]:
    """Probe every backend. What one lacks is a note as long as another one runs."""
    found = [_backend(find_backend(name)) for name in backend_names()]
    yield from found
    if all(finding.severity != Severity.OK for finding in found):
        yield error("backends", "no backend can run here", f"pip install --upgrade {_PACKAGE}")


def _backend(spec: BackendSpec) -> Finding:
    found = tried(f"backend {spec.name}", spec.probe, Severity.NOTE)
    if found.severity is Severity.OK and spec.device == "cuda" and not has_gpu():
        return note(found.name, f"{found.detail}, without a GPU to run its engines on")
    return found
