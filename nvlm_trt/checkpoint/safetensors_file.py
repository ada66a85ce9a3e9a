"""Reads one safetensors file, tensor by tensor.

The safetensors package checks the header (lengths, offsets, overlaps, truncation). Data is then read by position, not
through the package's memory map: pages of a map stay in the process's resident set until the kernel wants them back,
and a file that shrinks under a map kills the process with SIGBUS instead of raising an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from nvlm_trt.bounded_file import open_regular
from nvlm_trt.checkpoint.file_state import TensorRecord, file_state
from nvlm_trt.checkpoint.finite import first_not_finite
from nvlm_trt.errors import CheckpointError
from nvlm_trt.model.quantised_source import FP8_DTYPE

FloatArray = npt.NDArray[np.float32]

FLOAT_DTYPES = ("BF16", "F16", "F32")
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, FP8_DTYPE: 1}
_BLOCK_BYTES = 16 << 20  # read and converted at a time: a load holds one float32 tensor and little more


class SafetensorsFile:
    """An open file and its `records` by tensor name. Reads are positional, so threads may share it."""

    def __init__(self, path: Path, rename: Callable[[str], str] = str) -> None:
        """`rename` translates the stored names. Raises CheckpointError when the file is absent, truncated, or has a
        corrupt header, and for two tensors of one name."""
        self.path = path
        state = file_state(path)
        if state.fault is not None:
            raise CheckpointError(state.fault)
        self.records: dict[str, TensorRecord] = {}
        for stored, record in state.records.items():
            name = rename(stored)
            if name in self.records:
                raise CheckpointError(f"{path} has {name} twice, once as {stored}; write the checkpoint again")
            self.records[name] = record
        try:
            self._file: BinaryIO = open_regular(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path} ({error.strerror}); restore it from the checkpoint") from None

    def load(self, name: str) -> FloatArray:
        """Reads a whole tensor as float32. Raises what `read_floats` raises."""
        record = self.records[name]
        out = np.empty(record.shape, np.float32)
        self.read_floats(name, record, 0, out.reshape(-1))
        return out

    def load_rows(self, name: str, rows: npt.NDArray[np.int64]) -> FloatArray:
        """Reads rows of a matrix, [len(rows), columns] float32, and no others."""
        record = self.records[name]
        count, columns = record.shape
        assert not len(rows) or 0 <= rows.min() <= rows.max() < count, f"rows of {name} must be in 0..{count - 1}"
        out = np.empty((len(rows), columns), np.float32)
        for target, row in zip(out, rows, strict=True):
            self.read_floats(name, record, int(row) * columns, target)
        return out

    def read_bytes(self, record: TensorRecord, start: int, length: int) -> bytearray:
        """Reads the stored bytes [start, start + length) of a tensor."""
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        while done < length:
            count = os.preadv(self._file.fileno(), [view[done:]], record.begin + start + done)
            if not count:
                raise CheckpointError(f"{self.path} became shorter while it was read; write the checkpoint again")
            done += count
        return buffer

    def blocks(self, record: TensorRecord) -> Iterator[bytearray]:
        """Reads all stored bytes of a tensor, block by block."""
        for start in range(0, record.nbytes, _BLOCK_BYTES):
            yield self.read_bytes(record, start, min(_BLOCK_BYTES, record.nbytes - start))

    def close(self) -> None:
        self._file.close()

    def read_floats(self, name: str, record: TensorRecord, first: int, out: FloatArray) -> None:
        """Fills the flat `out` with elements [first, first + len(out)) of a tensor.

        Raises CheckpointError for a dtype other than BF16, F16, F32 and F8_E4M3, and for an element that is not
        finite."""
        if record.dtype not in _ITEM_BYTES:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {record.dtype}; convert the checkpoint to BF16, F16 or F32"
            )
        item = _ITEM_BYTES[record.dtype]
        step = _BLOCK_BYTES // item
        for start in range(0, len(out), step):
            target = out[start : start + step]
            block = self.read_bytes(record, (first + start) * item, len(target) * item)
            bits = np.frombuffer(block, f"<u{item}")
            if (fault := first_not_finite(bits, record.dtype)) >= 0:
                raise self._not_finite(name, record, first + start + fault)
            if record.dtype == "BF16":  # the upper half of a float32
                np.left_shift(bits, 16, out=target.view(np.uint32), dtype=np.uint32)
            elif record.dtype == FP8_DTYPE:
                np.take(_FP8_VALUES, bits, out=target)
            else:
                target[:] = bits.view(f"<f{item}")

    def _not_finite(self, name: str, record: TensorRecord, element: int) -> CheckpointError:
        place = list(map(int, np.unravel_index(element, record.shape)))
        return CheckpointError(
            f"{self.path}: {name} has a value at {place} that is not finite (NaN or infinity); restore the file, or "
            "export the checkpoint from an earlier step of its training"
        )


def _fp8_values() -> FloatArray:
    """Computes the 256 values of float8_e4m3fn: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    magnitude[bits & 0x7F == 0x7F] = np.nan
    return np.where(bits < 0x80, magnitude, -magnitude).astype(np.float32)


_FP8_VALUES = _fp8_values()
