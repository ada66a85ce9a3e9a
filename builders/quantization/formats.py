"""Chooses the weight format of every linear layer of an engine by the precision of the layer's component, in the form
that the backend's runtime takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import onnx_ir as ir

from nvlm_trt.builders.graphs.common import Embedding, LinearWeight, StageGraph, Unquantised, WeightFormat
from nvlm_trt.builders.quantization.blocked_weights import BlockedWeights
from nvlm_trt.builders.quantization.calibration import SOURCE_SCALES, Calibration
from nvlm_trt.builders.quantization.fp8 import Fp8
from nvlm_trt.builders.quantization.int8 import Int8
from nvlm_trt.builders.quantization.observer import Observer
from nvlm_trt.builders.quantization.row_scaled import RowScaled
from nvlm_trt.builders.quantization.smoothquant import Factors, migrate
from nvlm_trt.builders.quantization.weight_only import WeightOnly
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import (
    COMPONENTS,
    FLOATING,
    WEIGHT_ONLY_BITS,
    component_of,
    needs_calibration,
)


class WeightForm(Enum):
    """The runtime for whose operators quantised weights are written. Only some precisions have two forms."""

    ONNXRUNTIME = "onnxruntime"  # fp8 weights that it folds into constants, MatMulNBits
    TENSORRT = "tensorrt"  # DequantizeLinear in front of MatMul


def _without_calibration(form: WeightForm) -> dict[str, Callable[[], WeightFormat]]:
    blocks = WeightOnly if form is WeightForm.ONNXRUNTIME else BlockedWeights
    return {
        **dict.fromkeys(FLOATING, Unquantised),
        **{name: partial(blocks, bits) for name, bits in WEIGHT_ONLY_BITS.items()},
    }


def _with_calibration(calibration: Calibration, form: WeightForm) -> dict[str, WeightFormat]:
    return {"int8": Int8(calibration), "fp8": Fp8(calibration, fold_weights=form is WeightForm.ONNXRUNTIME)}


class ByComponent:
    """Writes every linear layer in the format of its component."""

    def __init__(self, formats: Mapping[str, WeightFormat]) -> None:
        self._formats = formats

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        return self._formats[component_of(weight.name)].matmul(graph, x, weight)

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        return self._formats["lm_head"].tied_matmul(graph, x, embedding)


@dataclass(frozen=True)
class Recipe:
    """Says how the linear layers of an engine are written."""

    precisions: Mapping[str, str]  # by component
    weight_format: WeightFormat
    factors: Mapping[str, Factors] = field(default_factory=dict)  # SmoothQuant's, by tensor
    calibration: dict[str, Any] | None = None  # for the manifest
    inputs: Calibration | None = None  # magnitudes after SmoothQuant, of which static scales are made
    skip_unused: bool = True


# Keeps the cross-attention blocks in the main graph: the nodes of a branch cannot be outputs of the graph.
OBSERVING = Recipe(dict.fromkeys(COMPONENTS, "fp32"), Observer(), skip_unused=False)


def quantised(
    checkpoint: Checkpoint,
    precisions: Mapping[str, str],
    calibration: Calibration | None,
    alpha: float,
    form: WeightForm = WeightForm.ONNXRUNTIME,
) -> Recipe:
    """Make the recipe for `precisions` (component -> precision).

    `calibration` may be None if no precision needs one. `form`: the operators that weights are written in.
    `checkpoint` must be a separate handle: a handle gives each weight once, SmoothQuant reads some weights here, and
    the graphs read them later.
    Raises EngineError for a calibration that lacks a layer."""
    without = _without_calibration(form)
    formats = {name: without[name]() for name in precisions.values() if name in without}
    factors: dict[str, Factors] = {}
    record: dict[str, Any] | None = None
    if needs_calibration(precisions):
        assert calibration is not None, "static scales come from a calibration"
        record = {"samples": calibration.samples}
        if "int8" in precisions.values():
            if calibration.samples == SOURCE_SCALES:
                raise EngineError(
                    "the calibration holds the input scales of an FP8 checkpoint, which say too little for int8; "
                    "calibrate on samples, or choose fp8"
                )
            record["smoothquant_alpha"] = alpha
            if alpha > 0:
                factors, calibration = migrate(checkpoint.config, checkpoint, calibration, precisions, alpha)
        formats |= _with_calibration(calibration, form)
    by_component = {component: formats[name] for component, name in precisions.items()}
    if form is WeightForm.ONNXRUNTIME and precisions["lm_head"] == "int8-weight-only":
        by_component["lm_head"] = RowScaled()
    return Recipe(precisions, ByComponent(by_component), factors, record, calibration)
