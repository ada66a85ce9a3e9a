"""Runs kernels on numpy arrays, in the process where Triton interprets them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


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
