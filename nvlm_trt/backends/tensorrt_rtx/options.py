"""Defines the options of `nvlm-trt build` for TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvlm_trt.backends.tensorrt_rtx.target import parse_targets


@dataclass(frozen=True)
class RtxOptions:
    """The options of a build."""

    targets: tuple[str, ...] = ()  # GPUs that the plans are for, as "sm89"; none: TensorRT-RTX's default, see target.py
    weight_streaming: bool = False  # weights that do not fit on the GPU stay in host memory

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> RtxOptions:
        """Read the options of the command line. Raises EngineError for a target that does not exist."""
        return cls(parse_targets(options["target"]), options["weight_streaming"])
