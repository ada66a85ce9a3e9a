"""Reads the machine's facts, measures the GPU's ceilings, and times calls on the GPU."""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

import torch
from torch import Tensor

from lab.gpu_check.record import MEASURED, NotAvailableError, Record, Result, Trial, Value

CEILINGS = "ceilings"
COPY = "copy GB/s"
MATMUL = "matmul TFLOP/s"

_LAUNCHES = 40  # in one graph: they share the start of the graph, a few microseconds
_REPLAYS = 20
_WARM_UP = 1.0  # seconds of work before the ceilings: an idle GPU's clocks are a fraction of a busy one's
_PACKAGES = (
    *("torch", "triton", "numpy", "pillow", "torchvision", "onnx"),
    *("tensorrt", "polygraphy", "tensorrt_rtx_cu13_bindings"),
)


def machine(interpreted: bool) -> dict[str, Value]:
    """Reads the facts that the numbers depend on."""
    if interpreted:
        facts: dict[str, Value] = {"GPU": "none: Triton's interpreter on the CPU, small shapes, nothing timed"}
    else:
        properties = torch.cuda.get_device_properties(0)
        facts = {
            "GPU": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory GB": properties.total_memory / 1e9,
            "L2 MB": properties.L2_cache_size / 1e6,
            "driver": _driver(),
            "CUDA of torch": torch.version.cuda,
        }
    facts |= {"system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["torch"] = torch.__version__
    return facts


def ceilings() -> Iterator[Trial]:
    """Yields the trials of the ceilings: medians of many runs, on a GPU that is awake."""

    def warm_up(call: Callable[[], object]) -> None:
        end = time.monotonic() + _WARM_UP
        while time.monotonic() < end:
            for _ in range(10):
                call()
            torch.cuda.synchronize()

    def copy() -> Result:
        size = min(2 << 30, torch.cuda.mem_get_info()[0] // 4) // 4
        source = torch.randn(size, device="cuda")
        target = torch.empty_like(source)
        # by a kernel: in a graph, copy_ becomes a copy node, which reached two thirds of the kernel's rate on an H200
        warm_up(lambda: torch.neg(source, out=target))
        seconds = gpu_seconds([lambda: torch.neg(source, out=target)], launches=4)
        return Result(MEASURED, {COPY: 2 * source.nbytes / seconds / 1e9})

    def matmul() -> Result:
        size = 8192
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        product = torch.empty_like(a)
        warm_up(lambda: torch.matmul(a, b, out=product))
        seconds = gpu_seconds([lambda: torch.matmul(a, b, out=product)], launches=4)
        return Result(MEASURED, {MATMUL: 2 * size**3 / seconds / 1e12})

    yield "copy of 2 GiB", copy
    yield "bf16 product of 8192 x 8192 matrices", matmul


def ceiling(record: Record, name: str) -> float:
    """Returns a ceiling that this run has measured. Raises NotAvailableError if it has not."""
    for check in record.read():
        if check.section == CEILINGS and name in check.values:
            return float(check.values[name])  # type: ignore[arg-type]
    raise NotAvailableError(f"{name} was not measured in this run")


def cold_copies(tensors: Sequence[Tensor]) -> int:
    """Returns how many sets of inputs, used in turn, push each other out of the L2 cache: four times its size."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(4 * cache / sum(tensor.nbytes for tensor in tensors)))


def gpu_seconds(calls: Sequence[Callable[[], object]], launches: int = _LAUNCHES) -> float:
    """Returns the median time of one call in a CUDA graph that makes all calls in turn, without any time of the host.

    Give each call inputs of its own (`cold_copies`), or the call finds them in the cache. The graph keeps all results,
    so that writing them is timed too."""
    rounds = math.ceil(launches / len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles, and fills caches that a capture must not fill
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(rounds) for call in calls]
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPLAYS)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3 / len(kept)


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown: there is no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return answer[0] if answer else "unknown: nvidia-smi does not say"
