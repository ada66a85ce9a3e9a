"""Tensors written in blocks: the same bytes as numpy's, in the memory of a block."""

from __future__ import annotations

import itertools
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stages import ArrayTensor

from nvlm_trt.builders.graphs import streamed
from nvlm_trt.builders.graphs.streamed import Blocks, StoredTensor, StreamedTensor, blocks_of
from nvlm_trt.errors import EngineError

DTYPES = {
    np.float32: ir.DataType.FLOAT,
    np.float16: ir.DataType.FLOAT16,
    np.int8: ir.DataType.INT8,
    ml_dtypes.bfloat16: ir.DataType.BFLOAT16,
    ml_dtypes.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
}


def reading(*tensors: StoredTensor) -> Blocks:
    return lambda first: blocks_of(*tensors, first=first)


@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    columns=st.integers(1, 7),
    dtype=st.sampled_from(list(DTYPES)),
    transposed=st.booleans(),
    block=st.integers(1, 30),
    strip=st.integers(1, 60),
)
def test_writes_what_numpy_would(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[int],
    columns: int,
    dtype: type,
    transposed: bool,
    block: int,
    strip: int,
) -> None:
    """Any sizes of blocks and strips, from the file's current position on."""
    values = np.random.default_rng(0).normal(0, 9, (sum(rows), columns)).astype(np.float32)
    parts = [ArrayTensor(part) for part in np.split(values, np.cumsum(rows)[:-1])]
    expected: np.ndarray = values.astype(dtype).T if transposed else values.astype(dtype)
    tensor = StreamedTensor("t", DTYPES[dtype], expected.shape, reading(*parts), transposed)
    path = tmp_path_factory.mktemp("written") / "data"
    with pytest.MonkeyPatch.context() as patch, path.open("wb") as file:
        patch.setattr(streamed, "_BLOCK_ELEMENTS", block)
        patch.setattr(streamed, "_STRIP_BYTES", strip)
        file.write(b"before")
        tensor.tofile(file)
    assert path.read_bytes() == b"before" + expected.tobytes()
    assert tensor.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(tensor.numpy(), expected)


@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    pairs=st.integers(1, 4),
    dtype=st.sampled_from([ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.INT4]),
    transposed=st.booleans(),
    block=st.integers(1, 30),
    strip=st.integers(1, 60),
    stop=st.integers(0, 30),
)
def test_goes_on_from_any_part(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[int],
    pairs: int,
    dtype: ir.DataType,
    transposed: bool,
    block: int,
    strip: int,
    stop: int,
) -> None:
    """Stopped after any part, the rest is written by a call of its own, which reads whole blocks only."""
    height = sum(rows) + sum(rows) % 2  # 4-bit numbers are stored in pairs
    values = np.random.default_rng(0).integers(-8, 8, (height, 2 * pairs)).astype(np.float32)
    edges = np.cumsum(rows)[:-1]
    whole_blocks = [BlocksOnly(part, block) for part in np.split(values, edges)]
    shape = values.shape[::-1] if transposed else values.shape
    tensor = StreamedTensor("t", dtype, shape, reading(*whole_blocks), transposed)
    path = tmp_path_factory.mktemp("written") / "data"
    with pytest.MonkeyPatch.context() as patch, path.open("wb") as file:
        patch.setattr(streamed, "_BLOCK_ELEMENTS", block)
        patch.setattr(streamed, "_STRIP_BYTES", strip)
        parts = tensor.write(file.fileno(), 3)
        reached = [0, *itertools.islice(parts, stop)][-1]
        parts.close()
        rest = list(tensor.write(file.fileno(), 3, reached))
        assert rest == sorted(set(rest))
        assert [reached, *rest][-1] == height
        expected = tensor.tobytes()
    assert path.read_bytes() == bytes(3) + expected


