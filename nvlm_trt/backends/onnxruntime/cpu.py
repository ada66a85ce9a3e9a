"""Says which products this CPU computes in hardware, and which faults ONNX Runtime's kernels for x86 have on it.

ONNX Runtime chooses kernels by the same instruction sets (core/mlas/lib/platform.cpp). Its kernels for other processors
have no such fault that is known."""

from __future__ import annotations

import platform

from nvlm_trt.machine import cpu_flags as flags

_DOT_PRODUCTS = ({"avx512_vnni"}, {"avx_vnni"}, {"amx_int8"})  # each adds up 8-bit products in 32 bits
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


def saturates() -> bool:
    """Return whether integer products saturate: without VNNI, pairs of products of unsigned and signed bytes are added
    up in 16 bits."""
    return _is_x86() and not any(names <= flags() for names in _DOT_PRODUCTS)


def single_rows_differ() -> bool:
    """Return whether a single row times 4-bit weights gives other bits than the same row among others: without AVX-512,
    single rows have a kernel of their own."""
    return _is_x86() and not flags() >= _AVX512


def multiplies_bf16() -> bool:
    """Return whether the CPU multiplies bfloat16, for which OpenVINO then has kernels (AVX-512 BF16 or AMX)."""
    return _is_x86() and not flags().isdisjoint({"avx512_bf16", "amx_bf16"})


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")
