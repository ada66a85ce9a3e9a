"""Writes tensors of a checkpoint to an engine's data file some rows at a time: no tensor is ever held whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.narrow import narrowed, place_of

Array = npt.NDArray[Any]

_BLOCK_ELEMENTS = 1 << 20  # 4 MB of float32: a block stays in the CPU's cache while it is converted
# A strip is the part of a transposed tensor that is held in memory until the pieces of its rows are written: for the
# shapes of 72B, a piece has 9 KB or more.
_STRIP_BYTES = 256 << 20
_INT4 = ir.DataType.INT4.numpy()  # in NumPy's arrays, a byte holds one


class StoredTensor(Protocol):
    """Gives the rows of a checkpoint's tensor. Each call of `rows` reads the file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> FloatArray:
        """Read the rows [start, stop) of the first axis, in float32."""
        ...


def blocks_of(*tensors: StoredTensor) -> Iterator[FloatArray]:
    """Yield the rows of tensors stacked by rows, [n, ...] at a time: a million elements, or a single row."""
    for tensor in tensors:
        count = tensor.shape[0]
        step = max(1, _BLOCK_ELEMENTS // math.prod(tensor.shape[1:]))
        for start in range(0, count, step):
            yield tensor.rows(start, min(start + step, count))


class StreamedTensor(ir.LazyTensor):
    """Makes a tensor from blocks whenever the tensor is read. `tofile` writes one block after the other."""

    def __init__(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        blocks: Callable[[], Iterable[Array]],
        transposed: bool = False,
        parts: Sequence[tuple[str, int]] = (),
    ) -> None:
        """`blocks` returns the rows in order, [n, ...] at a time, and is called anew for every use. Rows are converted
        to `dtype`. `transposed`: this tensor is the transpose of the matrix whose rows `blocks` returns.
        `parts`: names and numbers of rows of the tensors that are stacked in these rows, if they are several.
        A matrix of 4-bit numbers, of which a byte holds two, has an even number of columns."""
        assert dtype.bitwidth >= 8 or shape[-1] % 2 == 0, "a row of 4-bit numbers ends within a byte"
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)
        self._blocks, self._transposed, self._parts = blocks, transposed, parts

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes of `tobytes` to a file that can seek, from its current position on.

        Raises OSError for a full disk, EngineError for values beyond a 16-bit type, and the errors of reading the
        blocks."""
        if self._transposed:
            self._write_strips(file)
        else:
            for block in self._converted():
                file.write(_bytes(block))

    def _write_strips(self, file: BinaryIO) -> None:
        """Write strip by strip. A strip is some columns of the tensor: one piece of every row in the file."""
        rows, columns = self.shape.numpy()
        bits = self.dtype.bitwidth
        width = max(1, _STRIP_BYTES // (rows * self.dtype.numpy().itemsize))
        if bits < 8:
            width += width % 2  # pieces of whole bytes
        begin, first = file.tell(), 0
        for strip in self._strips(rows, min(columns, width)):
            pieces = [strip] if strip.shape[1] == columns else strip
            for i, piece in enumerate(pieces):
                file.seek(begin + (i * columns + first) * bits // 8)
                file.write(_bytes(piece))
            first += strip.shape[1]

    def _strips(self, rows: int, width: int) -> Iterator[Array]:
        """Yield the columns in order, [rows, width] at a time, all in the same memory."""
        strip, filled = np.empty((rows, width), self.dtype.numpy()), 0
        for block in self._converted():
            while len(block):
                part, block = np.split(block, [width - filled])
                strip[:, filled : filled + len(part)] = part.T
                filled += len(part)
                if filled == width:
                    yield strip
                    filled = 0
        if filled:
            yield strip[:, :filled]

    def _whole(self) -> ir.Tensor:
        values = np.concatenate(list(self._converted()))
        values = np.ascontiguousarray(values.T if self._transposed else values)
        return ir.Tensor(values, dtype=self.dtype, name=self.name)

    def _converted(self) -> Iterator[Array]:
        first = 0
        for block in self._blocks():
            yield narrowed(block, self.dtype.numpy(), functools.partial(self._locate, first, block.shape))
            first += len(block)

    def _locate(self, first: int, shape: tuple[int, ...], element: int) -> tuple[str, Sequence[int]]:
        """Return the stacked tensor and the place of an element of a block, whose first row is row `first`."""
        row, *rest = place_of(element, shape)
        row, name = first + row, str(self.name)
        for part, rows in self._parts:
            name = part
            if row < rows:
                break
            row -= rows
        return name, (row, *rest)


def _bytes(values: Array) -> memoryview:
    """Return an array's memory, also for dtypes that Python's buffers do not know; of 4-bit numbers, two in a byte."""
    memory = np.ascontiguousarray(values).view(np.uint8)
    if values.dtype == _INT4:
        memory = memory[..., ::2] & 15 | np.left_shift(memory[..., 1::2], 4)  # the first in the low half
    return memory.data
