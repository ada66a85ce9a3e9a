"""Runs kernels on numpy arrays, in the process where Triton interprets them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def multiply_row_by_row() -> None:
    """Make the interpreter add up every element of a product in the same order, as a GPU does.

    It multiplies with BLAS, in whose kernels for AVX2 a row's bits depend on where in the matrix the row stands. Holds
    on any CPU: einsum calls no BLAS, and its order depends on shapes and strides alone."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: object, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: object) -> TensorHandle:
        product = np.einsum("ik,kj->ij", a.data, b.data, dtype=d.data.dtype)  # [rows, inner] by [inner, columns]
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def attention(
    query: Array,
    key: Array,
    value: Array,
    cross_ranges: Array,
    gate: Array,
    blocks: int | None = None,
    chunk: int | None = None,
) -> Array:
    """Run gated_cross_attention with the table's entry `blocks` or its own choice. `chunk` replaces the entry's."""
    import torch

    from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS
    from nvlm_trt.plugins.gated_cross_attention.launcher import gated_cross_attention

    q, k, v, ranges, factor = (torch.from_numpy(array) for array in (query, key, value, cross_ranges, gate))
    table = BLOCKS[blocks] if blocks else None
    if table and chunk:
        table = table._replace(chunk=chunk)
    return gated_cross_attention(q, k, v, ranges, factor, blocks=table).numpy()


def tiles(image: Array, columns: int, rows: int, tile_size: int, dtype: str) -> Array:
    """Run tile_resample; `dtype` is torch's name."""
    import torch

    from nvlm_trt.plugins.tile_resample.launcher import tile_resample

    return tile_resample(torch.from_numpy(image), columns, rows, tile_size, getattr(torch, dtype)).numpy()


def key_rows_loaded(query: Array, key: Array, value: Array, cross_ranges: Array, gate: Array, blocks: int) -> set[int]:
    """Return the rows of `key` [1, 1, N, D] that the kernel reads, by the addresses of the interpreter's loads."""
    import types

    import torch
    from triton.runtime import interpreter

    from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS
    from nvlm_trt.plugins.gated_cross_attention.launcher import gated_cross_attention

    q, k, v, ranges, factor = (torch.from_numpy(array) for array in (query, key, value, cross_ranges, gate))
    memory = range(k.data_ptr(), k.data_ptr() + k.nbytes)
    row_bytes = k.stride(2) * k.element_size()
    rows: set[int] = set()
    real = interpreter._interpreter

    def load(addresses: Array, mask: Array, *others: object) -> Array:
        rows.update((int(at) - memory.start) // row_bytes for at in addresses[mask].ravel() if int(at) in memory)
        return real.load(addresses, mask, *others)

    interpreter._interpreter = types.SimpleNamespace(load=load, store=real.store)
    try:
        gated_cross_attention(q, k, v, ranges, factor, blocks=BLOCKS[blocks])
    finally:
        interpreter._interpreter = real
    return rows
