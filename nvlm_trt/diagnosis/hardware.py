"""Examines the processor, the memory and the GPUs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import psutil

from nvlm_trt.diagnosis.finding import Finding, note, ok, warning
from nvlm_trt.machine import available_cores, cpu_flags

# what each instruction set is for, by its Linux name
_FEATURES = {
    "avx2": "floating point",
    "fma": "floating point",
    "avx512f": "floating point",
    "avx512_vnni": "8-bit products",
    "avx_vnni": "8-bit products",
    "avx512_bf16": "bf16 products",
    "amx_int8": "8-bit matrices",
    "amx_bf16": "bf16 matrices",
}
_EIGHT_BIT = {"avx512_vnni", "avx_vnni", "amx_int8"}
_LEAST_MEMORY = 2 << 30  # bytes that are free: an engine of a tiny model, and an image of the largest size
_QUERY_SECONDS = 20


def examine_hardware() -> list[Finding]:
    """Return findings about the processor, the memory and the GPUs."""
    return [_processor(), _memory(), *gpu_findings(query_gpus())]


def _processor() -> Finding:
    found = [name for name in _FEATURES if name in cpu_flags()]
    detail = f"{available_cores()} cores; {', '.join(found) or 'no known instruction sets'}"
    if cpu_flags() and not _EIGHT_BIT & cpu_flags():
        return note("processor", f"{detail}; without VNNI or AMX, so 8-bit engines add up in 16 bits and are slower")
    return ok("processor", detail)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} GB of {memory.total / 1e9:.1f} GB are available"
    if memory.available < _LEAST_MEMORY:
        return warning("memory", detail, "end other programs, or take a larger machine")
    return ok("memory", detail)


def query_gpus() -> list[dict[str, str]] | str:
    """Ask nvidia-smi for the GPUs: name, driver, memory, compute capability. Return what is wrong where none answer."""
    executable = shutil.which("nvidia-smi")
    if executable is None:
        return "nvidia-smi is not on PATH" if Path("/dev/nvidiactl").exists() else "no NVIDIA GPU"
    fields = ("name", "driver_version", "memory.total", "compute_cap")
    command = [executable, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi fails ({type(error).__name__})"
    if result.returncode:
        return f"nvidia-smi fails ({' '.join((result.stdout + result.stderr).split())[:200]})"
    rows = [line.split(", ") for line in result.stdout.splitlines() if line.strip()]
    return [dict(zip(fields, row, strict=False)) for row in rows]


def has_gpu() -> bool:
    """Return whether nvidia-smi lists a GPU."""
    gpus = query_gpus()
    return not isinstance(gpus, str) and bool(gpus)


def gpu_findings(gpus: list[dict[str, str]] | str) -> list[Finding]:
    """Make a finding of each GPU, or one of what is wrong."""
    if isinstance(gpus, str):
        if gpus == "no NVIDIA GPU":
            return [note("GPU", gpus)]
        return [warning("GPU", gpus, "install NVIDIA's driver, or give the container the GPU (docker run --gpus all)")]
    if not gpus:
        return [note("GPU", "nvidia-smi lists no GPU")]
    return [
        ok(
            f"GPU {number}",
            f"{gpu.get('name')}, {gpu.get('memory.total')}, compute capability {gpu.get('compute_cap')}, driver "
            f"{gpu.get('driver_version')}",
        )
        for number, gpu in enumerate(gpus)
    ]
