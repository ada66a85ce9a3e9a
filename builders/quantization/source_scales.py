"""Takes over the scales of an FP8 checkpoint: those of its weights, and those of the inputs of its linear layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import LinearWeight
from nvlm_trt.builders.graphs.streamed import StoredTensor
from nvlm_trt.builders.quantization.calibration import SOURCE_SCALES, Calibration, LinearInput
from nvlm_trt.checkpoint.lazy_weight import LazyWeight
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.precision import STATIC, component_of
from nvlm_trt.planner.memory import is_linear

_LARGEST = 448  # of E4M3
_STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}  # in self-attention


def stored_scales(tensor: StoredTensor) -> FloatArray | None:
    """Return the scales [rows] or [1] of a tensor that is stored in E4M3; None for any other."""
    return tensor.stored_scales if isinstance(tensor, LazyWeight) else None


def weight_scales(weight: LinearWeight) -> FloatArray:
    """Return the scales [outputs] with which a checkpoint stores a weight in E4M3; NaN for rows that it does not."""
    scales = []
    for part in weight.parts:
        stored = stored_scales(part)
        scales.append(np.broadcast_to(np.float32(np.nan) if stored is None else stored, part.shape[:1]))
    known = np.concatenate(scales).astype(np.float32)
    return np.where(known > 0, known, np.float32(np.nan))


def source_calibration(checkpoint: Checkpoint, precisions: Mapping[str, str]) -> Calibration | None:
    """Make a calibration of the static input scales of an FP8 checkpoint, from which fp8 takes its own.

    None if a component with static scales is not in fp8, or if the checkpoint has no scale for one of its layers."""
    static = {component for component, precision in precisions.items() if precision in STATIC}
    if any(precisions[component] != "fp8" for component in static):
        return None  # int8 needs more than a largest magnitude
    if "lm_head" in static and checkpoint.config.llm.tie_word_embeddings:
        return None
    linears: dict[str, LinearInput] = {}
    for name, shape in checkpoint_layout(checkpoint.config).items():
        if not is_linear(name, shape) or component_of(name) not in static:
            continue
        linear = name.removesuffix(".weight")
        scale = checkpoint.input_scale(linear)
        if scale is None:
            return None
        parent, _, last = linear.rpartition(".")
        if parent.endswith(".self_attn"):
            linear = f"{parent}.{_STACKED.get(last, last)}"  # the graphs compute q, k and v as one product
        largest = max(scale * _LARGEST, linears[linear].abs_max if linear in linears else 0.0)
        linears[linear] = LinearInput(abs_max=largest, clip=largest, channels=[largest] * shape[1])
    return Calibration(checkpoint_digest=checkpoint.digest, samples=dict(SOURCE_SCALES), linears=linears)
