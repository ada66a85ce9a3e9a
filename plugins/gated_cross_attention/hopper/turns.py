"""The two warpgroups of a program take turns at the tensor cores.

Left alone they fall into step, multiply together and take exponentials together: 113 instead of 98 us in
docs/gpu_tuning.md. By named barriers, which Gluon lacks; 8 and 9 are none of Triton's own."""

# ruff: noqa: N803, N806, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def take_turn(SECOND: gl.constexpr):
    """Wait until the other warpgroup has issued its products."""
    lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    ASM: gl.constexpr = "bar.sync 9, 256; mov.b32 $0, $1;" if SECOND else "bar.sync 8, 256; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(ASM, "=r,r", [lane], gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(SECOND: gl.constexpr):
    lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    ASM: gl.constexpr = "bar.arrive 8, 256; mov.b32 $0, $1;" if SECOND else "bar.arrive 9, 256; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(ASM, "=r,r", [lane], gl.int32, is_pure=False, pack=1)
