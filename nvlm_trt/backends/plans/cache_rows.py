"""Checks that the cache of every slot begins at an address that TensorRT accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import LlmConfig
from nvlm_trt.model.precision import FLOAT_BYTES, floating_type

_ALIGNMENT = 256  # bytes


def check_rows(llm: LlmConfig, limits: EngineLimits, precisions: Mapping[str, str]) -> None:
    """Raise EngineError for a max_seq_len that gives a slot's row of the KV cache an address TensorRT does not accept.

    TensorRT needs addresses that are multiples of 256 (IExecutionContext::setTensorAddress). The length of the
    cross-attention cache is a multiple of 16, which suffices."""
    dtype = floating_type(precisions)
    step = _ALIGNMENT // math.gcd(_ALIGNMENT, llm.num_kv_heads * llm.head_dim * FLOAT_BYTES[dtype])
    if limits.max_seq_len % step:
        raise EngineError(
            f"max_seq_len {limits.max_seq_len} leaves a slot's cache in {dtype} at an address that TensorRT does not "
            f"take; choose a --max-seq-len that is a multiple of {step}"
        )
