"""Does a warpgroup's work on one block of keys: products on the tensor cores, and softmax weights."""

# ruff: noqa: N803, N806, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from nvlm_trt.plugins.gated_cross_attention.hopper.tiles import KEYS

# Weights are relative to the largest score so far, or to a score whose weight is at most 2^SLACK times smaller: fp16
# holds 256.
SLACK = gl.constexpr(8.0)


@gluon.jit
def multiply_keys(q, block, LAYOUT: gl.constexpr):
    """Start multiplying the queries by a block of keys. Returns the scores [64, KEYS], in flight."""
    block = block.reshape([block.shape[1], block.shape[2]]).permute((1, 0))
    zeros = gl.zeros([64, KEYS], gl.float32, LAYOUT)
    return warpgroup_mma(q, block, zeros, use_acc=False, is_async=True)


@gluon.jit
def multiply_values(total, weights, decay, block):
    """Start total * decay + weights times a block of values. Returns (that sum, the weights being read), in flight."""
    block = block.reshape([block.shape[1], block.shape[2]])
    factor = gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None]
    factor, _ = gl.broadcast(factor, total)
    COUNT: gl.constexpr = total.shape[1] // 2  # numbers of one thread
    total = gl.inline_asm_elementwise(
        _scale_asm(COUNT), _scale_operands(COUNT), [total, factor], gl.float32, is_pure=False, pack=COUNT
    )
    p = gl.convert_layout(weights.to(block.dtype), gl.DotOperandLayout(0, total.type.layout, 2))
    return warpgroup_mma(p, block, total, is_async=True), p


@gluon.jit
def masked(scores, at, start, end):
    """Set scores [64, KEYS] of the keys from `at` on to -inf outside each row's start..end."""
    at = at + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
    return gl.where((at[None, :] >= start[:, None]) & (at[None, :] < end[:, None]), scores, -float("inf"))


@gluon.jit
def softmax(scores, row_max, visible, HEAD_DIM: gl.constexpr):
    """Return (weights [64, KEYS], the scores that weights are relative to [64], the factors of the sums so far [64],
    the sums of the weights [64, 8]).

    With 8 sums per row, no thread needs another thread's sums. Rows that are not visible have weights of 0."""
    # exp(x) = exp2(x * log2(e)): the hardware has exp2
    SCALE: gl.constexpr = HEAD_DIM**-0.5 * 1.4426950408889634
    GROUPS: gl.constexpr = scores.shape[1] // 8
    new_max = gl.max(gl.max(scores.reshape([64, GROUPS, 8]), 1), 1)
    new_max = gl.where(visible, gl.convert_layout(new_max, row_max.type.layout) * SCALE, -float("inf"))
    new_max = gl.where(new_max > row_max + SLACK, new_max, row_max)
    finite = gl.where(new_max == -float("inf"), 0.0, new_max)  # no key so far: -inf - -inf is NaN
    shift = gl.where(visible, finite, float("inf"))
    weights = gl.exp2(gl.fma(scores, gl.to_tensor(SCALE), -shift[:, None]))
    return weights, new_max, gl.exp2(row_max - finite), gl.sum(weights.reshape([64, GROUPS, 8]), 1)


@gluon.constexpr_function
def _scale_asm(count):
    """Multiply `count` numbers by their factors, unless all factors of the warp are 1, which would change no bit.

    A thread has two rows, whose factors have the order a, a, b, b, a, a, ..."""
    lines = [
        f"setp.neu.f32 p, ${2 * count}, 0f3F800000;",
        f"setp.neu.or.f32 p, ${2 * count + 2}, 0f3F800000, p;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra.uni DONE;",
        *[f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)],
    ]
    return "\n".join(["{", ".reg .pred p;", *lines, "DONE:", "}"])


@gluon.constexpr_function
def _scale_operands(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)
