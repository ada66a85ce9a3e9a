"""Estimates the host memory of a build with TensorRT-RTX, from measurements (`python -m lab.rtx_builds`)."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm_trt.backends.spec import StageWeights

# NVIDIA's builder and the process that waits for it, with their libraries; and the weights of a stage: mapped from the
# graph's file, in the plan, and some of them in the builder's own layouts. Weights in blocks are in the plan in two
# layouts.
_LIBRARIES = 1.35e9
_COPIES = 2.4
_COPIES_OF_BLOCKS = 3.4


def builder_memory(stages: Sequence[StageWeights]) -> int:
    """Return the bytes that building the plans, one after the other, takes at its peak."""
    return int(_LIBRARIES + max(map(_copies, stages)))


def _copies(stage: StageWeights) -> float:
    return _COPIES * (stage.nbytes - stage.in_blocks) + _COPIES_OF_BLOCKS * stage.in_blocks


def trial_memory(parameters: int) -> int:
    """Return the bytes that ONNX Runtime takes to try an engine on the CPU: every parameter as it is stored, at most in
    16 bits, and in float32; and the process with its libraries."""
    return int(0.3e9 + 6 * parameters)


def host_building(stages: Sequence[StageWeights], parameters: int) -> int:
    """Return the bytes that a build without a GPU takes at its peak. A calibration takes no more than a trial."""
    return max(builder_memory(stages), trial_memory(parameters))
