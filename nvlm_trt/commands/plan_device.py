"""Finds the device that `nvlm-trt plan` plans for: a GPU by name, the GPU of this machine, or rates that are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from nvlm_trt.errors import NvlmError
from nvlm_trt.planner.gpus import GPUS, Figure, Gpu, find_gpu, recognise

if TYPE_CHECKING:
    from nvlm_trt.backends.spec import BackendSpec

AUTO = "auto"
_LEAST_RATE, _MOST_RATE = 1e-6, 1e9


@dataclass(frozen=True)
class Device:
    """One processor with its memory. What is None is not known."""

    title: str
    memory: float | None = None  # bytes
    bandwidth: float | None = None  # bytes per second
    rate: Callable[[str], float] | None = None  # precision -> operations per second
    gpu: Gpu | None = None

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"title": self.title, "memory": self.memory, "bandwidth": self.bandwidth}
        if self.gpu:
            figures = {name: asdict(figure) for name, figure in self.gpu.figures.items()}
            record = {"name": self.gpu.name, "title": self.gpu.title, **figures}
        return record


def find_device(
    spec: BackendSpec, gpu: str | None, bandwidth: float | None, tflops: float | None, memory: float | None
) -> Device:
    """Find the device of a backend. `gpu`: a name or "auto"; `bandwidth` in GB/s; `memory` in GB.

    Raises NvlmError for options that contradict each other, and for a GPU that is not known."""
    on_gpu = spec.memory.device == "gpu"
    if gpu is not None and not on_gpu:
        raise NvlmError(f"the backend {spec.name} runs on the CPU; leave out --gpu, or choose another --backend")
    rates = [rate for rate in (bandwidth, tflops) if rate is not None]
    if gpu is not None and rates:
        raise NvlmError("--gpu has a bandwidth and rates of its own; give it, or --bandwidth and --tflops")
    if memory is not None and not _LEAST_RATE <= memory <= _MOST_RATE:
        raise NvlmError(f"--memory {memory:g} is not a size in GB; give 80 for example")
    if len(rates) == 1 or not all(_LEAST_RATE <= rate <= _MOST_RATE for rate in rates):
        raise NvlmError(
            f"a time follows from both --bandwidth and --tflops, above 0 ({_LEAST_RATE:g} to {_MOST_RATE:g}); give "
            "both or none"
        )
    nbytes = None if memory is None else memory * 1e9
    if gpu is not None:
        found = _gpu_of_this_machine() if gpu == AUTO else find_gpu(gpu)
        if nbytes is not None:
            found = replace(found, memory=Figure(nbytes, "--memory"))
        return Device(found.title, found.memory.value, found.bandwidth.value, found.rate, found)
    if not on_gpu:
        nbytes = nbytes or _memory_of_this_machine()
    title = "a GPU" if on_gpu else "this machine"
    if bandwidth and tflops:
        return Device(title, nbytes, bandwidth * 1e9, lambda precision: tflops * 1e12)
    return Device(title, nbytes)


def _gpu_of_this_machine() -> Gpu:
    """Return the GPU that nvidia-smi lists, with its memory. Raises NvlmError for none, for several kinds, and for one
    whose data sheet is not known."""
    from nvlm_trt.diagnosis.hardware import query_gpus

    listed = query_gpus()
    remedy = f"name one with --gpu: {', '.join(GPUS)}"
    if isinstance(listed, str) or not listed:
        reason = listed if isinstance(listed, str) else "nvidia-smi lists no GPU"
        raise NvlmError(f"--gpu auto finds no GPU here ({reason}); {remedy}")
    names = sorted({gpu["name"] for gpu in listed})
    if len(names) > 1:
        raise NvlmError(f"--gpu auto finds different GPUs here ({', '.join(names)}); {remedy}")
    found = recognise(names[0])
    if found is None:
        raise NvlmError(
            f"--gpu auto finds {names[0]}, whose data sheet is not known here; {remedy}, or give --bandwidth, --tflops "
            "and --memory"
        )
    mebibytes = listed[0].get("memory.total", "").removesuffix(" MiB")
    if not mebibytes.isdigit():  # GPUs that share the host's memory list none
        return found
    return replace(found, memory=Figure(int(mebibytes) * 2**20, "nvidia-smi"))


def _memory_of_this_machine() -> float:
    import psutil

    return float(psutil.virtual_memory().total)
