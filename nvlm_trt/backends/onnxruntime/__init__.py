"""Describes the default backend, on the CPU: ONNX Runtime, and OpenVINO for the vision encoder."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from nvlm_trt.backends.onnxruntime.memory import OPENVINO_ENCODER, OVERHEAD, load
from nvlm_trt.backends.openvino import NAME as OPENVINO
from nvlm_trt.backends.spec import BackendSpec, MemoryModel, OpenOptions
from nvlm_trt.errors import EngineError
from nvlm_trt.extras import require
from nvlm_trt.machine import available_cores
from nvlm_trt.model.precision import PrecisionTable

if TYPE_CHECKING:
    from nvlm_trt.backends.base import StepBackend
    from nvlm_trt.backends.layers import EngineLayers
    from nvlm_trt.builders.build_steps import BuildJob, BuildSteps
    from nvlm_trt.engine import Engine
    from nvlm_trt.layer_loop import LayerLoop

# ONNX Runtime 1.32 writes a telemetry session file to TMPDIR unless this is set before its import, also by `_probe`.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

NAME = "onnxruntime"
PREFILL_CHUNK = 256
ENCODE_TILES = 2  # one tile uses all cores already, more tiles only take memory

# Quantised vision encoders and projectors misread small print, so both stay in floating point unless the user quantises
# them: bf16, which OpenVINO multiplies twice as fast as float32 and ONNX Runtime, which runs the decoder, not at all.
# The errors of lm_head reach the answer directly, but each step reads all its weights: lm_head has 8-bit weights, and
# its activations have a scale per row that is computed, not calibrated, unless the user chooses `lm_head=int8`.
# fmt: off
PRECISIONS = PrecisionTable(
    NAME,
    default="bf16",
    names={
        # name               vision_encoder projector decoder           lm_head             cross_attention
        "bf16":             ("bf16",        "bf16",  "fp32",             "fp32",             "fp32"),
        "fp32":             ("fp32",        "fp32",  "fp32",             "fp32",             "fp32"),
        "int8":             ("bf16",        "bf16",  "int8",             "int8-weight-only", "int8"),
        "int8-weight-only": ("bf16",        "bf16",  "int8-weight-only", "int8-weight-only", "int8-weight-only"),
        "int4-weight-only": ("bf16",        "bf16",  "int4-weight-only", "int8-weight-only", "int4-weight-only"),
        "fp8":              ("bf16",        "bf16",  "fp8",              "fp32",             "fp8"),
    },
    floating={
        **dict.fromkeys(("vision_encoder", "projector"), ("bf16", "fp32")),
        **dict.fromkeys(("decoder", "lm_head", "cross_attention"), ("fp32",)),
    },
)
# fmt: on


def _probe() -> str:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"ONNX Runtime cannot be imported ({error}); `pip install onnxruntime`") from None
    return f"ONNX Runtime {onnxruntime.__version__}"


def _open(engine: Engine, stages: Collection[str], options: OpenOptions) -> StepBackend:
    from nvlm_trt.backends.onnxruntime.backend import OnnxRuntimeBackend
    from nvlm_trt.backends.onnxruntime.vision_runtime import STAGE, vision_runtime

    if STAGE not in stages or not vision_runtime(engine).uses_openvino:
        return OnnxRuntimeBackend(engine, stages, options.threads)
    from nvlm_trt.backends.openvino.encoder import OpenVinoEncoder

    encoder = OpenVinoEncoder(engine.path / f"{STAGE}.onnx", options.threads or available_cores())
    return OnnxRuntimeBackend(engine, [stage for stage in stages if stage != STAGE], options.threads, encoder)


def _open_layers(engine: Engine, loop: LayerLoop, options: OpenOptions) -> EngineLayers:
    require("build", "running an engine a layer at a time")
    from nvlm_trt.backends.onnxruntime.layers import OnnxRuntimeLayers

    return OnnxRuntimeLayers(engine, loop, options.threads)


def _runtimes_of(precisions: Mapping[str, str]) -> Mapping[str, str]:
    from nvlm_trt.backends.onnxruntime.vision_runtime import runtimes_of

    return runtimes_of(precisions)


def _runtime_here(engine: Engine, stage: str) -> str:
    from nvlm_trt.backends.onnxruntime.vision_runtime import STAGE, vision_runtime

    return vision_runtime(engine).summary if stage == STAGE else _probe()


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
    memory=MemoryModel(
        device="host",
        floating="fp32",
        encode_tiles=ENCODE_TILES,
        load=load,
        overhead=OVERHEAD,
        encoders={OPENVINO: OPENVINO_ENCODER},
        loaded_as={"fp8": "fp32"},
    ),
    probe=_probe,
    open=_open,
    open_layers=_open_layers,
    build=_build,
    stage_runtimes=(OPENVINO,),
    runtimes_of=_runtimes_of,
    runtime_here=_runtime_here,
)
