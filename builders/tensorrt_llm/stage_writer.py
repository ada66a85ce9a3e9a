"""Writes the tensors of a stage into the files of the stage's ranks, some rows of the checkpoint at a time.

FP8:                  w ~ e4m3(w / s) * s with one s for a whole tensor, max|w| / 448 or that of an FP8 checkpoint
W8A8_SQ_PER_CHANNEL:  the int8 numbers and scales of builders/quantization/int8.py, one scale per row
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import FLOAT, WeightSource
from nvlm_trt.builders.graphs.streamed import StoredTensor, blocks_of
from nvlm_trt.builders.narrow import narrowed, place_of
from nvlm_trt.builders.quantization import fp8, int8
from nvlm_trt.builders.quantization.smoothquant import MigratedWeights
from nvlm_trt.builders.quantization.source_scales import stored_scales
from nvlm_trt.builders.tensorrt_llm.quantization import LlmQuantization
from nvlm_trt.builders.tensorrt_llm.shards import FloatTensor, Part, Piece, QuantisedLinear, Scale, StageTensor
from nvlm_trt.builders.tensorrt_llm.tensor_file import NUMPY_DTYPES, TensorFile, nbytes

Array = npt.NDArray[Any]


class StageWriter:
    """Reads a checkpoint's tensors and writes each of them into all files that need it."""

    def __init__(self, weights: WeightSource, quantization: LlmQuantization, report: Callable[[int], None]) -> None:
        """`weights` gives each tensor once. `report` is called with the number of bytes that were written."""
        self._source = MigratedWeights(weights, quantization.factors)
        self._tensors: dict[str, StoredTensor] = {}
        self._quantization = quantization
        self._report = report
        self._scale = functools.lru_cache(maxsize=1)(self._scale_of)  # fc and gate follow each other

    def write(self, tensor: StageTensor, files: Sequence[TensorFile]) -> None:
        """Write a tensor of the stage whose ranks have `files`. Raises OSError, CheckpointError, and EngineError for
        values beyond a 16-bit type."""
        if isinstance(tensor, Scale):
            self._everywhere(files, tensor.name, np.array([tensor.value], np.float32))
        elif isinstance(tensor, FloatTensor):
            dtype = NUMPY_DTYPES[files[0].layout[tensor.name].dtype]
            for part, first, block in self._blocks(tensor.parts):
                self._place(files, tensor.name, part, first, narrowed(block, dtype, _located(part, first, block)))
        elif self._quantization.algo == "FP8":
            self._write_fp8(tensor, files)
        else:
            self._write_int8(tensor, files)

    def size(self, tensor: StageTensor, files: Sequence[TensorFile]) -> int:
        """Return the bytes of a tensor, with its scales, in all files."""
        names = [tensor.name] if not isinstance(tensor, QuantisedLinear) else _names(tensor, files[0])
        return sum(nbytes(file.layout[name]) for file in files for name in names)

    def _write_fp8(self, linear: QuantisedLinear, files: Sequence[TensorFile]) -> None:
        scale = np.array([self._scale(linear.one_scale)], np.float32)
        largest = max(self._observed(linear, name).abs_max for name in linear.inputs)
        self._everywhere(files, f"{linear.name}.weights_scaling_factor", scale)
        self._everywhere(
            files, f"{linear.name}.activation_scaling_factor", np.array([largest / fp8.LARGEST], np.float32)
        )
        for part, first, block in self._blocks(linear.parts):
            values = fp8.quantize(block, np.repeat(scale, len(block)))
            self._place(files, f"{linear.name}.weight", part, first, values)

    def _write_int8(self, linear: QuantisedLinear, files: Sequence[TensorFile]) -> None:
        clip = max(self._observed(linear, name).clip for name in linear.inputs)
        self._everywhere(files, f"{linear.name}.activation_scaling_factor", np.array([clip / int8.LARGEST], np.float32))
        for file in files:
            # SmoothQuant's factors are in the tensors that produce the input, so the input is taken as it is
            name = f"{linear.name}.prequant_scaling_factor"
            self._report(file.write(name, 0, np.ones(file.layout[name].shape, np.float32)))
        for part, first, block in self._blocks(linear.parts):
            values, scales = int8.quantize_rows(block, FLOAT)  # int8 [n, inputs], float32 [n]
            self._place(files, f"{linear.name}.weight", part, first, values)
            self._place(files, f"{linear.name}.weights_scaling_factor", _of_rows(part), first, scales)

    def _observed(self, linear: QuantisedLinear, name: str) -> Any:
        assert self._quantization.calibration is not None, "static scales come from a calibration"
        inputs = self._take(linear.parts[0].source).shape[1]
        return self._quantization.calibration.of(name, inputs)

    def _blocks(self, parts: Sequence[Part]) -> Iterator[tuple[Part, int, FloatArray]]:
        """Yield every part's rows in order, [n, ...] at a time, with the number of the first of them."""
        for part in parts:
            first = 0
            for block in blocks_of(self._take(part.source)):
                yield part, first, block
                first += len(block)

    def _place(self, files: Sequence[TensorFile], name: str, part: Part, first: int, block: Array) -> None:
        """Write rows [first, first + n) of a source, [n, ...], to the ranks that hold any of them."""
        for file, piece in zip(files, part.pieces, strict=True):
            start, stop = max(piece.rows.start, first), min(piece.rows.stop, first + len(block))
            if start >= stop:
                continue
            rows = _cut(block[start - first : stop - first], piece, file.layout[name].shape[1:])
            target = piece.first + start - piece.rows.start
            self._report(file.write(name, target * (rows.size // len(rows)), rows))

    def _everywhere(self, files: Sequence[TensorFile], name: str, values: FloatArray) -> None:
        for file in files:
            self._report(file.write(name, 0, values))

    def _scale_of(self, names: tuple[str, ...]) -> np.float32:
        """Return the FP8 scale of some weights: the one that the checkpoint stores them with, if it is one per tensor,
        so that a tensor of that scale keeps its numbers."""
        known = [stored_scales(self._take(name)) for name in names]
        if all(scales is not None and len(scales) == 1 and scales[0] > 0 for scales in known):
            return np.float32(max(scales[0] for scales in known if scales is not None))
        largest = max(float(np.abs(block).max()) for name in names for block in blocks_of(self._take(name)))
        return np.float32(largest / fp8.LARGEST or 1)  # zeros stay zeros at any scale

    def _take(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            self._tensors[name] = self._source.take(name)
        return self._tensors[name]


def _located(part: Part, first: int, block: FloatArray) -> Callable[[int], tuple[str, Sequence[int]]]:
    """Make what returns the source of an element of a block, whose first row is row `first`, and its place there."""
    shape = block.shape
    return lambda element: (
        part.source,
        place_of(first * math.prod(shape[1:]) + element, (first + len(block), *shape[1:])),
    )


def _cut(rows: Array, piece: Piece, widths: tuple[int, ...]) -> Array:
    """Take a piece's columns of some rows, and fill the columns that the source lacks with zeros."""
    if piece.columns is None:
        return rows
    (width,) = widths
    columns = rows[:, piece.columns.start : piece.columns.stop]
    missing = width - columns.shape[1]
    return np.pad(columns, ((0, 0), (0, missing))) if missing else columns


def _names(linear: QuantisedLinear, file: TensorFile) -> list[str]:
    """List the tensors of a linear layer, but not its bias."""
    kinds = ("weight", "activation_scaling_factor", "weights_scaling_factor", "prequant_scaling_factor")
    return [f"{linear.name}.{kind}" for kind in kinds if f"{linear.name}.{kind}" in file.layout]


def _of_rows(part: Part) -> Part:
    """Drop the columns of a part: place one number per row."""
    return Part(part.source, tuple(Piece(piece.rows, None, piece.first) for piece in part.pieces))
