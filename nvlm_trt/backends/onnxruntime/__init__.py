"""Describes the default backend: ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from nvlm_trt.backends.spec import BackendSpec, MemoryModel, OpenOptions
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import PrecisionTable

if TYPE_CHECKING:
    from nvlm_trt.backends.base import StepBackend
    from nvlm_trt.builders.engine_build import BuildJob, BuildSteps
    from nvlm_trt.engine import Engine

# ONNX Runtime 1.32 writes a telemetry session file to TMPDIR unless this is set before its import, also by `_probe`.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

NAME = "onnxruntime"
PREFILL_CHUNK = 256
ENCODE_TILES = 2  # one tile uses all cores already, more tiles only take memory

# Quantised vision encoders and projectors misread small print, so both stay in fp32 unless the user quantises them.
# The errors of lm_head reach the answer directly, but each step reads all its weights: lm_head has 8-bit weights, and
# its activations stay in floating point unless the user quantises them.
# fmt: off
PRECISIONS = PrecisionTable(NAME, default="fp32", names={
    # name               vision_encoder projector decoder           lm_head             cross_attention
    "fp32":             ("fp32",        "fp32",  "fp32",             "fp32",             "fp32"),
    "int8":             ("fp32",        "fp32",  "int8",             "int8-weight-only", "int8"),
    "int8-weight-only": ("fp32",        "fp32",  "int8-weight-only", "int8-weight-only", "int8-weight-only"),
    "int4-weight-only": ("fp32",        "fp32",  "int4-weight-only", "int8-weight-only", "int4-weight-only"),
    "fp8":              ("fp32",        "fp32",  "fp8",              "fp32",             "fp8"),
})
# fmt: on


def _probe() -> str:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"ONNX Runtime cannot be imported ({error}); `pip install onnxruntime`") from None
    return f"ONNX Runtime {onnxruntime.__version__}"


def _open(engine: Engine, stages: Collection[str], options: OpenOptions) -> StepBackend:
    from nvlm_trt.backends.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(engine, stages, options.threads)


def _build(job: BuildJob) -> BuildSteps:
    from nvlm_trt.backends.onnxruntime.build import OnnxRuntimeSteps

    return OnnxRuntimeSteps(job)


SPEC = BackendSpec(
    name=NAME,
    summary="onnxruntime (CPU)",
    device="cpu",
    precisions=PRECISIONS,
    prefill_chunk=PREFILL_CHUNK,
    # ONNX Runtime folds fp8 weights into float32 constants
    memory=MemoryModel(device="host", encode_tiles=ENCODE_TILES, loaded_as={"fp8": "fp32"}),
    probe=_probe,
    open=_open,
    build=_build,
)
