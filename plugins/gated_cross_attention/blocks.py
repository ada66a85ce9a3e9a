"""Lists the kernel's block sizes: there is no autotuner, so the same inputs take the same path in every run.

The table gives blocks of keys in bytes, so that shared memory (the query block, and `stages` blocks of keys and of
values) is about the same for every dtype and head size. docs/plugins.md has the kernels' times.
"""

from __future__ import annotations

from typing import NamedTuple

HEAD_DIMS = (32, 64, 80, 96, 128)
_MOST_KEYS = 128  # per block: with small heads, a longer row of scores would not fit into registers


class Blocks(NamedTuple):
    """Holds the sizes of one program: `rows` of queries at a time against `keys(...)` keys at a time."""

    rows: int
    key_bytes: int
    warps: int
    stages: int
    chunk: int | None = None  # keys per program of the two kernels in split_kernel.py; None: one kernel, all keys

    def keys(self, head_dim: int, item_bytes: int) -> int:
        """Return the keys per block."""
        return min(_MOST_KEYS, self.key_bytes // (padded_dim(head_dim) * item_bytes))


# The numbers are TensorRT's tactics, from 1. The rows are (token, head of the group) pairs: 16, the least that a tensor
# core multiplies, suit a decoding step, which waits for memory. TensorRT is not known to launch kernels of more than
# 48 KB, and takes one kernel, not two.
BLOCKS: dict[int, Blocks] = {
    1: Blocks(rows=16, key_bytes=8 << 10, warps=4, stages=3),  # decoding in 48 KB; any step in fp32
    2: Blocks(rows=16, key_bytes=16 << 10, warps=4, stages=3, chunk=448),  # decoding
    3: Blocks(rows=64, key_bytes=8 << 10, warps=4, stages=1),  # prefill in 48 KB
    4: Blocks(rows=64, key_bytes=16 << 10, warps=4, stages=1),  # prefill in 48 KB
    5: Blocks(rows=128, key_bytes=16 << 10, warps=8, stages=2),  # prefill; on Hopper the kernel in hopper/ is faster
}
FP32_BLOCKS = (1,)  # tensor cores do not multiply fp32, and larger blocks would spill registers


def padded_dim(head_dim: int) -> int:
    """Return the power of two that holds a head: the head size that the kernel computes with."""
    assert head_dim in HEAD_DIMS, head_dim
    return 1 << (head_dim - 1).bit_length()


def candidates(item_bytes: int) -> tuple[int, ...]:
    """Return the numbers of the table's entries for elements of `item_bytes`."""
    return FP32_BLOCKS if item_bytes == 4 else tuple(BLOCKS)


def choose_blocks(rows: int, item_bytes: int) -> Blocks:
    """Choose block sizes for `rows` (tokens * heads per key head) on a device without the 48 KB limit."""
    if item_bytes == 4:
        return BLOCKS[1]
    if rows <= BLOCKS[2].rows:
        return BLOCKS[2]
    return BLOCKS[5]
