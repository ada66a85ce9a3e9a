"""Checks TensorRT-RTX: whether it takes this GPU, and then its plans' numbers, start, CUDA graphs and speed.

A GPU that TensorRT-RTX refuses is a result; the checks after it are not run. Every check runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol
from unittest import mock

from lab.code_state import ROOT
from lab.gpu_check import rtx_checks, rtx_kernels, rtx_plans
from lab.gpu_check.apart import Apart
from lab.gpu_check.record import PASSED, WRONG, NotAvailableError, Result, Trial
from lab.gpu_check.rtx_engines import MODELS, attention_path
from lab.gpu_check.rtx_numbers import TOLERANCES

SECTION = "rtx"
INSTALL = "pip install 'nvlm-trt[tensorrt-rtx]'"
ELSEWHERE = "build them where these are, by `python -m lab.gpu_check.rtx_engines`, and pass --rtx-engines DIRECTORY"
BUILDERS = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "ml_dtypes", "safetensors", "tokenizers", "pydantic", "PIL")

MINUTES = 3.0  # of all checks, half of them for the numbers of the engines; building engines comes on top
SLOWEST = 60.0  # seconds of one check
BUILDING = 150.0
ENGINE = (MODELS[-1], "bf16")  # NVLM-H has every kind of layer
FIRST = ("bf16", "fp16", "fp32")  # precisions whose numbers come first, for the time may be up


class Caller(Protocol):
    """Runs a check; `Apart` in a process of its own."""

    def call(self, function: Callable[[], Result], seconds: float, fresh: bool = False) -> Result: ...


def trials(engines: Path | None, minutes: float = MINUTES, caller: Caller | None = None) -> Iterator[Trial]:
    """Yield the trials. `engines`: a directory that rtx_engines.py wrote, None to build them on this machine."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        yield "plans", _not_installed
        return
    with tempfile.TemporaryDirectory() as folder, Apart() as apart, mock.patch.dict(os.environ):
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))  # each run begins without runtime caches
        yield from Bench(caller or apart, Path(folder), engines, minutes).trials()


def _not_installed() -> Result:
    raise NotAvailableError(f"TensorRT-RTX is not installed: {INSTALL}")


def targets_of(engines: Path | None) -> tuple[str, ...]:
    """Return the targets that engines were built for; none: TensorRT-RTX's default."""
    manifests = sorted(engines.glob("*/manifest.json")) if engines else []
    if not manifests:
        return ()
    record = json.loads(manifests[0].read_text(encoding="utf-8"))["backend_record"]
    return tuple(record["targets"])


