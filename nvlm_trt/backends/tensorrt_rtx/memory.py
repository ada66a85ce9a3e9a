"""Estimates the host memory of a build with TensorRT-RTX, from measurements (`python -m lab.rtx_builds`)."""

from __future__ import annotations

# NVIDIA's builder and the process that waits for it, with their libraries; and the weights of a stage: mapped from the
# graph's file, in the plan, and some of them in the builder's own layouts. Builds of the small sizes and slices of the
# 72B sizes took between 0.87 and 1.11 times what follows from these two numbers, and a slice of NVLM-X with 4-bit
# weights 1.31 times (docs/tensorrt_rtx.md).
_LIBRARIES = 1.35e9
_COPIES = 2.4


def builder_memory(largest_stage: int) -> int:
    """Return the bytes that building the plans takes at its peak; `largest_stage`: bytes of a stage's weights."""
    return int(_LIBRARIES + _COPIES * largest_stage)


def trial_memory(parameters: int) -> int:
    """Return the bytes that ONNX Runtime takes to try an engine on the CPU: every parameter as it is stored, at most in
    16 bits, and in float32; and the process with its libraries."""
    return int(0.3e9 + 6 * parameters)


def host_building(largest_stage: int, parameters: int, calibrated: bool) -> int:
    """Return the bytes that a build without a GPU takes at its peak. A calibration takes no more than a trial."""
    return max(builder_memory(largest_stage), trial_memory(parameters))
