"""Estimates the host memory of a build with TensorRT-RTX, from measurements (`python -m lab.rtx_builds`)."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm_trt.backends.spec import StageWeights

# NVIDIA's builder and the process that waits for it, with their libraries; and the weights of a stage: mapped from the
# graph's file, in the plan, and some of them in the builder's own layouts. Weights in blocks are in the plan in two
# layouts. What follows is 0.9 to 1.15 times what builds took (docs/tensorrt_rtx.md).
_LIBRARIES = 1.25e9
_COPIES = 2.45
_COPIES_OF_BLOCKS = 3.45


def builder_memory(stages: Sequence[StageWeights]) -> int:
    """Return the bytes that building the plans, one after the other, takes at its peak."""
    return int(_LIBRARIES + max(map(_copies, stages)))


def _copies(stage: StageWeights) -> float:
    return _COPIES * (stage.nbytes - stage.in_blocks) + _COPIES_OF_BLOCKS * stage.in_blocks


def trial_memory(stages: Sequence[StageWeights], parameters: int) -> int:
    """Return the bytes that ONNX Runtime takes to try an engine on the CPU: every parameter as it is stored, at most in
    16 bits, and in float32; of weights in blocks only one at a time in float32; and the process with its libraries."""
    in_blocks = sum(stage.in_blocks for stage in stages)
    others = parameters - sum(stage.in_blocks_parameters for stage in stages)
    largest = max(stage.largest_in_blocks for stage in stages)
    return int(0.3e9 + 6 * others + in_blocks + 4 * largest)


def host_building(stages: Sequence[StageWeights], parameters: int) -> int:
    """Return the bytes that a build without a GPU takes at its peak. A calibration takes no more than a trial."""
    return max(builder_memory(stages), trial_memory(stages, parameters))
