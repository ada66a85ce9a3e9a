"""Says which faults of ONNX Runtime's x86 kernels show on this CPU, by the instructions that it has.

ONNX Runtime chooses its kernels by the same flags (core/mlas/lib/platform.cpp). Other processors have other kernels:
nothing is known of faults there."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_DOT_PRODUCTS = ({"avx512_vnni"}, {"avx_vnni"}, {"amx_int8"})  # each adds up 8-bit products in 32 bits
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


@functools.cache
def saturates() -> bool:
    """Without VNNI, products of unsigned by signed bytes are added up in pairs in 16 bits, which is too few."""
    return _is_x86() and not any(names <= _flags() for names in _DOT_PRODUCTS)


@functools.cache
def single_rows_differ() -> bool:
    """Without AVX-512, a single row times 4-bit weights has a kernel of its own, which adds up in another order."""
    return _is_x86() and not _flags() >= _AVX512


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def _flags() -> frozenset[str]:
    """The instruction sets of the first core, by Linux' names; none where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
