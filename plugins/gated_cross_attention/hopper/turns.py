"""Lets the two warpgroups of a program take turns at the tensor cores.

Without turns, both warpgroups multiply at the same time and take exponentials at the same time: 113 instead of 98 us in
docs/gpu_tuning.md. The turns use named barriers, which Gluon lacks; Triton itself does not use numbers 8 and 9."""

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
    """Let the other warpgroup issue its products."""
    lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    ASM: gl.constexpr = "bar.arrive 8, 256; mov.b32 $0, $1;" if SECOND else "bar.arrive 9, 256; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(ASM, "=r,r", [lane], gl.int32, is_pure=False, pack=1)
