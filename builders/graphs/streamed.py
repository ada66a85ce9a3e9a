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
from nvlm_trt.builders.file_writes import write_at
from nvlm_trt.builders.narrow import narrowed, place_of

Array = npt.NDArray[Any]

_BLOCK_ELEMENTS = 1 << 20  # 4 MB of float32: a block stays in the CPU's cache while it is converted
# A strip is the part of a transposed tensor that is held in memory until the pieces of its rows are written: for the
# shapes of 72B, a piece has 9 KB or more.
_STRIP_BYTES = 256 << 20
_PAGE_BYTES = 4096  # a strip of whole pages: the kernel reads none of them from the disk to change a part of it
_INT4 = ir.DataType.INT4.numpy()  # in NumPy's arrays, a byte holds one


class StoredTensor(Protocol):
    """Gives the rows of a checkpoint's tensor. Each call of `rows` reads the file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> FloatArray:
        """Read the rows [start, stop) of the first axis, in float32."""
        ...


Blocks = Callable[[int], Iterable[Array]]  # returns the rows from the given row on in order, [n, ...] at a time


def blocks_of(*tensors: StoredTensor, first: int = 0) -> Iterator[FloatArray]:
    """Yield the rows from `first` on of tensors stacked by rows, [n, ...] at a time: a million elements, or a row.

    Reads the same blocks for every `first`: a LoRA update is a product, whose bits depend on how many rows it has."""
    for tensor in tensors:
        count = tensor.shape[0]
        step = max(1, _BLOCK_ELEMENTS // math.prod(tensor.shape[1:]))
        if first < count:
            for start in range(first // step * step, count, step):
                yield tensor.rows(start, min(start + step, count))[max(0, first - start) :]
        first = max(0, first - count)


class StreamedTensor(ir.LazyTensor):
    """Makes a tensor from blocks whenever the tensor is read. `write` and `tofile` hold one block at a time."""

    def __init__(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        blocks: Blocks,
        transposed: bool = False,
        parts: Sequence[tuple[str, int]] = (),
    ) -> None:
        """`blocks` is called anew for every use. Rows are converted to `dtype`. `transposed`: this tensor is the
        transpose of the matrix whose rows `blocks` returns. `parts`: names and numbers of rows of the tensors that are
        stacked in these rows, if they are several.
        A matrix of 4-bit numbers, of which a byte holds two, has an even number of columns."""
        assert dtype.bitwidth >= 8 or shape[-1] % 2 == 0, "a row of 4-bit numbers ends within a byte"
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)
        self._blocks, self._transposed, self._parts = blocks, transposed, parts

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes of `tobytes` to a file of the system, from its current position on. Raises what `write`
        raises."""
        file.flush()
        begin = file.tell()
        for _ in self.write(file.fileno(), begin):
            pass
        file.seek(begin + self.nbytes)

    @property
    def rows(self) -> int:
        """Count the rows of the matrix that `blocks` returns."""
        return int(self.shape.numpy()[-1 if self._transposed else 0])

    def write(self, descriptor: int, offset: int, first: int = 0) -> Iterator[int]:
        """Write the bytes of `tobytes` to an open file from byte `offset` on. Yield after each part how many rows of
        the matrix are written. `first`: rows that are written already, a number that an earlier call has yielded.

        Raises OSError for a full disk, EngineError for values beyond a 16-bit type, and the errors of reading the
        blocks."""
        if self._transposed:
            yield from self._write_strips(descriptor, offset, first)
            return
        row = self.nbytes // self.rows  # bytes
        for block in self._converted(first):
            write_at(descriptor, _bytes(block), offset + first * row)
            first += len(block)
            yield first

    def _write_strips(self, descriptor: int, offset: int, first: int) -> Iterator[int]:
        """Write strip by strip. A strip is some columns of the tensor: one piece of every row in the file."""
        rows, columns = self.shape.numpy()
        bits = self.dtype.bitwidth
        for strip in self._strips(rows, min(columns, self._strip_width(rows)), first):
            pieces = [strip] if strip.shape[1] == columns else strip
            for i, piece in enumerate(pieces):
                write_at(descriptor, _bytes(piece), offset + (i * columns + first) * bits // 8)
            first += strip.shape[1]
            yield first

    def _strip_width(self, rows: int) -> int:
        width = max(1, _STRIP_BYTES // (rows * self.dtype.numpy().itemsize))
        page = _PAGE_BYTES * 8 // self.dtype.bitwidth  # columns
        if width >= page:
            return width - width % page
        return width + width % 2 if self.dtype.bitwidth < 8 else width  # pieces of whole bytes

    def _strips(self, rows: int, width: int, first: int) -> Iterator[Array]:
        """Yield the columns from `first` on in order, [rows, width] at a time, all in the same memory."""
        strip, filled = np.empty((rows, width), self.dtype.numpy()), 0
        for block in self._converted(first):
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
        values = np.concatenate(list(self._converted(0)))
        values = np.ascontiguousarray(values.T if self._transposed else values)
        return ir.Tensor(values, dtype=self.dtype, name=self.name)

    def _converted(self, first: int) -> Iterator[Array]:
        for block in self._blocks(first):
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
