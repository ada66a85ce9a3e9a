"""Checks engines of TensorRT-RTX on a GPU through the product's own backend. Each function opens one engine.

Imports the package inside the functions: a machine may lack packages that the package needs (pydantic, for example),
and the other checks run all the same."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lab.gpu_check.record import MEASURED, PASSED, WRONG, NotAvailableError, Result, Value
from lab.gpu_check.rtx_engines import engine_path, numbers_path
from lab.gpu_check.rtx_numbers import compare, run_steps

if TYPE_CHECKING:
    from nvlm_trt.backends.plans.backend import PlanBackend
    from nvlm_trt.engine import Engine

_RUNS = 50
_DECODE = 1  # the decoder's second optimisation profile


def loads(directory: Path, model: str, precision: str) -> Result:
    """Load all plans of an engine; compare the outputs that share an input's memory with the manifest's."""
    engine = _engine(directory, model, precision)
    from nvlm_trt.backends.plans.loaded_plan import LoadedPlan
    from nvlm_trt.backends.tensorrt_rtx import DEVICE
    from nvlm_trt.backends.tensorrt_rtx.record import record_of
    from nvlm_trt.backends.tensorrt_rtx.runtime import RtxRuntime

    record = record_of(engine)
    runtime = RtxRuntime(engine, record, DEVICE)
    started = time.monotonic()
    plans = {stage: LoadedPlan(engine.path / f"{stage}.plan", DEVICE, runtime) for stage in record.profiles}
    seconds = time.monotonic() - started
    found = plans["decoder"].aliased()
    wrong = sorted(set(found.items()) ^ set(record.aliased.items()))
    values: dict[str, Value] = {
        "plans": len(plans),
        "load s": seconds,
        "decoder's workspace MB": plans["decoder"].engine.device_memory_size_v2 / 1e6,
        "aliases": len(found),
        "of the manifest's": len(record.aliased),
    }
    for plan in plans.values():
        plan.close()
    note = f"{wrong[0][0]} is not an alias in both" if wrong else ""
    return Result(WRONG if wrong else PASSED, values, note)


def numbers(directory: Path, model: str, precision: str) -> Result:
    """Compare the numbers of every stage with those of the same graphs in ONNX Runtime."""
    engine, given = _engine(directory, model, precision), _numbers(directory, model, precision)
    with _opened(engine) as backend:
        return compare(run_steps(backend, given), given, precision)


def first_call(directory: Path, model: str, precision: str, cache: Path) -> Result:
    """Time the first calls of a process. A second process finds what this one leaves in `cache`.

    Call this in a new process: the driver's own cache of kernels is off from here on."""
    os.environ |= {"CUDA_CACHE_DISABLE": "1", "XDG_CACHE_HOME": str(cache)}
    engine, given = _engine(directory, model, precision), _numbers(directory, model, precision)
    import torch

    from nvlm_trt.backends.tensorrt_rtx import DEVICE

    torch.zeros(1, device=DEVICE)  # the start of CUDA is not TensorRT-RTX's
    ids, ranges = given["input_ids.1"], given["cross_ranges.1"]
    times = [time.monotonic()]
    with _opened(engine) as backend:
        times.append(time.monotonic())
        for _ in range(2):
            backend.prefill(0, 0, ids, backend.embeddings([], 0, 0), ranges)
            times.append(time.monotonic())
        for _ in range(2):
            backend.decode(ids[-1:], np.array([len(ids)]), ranges[-1:])
            times.append(time.monotonic())
    seconds = np.diff(times)
    named = ("open s", "first prefill s", "second prefill s", "first decode s", "second decode s")
    values: dict[str, Value] = {name: float(each) for name, each in zip(named, seconds, strict=True)}
    files = [path for path in cache.rglob("*") if path.is_file()]
    values["cache MB"] = sum(path.stat().st_size for path in files) / 1e6
    return Result(MEASURED if files else WRONG, values, "" if files else "no runtime cache was written")


def capture(directory: Path, model: str, precision: str) -> Result:
    """Record a decoding step as a CUDA graph, as the backend does; compare its logits and its time with a plain run."""
    engine, given = _engine(directory, model, precision), _numbers(directory, model, precision)
    import torch

    with _opened(engine) as backend:
        plan, slots = backend._plan("decoder"), len(given["next.0"])
        with torch.cuda.stream(plan.stream):
            tensors = backend._step_tensors(slots, 1, 1) | backend._rows(0, slots)
            lengths = [len(given[f"input_ids.{slot}"]) for slot in range(slots)]
            ranges = np.array([given[f"cross_ranges.{slot}"][-1:] for slot in range(slots)])  # [n, 1, 2]
            step = {"input_ids": given["next.0"][:, None], "write_indices": np.array(lengths), "cross_ranges": ranges}
            backend._fill(tensors, step)
            context = plan._context(_DECODE)
            plan._bind(context, tensors)
            values: dict[str, Value] = {"capturable at first": plan._runtime.can_capture(context, plan.stream)}
            plan._execute(context)
            plan.stream.synchronize()
            values["after a run"] = plan._runtime.can_capture(context, plan.stream)
            plan.run(_DECODE, tensors)
            plain = tensors["logits"].clone()
            graph = plan.record(_DECODE, tensors)
            if graph is None:
                return Result(MEASURED, values | dict.fromkeys(_GRAPH_VALUES), "the plan gives no graph")
            tensors["logits"].fill_(torch.nan)
            graph.replay()
            equal = tensors["logits"].equal(plain)
            times = [_median_us(plan.stream, call) for call in (lambda: plan.run(_DECODE, tensors), graph.replay)]
    values |= dict(zip(_GRAPH_VALUES, (equal, *times), strict=True))
    return Result(PASSED if equal else WRONG, values)


_GRAPH_VALUES = ("equal logits", "run us", "graph us")


def _median_us(stream: Any, call: Any) -> float:
    """Return the median time from queueing a call to its end."""
    times = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        call()
        stream.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e6


def _engine(directory: Path, model: str, precision: str) -> Engine:
    """Open an engine whose plans run here. Raises NotAvailableError if there is none, or if a package is missing."""
    if not numbers_path(directory, model, precision).exists():
        raise NotAvailableError("this engine was not built")
    try:
        from lab.gpu_check.rtx_plans import require_gpu, validity
        from nvlm_trt.backends import opening  # noqa: F401, imports what `_opened` needs
        from nvlm_trt.engine import Engine
    except ImportError as error:
        raise NotAvailableError(f"{error}; install it, or take it along with scripts/pack_rtx.sh") from None
    require_gpu()
    path = engine_path(directory, model, precision)
    for plan in sorted(path.glob("*.plan")):
        found = validity(plan)
        if found.refused:
            raise NotAvailableError(f"plan refused: {found}")
    return Engine.open(path)


def _numbers(directory: Path, model: str, precision: str) -> dict[str, Any]:
    with np.load(numbers_path(directory, model, precision)) as saved:
        return dict(saved)


@contextlib.contextmanager
def _opened(engine: Engine) -> Iterator[PlanBackend]:
    from nvlm_trt.backends.opening import open_backend

    with open_backend(engine) as backend:
        opened: Any = backend
        yield opened
