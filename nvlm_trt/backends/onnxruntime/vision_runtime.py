"""Chooses the runtime of the vision encoder: OpenVINO where it multiplies faster, ONNX Runtime anywhere else.

Both read the same file, so an engine opens on every machine."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

from nvlm_trt.backends.onnxruntime import cpu
from nvlm_trt.backends.openvino import NAME as OPENVINO
from nvlm_trt.backends.openvino.runtime import version
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError

STAGE = "vision_encoder"
_COMPONENTS = ("vision_encoder", "projector")
_FASTER = ("bf16", "int8")  # precisions that OpenVINO computes faster than ONNX Runtime


@dataclass(frozen=True)
class VisionRuntime:
    uses_openvino: bool
    summary: str  # runtime, version, floating-point type, and why OpenVINO does not run an engine that names it


def runtimes_of(precisions: Mapping[str, str]) -> dict[str, str]:
    """Return the runtimes, by stage, that the manifest of an engine of these precisions (by component) names."""
    return {STAGE: OPENVINO} if all(precisions[name] in _FASTER for name in _COMPONENTS) else {}


def vision_runtime(engine: Engine) -> VisionRuntime:
    """Return the runtime that runs the vision encoder of an engine on this machine."""
    reason = ""
    if engine.manifest.runtimes.get(STAGE) == OPENVINO:
        try:
            found = version()
        except EngineError as error:
            reason = f"; {error}"
        else:
            if cpu.multiplies_bf16():
                return VisionRuntime(True, f"OpenVINO {found} in bf16")
            reason = "; this CPU has no instructions for bf16"
    return VisionRuntime(False, f"ONNX Runtime {importlib.metadata.version('onnxruntime')} in fp32{reason}")
