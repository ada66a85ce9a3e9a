"""Writes safetensors files whose tensors come in any order and some rows at a time: the header is written first."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nvlm_trt.builders.file_writes import write_at
from nvlm_trt.builders.narrow import narrowed, place_of
from nvlm_trt.builders.tensorrt_llm.layout import ITEM_BYTES, Layout, TensorSpec
from nvlm_trt.closing import ClosedOnExit

NUMPY_DTYPES: dict[str, npt.DTypeLike] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


def nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * ITEM_BYTES[spec.dtype]


class TensorFile(ClosedOnExit):
    """An open safetensors file of known tensors. Bytes that nobody writes are zero."""

    def __init__(self, path: Path, layout: Layout, keep: bool) -> None:
        """Create the file, or open one of the same header and length and `keep` its data.

        Raises OSError, FileNotFoundError if `keep` finds no such file."""
        self.path = path
        self.layout = layout
        header, self._begins = _header(layout)
        self._first = len(header)
        size = self._first + sum(map(nbytes, layout.values()))
        if keep and not _has_header(path, header, size):
            raise FileNotFoundError(path)
        self._file = os.open(path, os.O_RDWR | (0 if keep else os.O_CREAT | os.O_TRUNC), 0o644)
        if not keep:
            try:
                write_at(self._file, header, 0)
                os.ftruncate(self._file, size)
            except BaseException:
                self.close()
                raise

    def write(self, name: str, first: int, values: npt.NDArray[Any]) -> int:
        """Write elements [first, first + n) of a tensor, converted to the tensor's dtype. Return the bytes written.

        Raises OSError, and EngineError for values beyond a 16-bit type."""
        spec = self.layout[name]
        assert 0 <= first <= first + values.size <= math.prod(spec.shape), f"elements of {name} are in the file"
        stored = narrowed(values, NUMPY_DTYPES[spec.dtype], lambda n: (name, place_of(first + n, spec.shape)))
        stored = np.ascontiguousarray(stored)
        offset = self._first + self._begins[name] + first * ITEM_BYTES[spec.dtype]
        write_at(self._file, stored.view(np.uint8).data, offset)
        return stored.nbytes

    def sync(self) -> None:
        """Wait until the disk has everything that was written."""
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)


def _header(layout: Layout) -> tuple[bytes, dict[str, int]]:
    """Make a header, and each tensor's first byte after the header.

    The widest dtypes come first, as the safetensors package orders them, so that every tensor begins at a multiple of
    its item's size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name, spec in sorted(layout.items(), key=lambda item: -ITEM_BYTES[item[1].dtype]):
        begins[name], end = end, end + nbytes(spec)
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, begins


def _has_header(path: Path, header: bytes, size: int) -> bool:
    """Tell whether a regular file has this header and this length."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header
