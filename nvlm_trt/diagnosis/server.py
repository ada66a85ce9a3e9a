"""Examines what `nvlm-trt serve` needs: tritonserver, shared memory, descriptors, ports; and free disk."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from nvlm_trt.diagnosis.finding import Finding, Severity, note, ok, tried, warning
from nvlm_trt.errors import NvlmError, ServerError
from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.serving.triton.command import REQUEST_SIZE_OPTION, knows
from nvlm_trt.serving.triton.install import TritonInstall, check_stub, find_libpython, find_triton
from nvlm_trt.serving.triton.ports import bind_port
from nvlm_trt.serving.triton.process_limits import check_descriptors, most_descriptors
from nvlm_trt.serving.triton.shared_memory import largest_request
from nvlm_trt.temporary import temporary_folder

PORTS = {"gRPC": 8001, "HTTP": 8000, "metrics": 8002, "gateway": 8080}
_SHARED_MEMORY = Path("/dev/shm")
_FEW_DESCRIPTORS = 1024
_LEAST_DISK = 2 << 30
# NVIDIA's bulletin of August 2025: a stranger who reaches the HTTP port can end or take over the server
_ADVISORIES = "CVE-2025-23310, CVE-2025-23311, CVE-2025-23319, CVE-2025-23320, CVE-2025-23334"


def examine_server() -> list[Finding]:
    """Return findings about tritonserver and what it takes of the machine."""
    return [_triton(), _shared_memory(), _descriptors(), *map(_port, PORTS), *_disks()]


def _triton() -> Finding:
    try:
        install = find_triton()
        check_stub(install.stub)
        find_libpython()
    except ServerError as error:
        detail, _, remedy = str(error).partition("; ")
        return warning("tritonserver", detail, remedy or "use `nvlm-trt gateway`, which needs no Triton")
    return triton_finding(install)


def triton_finding(install: TritonInstall) -> Finding:
    """Name a tritonserver and its version; warn of one that lacks the security fixes of 25.07."""
    detail = f"{triton_version(install)} at {install.executable}"
    if knows(install.executable, REQUEST_SIZE_OPTION):
        return ok("tritonserver", detail)
    return warning(
        "tritonserver",
        f"{detail} is older than 25.07 and has known holes ({_ADVISORIES})",
        "serve to networks that you trust, or from NVIDIA's container 25.07 or newer (docs/triton.md)",
    )


def triton_version(install: TritonInstall) -> str:
    """Name the version by the file that NVIDIA's builds have, by the container, or by the wheel."""
    root = install.executable.parent.parent
    try:
        return f"tritonserver {(root / 'TRITON_VERSION').read_text(encoding='utf-8').strip()[:40]}"
    except OSError:
        pass
    if release := os.environ.get("NVIDIA_TRITON_SERVER_VERSION"):
        return f"tritonserver of {release}"
    try:
        return f"tritonserver of nvidia-pytriton {importlib.metadata.version('nvidia-pytriton')}"
    except importlib.metadata.PackageNotFoundError:
        return "tritonserver of an unknown version"


def _shared_memory() -> Finding:
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return note(str(_SHARED_MEMORY), "is not there; tritonserver needs it")
    free, needed = status.f_bavail * status.f_frsize, largest_request(ImageLimits())
    detail = f"{free >> 20} MiB free"
    if free < needed:
        return warning(
            str(_SHARED_MEMORY),
            f"{detail}, the largest request has {needed >> 20} MiB",
            f"enlarge it (docker run --shm-size={(needed >> 30) + 2}g)",
        )
    return ok(str(_SHARED_MEMORY), detail)


def _descriptors() -> Finding:
    def check() -> str:
        check_descriptors()
        return f"{most_descriptors()} files and connections at once"

    found = tried("descriptors", check, Severity.ERROR)
    if found.severity is Severity.OK and most_descriptors() < _FEW_DESCRIPTORS:
        return warning("descriptors", found.detail, "raise the limit (docker run --ulimit nofile=65536)")
    return found


def _port(name: str) -> Finding:
    port = PORTS[name]
    try:
        bind_port("127.0.0.1", port).close()
    except NvlmError:
        return note(f"port {port}", f"is in use ({name})", f"choose another with --{name.lower()}-port, or 0")
    return ok(f"port {port}", f"is free ({name})")


def _disks() -> list[Finding]:
    """Report free disk in the working directory and for temporary files."""
    return [_disk("disk", Path.cwd), _disk("disk for temporary files", temporary_folder)]


def _disk(name: str, find: Callable[[], Path]) -> Finding:
    found = tried(name, lambda: str(find()), Severity.ERROR)
    if found.severity is not Severity.OK:
        return found
    free = shutil.disk_usage(found.detail).free
    detail = f"{free / 1e9:.1f} GB free in {found.detail}"
    if free < _LEAST_DISK:
        return warning(name, detail, "free space there; an engine takes the size of its checkpoint")
    return ok(name, detail)
