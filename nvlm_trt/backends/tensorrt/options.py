"""Defines the options of `nvlm-trt build` that only TensorRT has."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_trt.errors import EngineError


@dataclass(frozen=True)
class PlanOptions:
    """The options of a build. Raises EngineError for options that exclude each other."""

    strip_weights: bool = False  # loading refits the plan from the ONNX file
    weight_streaming: bool = False  # weights that do not fit on the GPU stay in host memory

    def __post_init__(self) -> None:
        if self.strip_weights and self.weight_streaming:
            raise EngineError("--strip-weights and --weight-streaming exclude each other; choose one")
