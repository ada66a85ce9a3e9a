"""Estimates the host memory of a build with TensorRT-RTX."""

from __future__ import annotations


def host_building(largest_stage: int, parameters: int, calibrated: bool) -> int:
    """Return the bytes that a build takes at its peak: the builder on the largest stage, or the engine that ONNX
    Runtime tries, which has every parameter in float32."""
    return max(int(3.5 * largest_stage), 4 * parameters)
