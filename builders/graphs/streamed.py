"""Tensors on their way from a checkpoint to an engine's data file, some rows at a time: none is ever held whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray

Array = npt.NDArray[Any]

_BLOCK_ELEMENTS = 1 << 20  # 4 MB of float32: what is done to a block finds it in the cache
# Of a transposed tensor, in memory until its rows' pieces are written: 9 KB each or more for the shapes of 72B.
_STRIP_BYTES = 256 << 20


class StoredTensor(Protocol):
    """A tensor of a checkpoint, read whenever `rows` is called."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows [start, stop) of the first axis, in float32."""
        ...


def blocks_of(*tensors: StoredTensor) -> Iterator[FloatArray]:
    """The rows of tensors that stand one below the other, [n, ...] at a time: a million elements, or a single row."""
    for tensor in tensors:
        count = tensor.shape[0]
        step = max(1, _BLOCK_ELEMENTS // math.prod(tensor.shape[1:]))
        for start in range(0, count, step):
            yield tensor.rows(start, min(start + step, count))


class StreamedTensor(ir.LazyTensor):
    """A tensor that is made of blocks whenever it is asked for; `tofile` writes them one by one."""

    def __init__(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        blocks: Callable[[], Iterable[Array]],
        transposed: bool = False,
    ) -> None:
        """`blocks` gives the rows in order, [n, ...] at a time, and is called anew for every use. They are converted to
        `dtype`. `transposed`: they are the rows of a matrix whose transpose this tensor is."""
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)
        self._blocks, self._transposed = blocks, transposed

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes of `tobytes` to a file that can seek, from where it stands. Raises OSError for a full disk,
        and what reading the blocks raises."""
        if self._transposed:
            self._write_strips(file)
        else:
            for block in self._converted():
                file.write(_bytes(block))

    def _write_strips(self, file: BinaryIO) -> None:
        """A strip is some columns of the tensor, for which every row of the file has a place."""
        rows, columns = self.shape.numpy()
        item = self.dtype.numpy().itemsize
        begin, first = file.tell(), 0
        for strip in self._strips(rows, min(columns, max(1, _STRIP_BYTES // (rows * item)))):
            pieces = [strip] if strip.shape[1] == columns else strip
            for i, piece in enumerate(pieces):
                file.seek(begin + (i * columns + first) * item)
                file.write(_bytes(piece))
            first += strip.shape[1]

    def _strips(self, rows: int, width: int) -> Iterator[Array]:
        """The columns in order, [rows, width] at a time, in memory that is used again."""
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
        return (np.asarray(block, self.dtype.numpy()) for block in self._blocks())


def _bytes(values: Array) -> memoryview:
    """The memory of an array, which need not be of a dtype that Python's buffers know."""
    return np.ascontiguousarray(values).view(np.uint8).data
