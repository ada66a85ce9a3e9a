"""Block sizes of the kernel, in one table: no autotuner, so the same inputs take the same path on every run.

A block of keys is given in bytes, so that shared memory (the query block and `stages` blocks of keys and of values) is
about the same for every dtype and head size. docs/plugins.md has their times.
"""

from __future__ import annotations

from typing import NamedTuple

HEAD_DIMS = (32, 64, 80, 96, 128)
_MOST_KEYS = 128  # per block: of small heads a row of scores would not fit into registers


class Blocks(NamedTuple):
    """How one program works: `rows` of queries at a time against `keys(...)` keys at a time."""

    rows: int
    key_bytes: int
    warps: int
    stages: int
    chunk: int | None = None  # keys of one program, in two kernels (split_kernel.py); all keys in one if None

    def keys(self, head_dim: int, item_bytes: int) -> int:
        """Keys per block."""
        return min(_MOST_KEYS, self.key_bytes // (padded_dim(head_dim) * item_bytes))


# Numbered as TensorRT numbers tactics, from 1. The rows are (token, head of the group) pairs: 16, the least that a
# tensor core multiplies, serve a decoding step, which waits for memory. TensorRT is not known to launch kernels of more
# than 48 KB, and takes one kernel, not two.
BLOCKS: dict[int, Blocks] = {
    1: Blocks(rows=16, key_bytes=8 << 10, warps=4, stages=3),  # decoding in 48 KB; any step in fp32
    2: Blocks(rows=16, key_bytes=16 << 10, warps=4, stages=3, chunk=448),  # decoding
    3: Blocks(rows=64, key_bytes=8 << 10, warps=4, stages=1),  # prefill in 48 KB
    4: Blocks(rows=64, key_bytes=16 << 10, warps=4, stages=1),  # prefill in 48 KB
    5: Blocks(rows=128, key_bytes=16 << 10, warps=8, stages=2),  # prefill; on Hopper the kernel in hopper/ is faster
}
FP32_BLOCKS = (1,)  # fp32 is multiplied outside the tensor cores, where larger blocks spill registers


def padded_dim(head_dim: int) -> int:
    """The power of two that holds a head: what the kernel computes with."""
    assert head_dim in HEAD_DIMS, head_dim
    return 1 << (head_dim - 1).bit_length()


def candidates(item_bytes: int) -> tuple[int, ...]:
    """The table's entries for elements of this size."""
    return FP32_BLOCKS if item_bytes == 4 else tuple(BLOCKS)


def choose_blocks(rows: int, item_bytes: int) -> Blocks:
    """For `rows` (tokens * heads per key head) on a device without the 48 KB limit."""
    if item_bytes == 4:
        return BLOCKS[1]
    if rows <= BLOCKS[2].rows:
        return BLOCKS[2]
    return BLOCKS[5]