class Bench:
    """Runs the trials in their order, within their time."""

    def __init__(self, caller: Caller, folder: Path, engines: Path | None, minutes: float) -> None:
        self._caller, self._folder, self._engines = caller, folder, engines
        self._targets = targets_of(engines)
        self._minutes = minutes
        self._end = time.time() + 60 * minutes
        self._numbers_end = self._end
        self._refusal: str | None = None  # why this GPU does not run the plans

    def trials(self) -> Iterator[Trial]:
        yield from self._validity()
        if self._engines is None:
            yield "engines", self._build
        for model in MODELS:
            yield f"plans of {model}, bf16", partial(self._of_engine, rtx_checks.loads, model, "bf16")
        yield from self._numbers()
        model, precision = ENGINE
        first_call = partial(self._of_engine, rtx_checks.first_call, *ENGINE, self._folder / "first call", fresh=True)
        yield f"first start of {model}, {precision}", first_call
        yield f"next start of {model}, {precision}, with the runtime cache", first_call
        # afresh: in the process of the first calls, the driver's cache is off
        capture = partial(self._of_engine, rtx_checks.capture, *ENGINE, fresh=True)
        yield f"CUDA graph of decoding, {model}, {precision}", capture
        yield "W8A8 int8 product", partial(self._of_plan, rtx_kernels.int8_product)
        for form in ("constant", "convolution"):
            yield f"refitted weight of a {form}", partial(self._of_plan, rtx_kernels.refit, form)
        for shape in rtx_kernels.CROSS:
            yield f"masked attention: {shape}", partial(self._attention, shape.batch)

    def _validity(self) -> Iterator[Trial]:
        asked = {"the default GPUs": (), "sm80": ("sm80",), "this GPU alone": (rtx_plans.CURRENT,)}
        if self._targets not in asked.values():
            asked |= {", ".join(self._targets): self._targets}
        for name, targets in asked.items():
            yield f"a plan for {name}", partial(self._ask, targets)
        small = partial(rtx_kernels.small_product, self._targets)
        yield "a small plan, loaded whatever its header says", partial(self._call, small)

    def _ask(self, targets: tuple[str, ...]) -> Result:
        """Ask whether a plan is valid. If plans for the engines' targets are not, the checks after it are not run."""
        result = self._call(partial(rtx_kernels.gpu_validity, targets))
        if targets == self._targets and result.values["validity"] in ("INVALID", "not built"):
            self._refusal = str(result.values["diagnostics"] or result.note or "no reason given")
        return result

    def _build(self) -> Result:
        """Build the engines, in processes that see no GPU."""
        self._require_valid()
        missing = [name for name in BUILDERS if importlib.util.find_spec(name) is None]
        if missing:
            raise NotAvailableError(f"building engines needs {', '.join(missing)}; {ELSEWHERE}")
        directory, started = self._folder / "engines", time.time()
        command = [sys.executable, "-m", "lab.gpu_check.rtx_engines", str(directory)]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=BUILDING, check=False)
        seconds = time.time() - started
        print(done.stdout, done.stderr, sep="", flush=True)
        self._end, self._engines = self._end + seconds, directory
        lines = [line for line in done.stdout.splitlines() if " MB in " not in line] + done.stderr.splitlines()[-1:]
        built = len(list(directory.glob("*.npz")))
        note = lines[0] if lines and done.returncode else ""
        if not built:
            self._engines = None
            raise NotAvailableError(f"no engine could be built here ({note}); {ELSEWHERE}")
        return Result(WRONG if done.returncode else PASSED, {"engines": built, "s": seconds}, note)

    def _numbers(self) -> Iterator[Trial]:
        self._numbers_end = time.time() + 30 * self._minutes
        for precision in (*FIRST, *(name for name in TOLERANCES if name not in FIRST)):
            for model in MODELS:
                yield f"numbers of {model}, {precision}", partial(self._compare, model, precision)

    def _compare(self, model: str, precision: str) -> Result:
        if time.time() >= self._numbers_end:
            raise NotAvailableError(f"the time of these checks was up: half of {self._minutes:g} minutes")
        return self._of_engine(rtx_checks.numbers, model, precision)

    def _attention(self, rows: int) -> Result:
        graph = None if self._engines is None else attention_path(self._engines)
        if graph is not None and not graph.exists():
            raise NotAvailableError(f"the engines lack {graph.name}; {ELSEWHERE}")
        return self._of_engine(rtx_kernels.masked_attention, rows, self._targets)

    def _of_engine(self, check: Callable[..., Result], *arguments: object, fresh: bool = False) -> Result:
        """Run a check that takes the directory of the engines."""
        self._require_valid()
        if self._engines is None:
            raise NotAvailableError(f"there are no engines; {ELSEWHERE}")
        return self._call(partial(check, self._engines, *arguments), fresh)

    def _of_plan(self, check: Callable[..., Result], *arguments: object) -> Result:
        """Run a check that builds its own plan."""
        self._require_valid()
        return self._call(partial(check, *arguments, self._targets))

    def _require_valid(self) -> None:
        if self._refusal is not None:
            raise NotAvailableError(f"plan refused: {self._refusal}")

    def _call(self, check: Callable[[], Result], fresh: bool = False) -> Result:
        left = self._end - time.time()
        if left <= 0:
            raise NotAvailableError(f"the {self._minutes:g} minutes of this part were up")
        return self._caller.call(check, min(SLOWEST, left), fresh)