class BlocksOnly(ArrayTensor):
    """A tensor that is read in the blocks that `blocks_of` reads from the first row on, and in no others."""

    def __init__(self, values: np.ndarray, block: int) -> None:
        super().__init__(values)
        self._step = max(1, block // values.shape[1])

    def rows(self, start: int, stop: int) -> np.ndarray:
        assert start % self._step == 0
        assert stop == min(start + self._step, self.shape[0])
        return super().rows(start, stop)


@given(
    rows=st.integers(1, 9),
    pairs=st.integers(1, 5),
    transposed=st.booleans(),
    block=st.integers(1, 30),
    strip=st.integers(1, 60),
)
def test_a_byte_holds_two_4_bit_numbers(
    tmp_path_factory: pytest.TempPathFactory, rows: int, pairs: int, transposed: bool, block: int, strip: int
) -> None:
    """The order is that of the stored tensor: a transposed one is packed after the transposition."""
    values = np.random.default_rng(0).integers(-8, 8, (rows, 2 * pairs)).astype(np.float32)
    stored = ArrayTensor(values.T if transposed else values)
    tensor = StreamedTensor("t", ir.DataType.INT4, values.shape, reading(stored), transposed)
    path = tmp_path_factory.mktemp("written") / "data"
    with pytest.MonkeyPatch.context() as patch, path.open("wb") as file:
        patch.setattr(streamed, "_BLOCK_ELEMENTS", block)
        patch.setattr(streamed, "_STRIP_BYTES", strip)
        file.write(b"before")
        tensor.tofile(file)
    low, high = values.astype(np.int16).reshape(-1, 2).T & 15
    expected = (low | high << 4).astype(np.uint8).tobytes()
    assert path.read_bytes() == b"before" + expected
    assert tensor.tobytes() == expected
    assert tensor.nbytes == len(expected)
    np.testing.assert_array_equal(tensor.numpy().astype(np.float32), values)


class Counted:
    """A matrix of ones that exists nowhere, with the number of rows that were read."""

    def __init__(self, rows: int, columns: int) -> None:
        self.shape = (rows, columns)
        self.read = 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        self.read += stop - start
        return np.ones((stop - start, self.shape[1]), np.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_holds_a_block_and_reads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    monkeypatch.setattr(streamed, "_BLOCK_ELEMENTS", 1 << 16)
    monkeypatch.setattr(streamed, "_STRIP_BYTES", 1 << 20)
    matrix = Counted(1 << 14, 1 << 10)
    shape = matrix.shape[::-1] if transposed else matrix.shape
    tensor = StreamedTensor("t", ir.DataType.FLOAT, shape, reading(matrix), transposed)
    with (tmp_path / "data").open("wb") as file:
        tracemalloc.start()
        tensor.tofile(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (tmp_path / "data").stat().st_size == tensor.nbytes == 64 << 20
    assert peak < 4 << 20
    assert matrix.read == matrix.shape[0]


@pytest.mark.parametrize("strip", [1 << 30, 1 << 10], ids=["one strip", "strips"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, transposed: bool, strip: int) -> None:
    monkeypatch.setattr(streamed, "_STRIP_BYTES", strip)
    matrix = Counted(256, 256)
    tensor = StreamedTensor("t", ir.DataType.FLOAT, matrix.shape, reading(matrix), transposed)
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        tensor.tofile(file)


def test_blocks_are_of_a_million_elements_or_of_a_row() -> None:
    def sizes(blocks: Iterator[np.ndarray]) -> list[int]:
        return [len(block) for block in blocks]

    assert sizes(blocks_of(Counted(3000, 1 << 10))) == [1024, 1024, 952]
    assert sizes(blocks_of(Counted(2, 1 << 21), Counted(1, 5))) == [1, 1, 1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "value"), [(np.float16, 7e4), (np.float16, -1e30), (ml_dtypes.bfloat16, 3.4e38)])
def test_a_value_beyond_a_narrow_type_is_an_error(tmp_path: Path, dtype: type, value: float, transposed: bool) -> None:
    values = np.ones((3, 4), np.float32)
    values[2, 3] = value
    tensor = StreamedTensor("w", DTYPES[dtype], (3, 4), reading(ArrayTensor(values)), transposed)
    message = (
        rf"^w has {re.escape(f'{np.float32(value):g}')} at \[2, 3\], and .* ends at .*; choose .* with --precision$"
    )
    with (tmp_path / "data").open("wb") as file, pytest.raises(EngineError, match=message):
        tensor.tofile(file)
    values[2, 3] = 65504
    tensor.tobytes()


@given(parts=st.lists(st.integers(1, 4), min_size=1, max_size=3), block=st.integers(1, 20), data=st.data())
def test_the_place_is_that_in_the_tensor_of_the_checkpoint(parts: list[int], block: int, data: st.DataObject) -> None:
    """Whatever is stacked, and however it is cut into blocks."""
    part = data.draw(st.integers(0, len(parts) - 1))
    row, column = data.draw(st.integers(0, parts[part] - 1)), data.draw(st.integers(0, 2))
    arrays = [np.ones((rows, 3), np.float32) for rows in parts]
    arrays[part][row, column] = -7e4
    names = [(f"part{i}", rows) for i, rows in enumerate(parts)]
    stacked = [ArrayTensor(array) for array in arrays]
    tensor = StreamedTensor(
        "stack", ir.DataType.FLOAT16, (3, sum(parts)), reading(*stacked), transposed=True, parts=names
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "_BLOCK_ELEMENTS", block)
        message = rf"^part{part} has -70000 at \[{row}, {column}\], and fp16 ends at 65504; choose bf16"
        with pytest.raises(EngineError, match=message):
            tensor.tobytes()
