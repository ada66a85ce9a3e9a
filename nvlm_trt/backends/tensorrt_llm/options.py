"""Defines the options of `nvlm-trt build` for TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvlm_trt.errors import EngineError

# `trtllm-build` and MPI take one process per GPU.
_MOST_RANKS = 1024


@dataclass(frozen=True)
class LlmOptions:
    """The options of a build."""

    tp: int = 1  # GPUs that share each layer: tensor parallelism
    pp: int = 1  # groups of such GPUs that share the layers: pipeline parallelism
    checkpoint_only: bool = False  # stop before `trtllm-build`, which needs NVIDIA's container and its GPU

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> LlmOptions:
        """Read the options of the command line. Raises EngineError for a number of GPUs that is not possible."""
        tp, pp = options["tp"], options["pp"]
        for name, count in (("--tp", tp), ("--pp", pp), ("--tp times --pp", tp * pp)):
            if not 1 <= count <= _MOST_RANKS:
                raise EngineError(f"{name} {count} is not from 1 to {_MOST_RANKS}; choose a number of GPUs")
        return cls(tp, pp, options["checkpoint_only"])
