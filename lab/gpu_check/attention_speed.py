"""Times gated cross-attention with a cold L2 cache, beside torch's attention and the GPU's ceilings."""

from __future__ import annotations

import contextlib
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.gpu_check.attention import (
    DECODE,
    PREFILL,
    Inputs,
    Shape,
    boolean_mask,
    full_ranges,
    launch,
    make_inputs,
    prompt_ranges,
)
from lab.gpu_check.measure import COPY, MATMUL, ceiling, cold_copies, gpu_seconds
from lab.gpu_check.record import MEASURED, PASSED, SLOW, NotAvailableError, Record, Result, Trial, Value
from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS, Blocks

SECTION = "attention-speed"
DTYPE = torch.bfloat16

# On an H200
DECODE_SHARE = 0.70  # share of the copy bandwidth
PREFILL_UNMASKED = 1.0  # times as fast as torch without a mask
PREFILL_MASKED = 1.5  # times as fast as torch with a boolean mask

_ROUNDS = 7

_BACKENDS = {
    "its own choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def input_sets(shape: Shape, ranges: Tensor) -> list[Inputs]:
    """Makes as many copies of the inputs as keep the L2 cache cold."""
    first = make_inputs(shape, ranges, DTYPE, "cuda")
    return [
        first._replace(query=first.query.clone(), key=first.key.clone(), value=first.value.clone())
        for _ in range(cold_copies(first[:3]))
    ]


def kernel_seconds(sets: list[Inputs], blocks: Blocks | None = None) -> float:
    """Returns the median of several CUDA graphs. Raises NotAvailableError if the blocks do not fit."""
    launch(sets[0], blocks)  # a capture that fails leaves the stream in a bad state
    calls = [partial(launch, inputs, blocks) for inputs in sets]
    return statistics.median(gpu_seconds(calls) for _ in range(_ROUNDS))


def moved_bytes(inputs: Inputs) -> int:
    """Counts every byte once, read or written. Keys and values outside the ranges do not count."""
    longest = int((inputs.cross_ranges[..., 1] - inputs.cross_ranges[..., 0]).max())
    keys_and_values = 2 * inputs.key.nbytes * longest // inputs.key.shape[2]
    return keys_and_values + 2 * inputs.query.nbytes + inputs.cross_ranges.nbytes


def floating_point_operations(inputs: Inputs) -> int:
    """Counts the operations of the two products, within the ranges."""
    pairs = int((inputs.cross_ranges[..., 1] - inputs.cross_ranges[..., 0]).clamp_min(0).sum())
    return 4 * pairs * inputs.query.shape[1] * inputs.query.shape[3]


Call = Callable[[], object]


class TorchInputs(NamedTuple):
    """Holds the arguments of torch's attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    grouped: bool

    def attend(self, backend: SDPBackend | None) -> Tensor:
        """Calls torch's attention; None leaves the choice of the implementation to torch."""
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                self.query, self.key, self.value, attn_mask=self.mask, enable_gqa=self.grouped
            )


def _grouped(inputs: Inputs, mask: Tensor | None) -> TorchInputs:
    return TorchInputs(inputs.query, inputs.key, inputs.value, mask, grouped=True)


def _packed(inputs: Inputs, mask: Tensor | None) -> TorchInputs:
    """Packs heads that share keys as rows of one head, [B, KV, group * S, D], which only a causal mask would forbid."""
    batch, heads, tokens, head_dim = inputs.query.shape
    kv_heads = inputs.key.shape[1]
    rows = inputs.query.view(batch, kv_heads, heads // kv_heads * tokens, head_dim)
    mask = None if mask is None else mask.repeat(1, 1, heads // kv_heads, 1)
    return TorchInputs(rows, inputs.key, inputs.value, mask, grouped=False)


def _repeated(inputs: Inputs, mask: Tensor | None) -> TorchInputs:
    group = inputs.query.shape[1] // inputs.key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (inputs.key, inputs.value))
    return TorchInputs(inputs.query, key, value, mask, grouped=False)


ARRANGEMENTS = {
    "grouped heads": _grouped,
    "a group's heads as rows": _packed,
    "keys repeated for each head": _repeated,
}


def fastest_of_torch(sets: list[Inputs], masked: bool) -> tuple[str, list[Call]]:
    """Returns the names and the calls of the fastest arrangement and implementation of torch's attention.

    Times neither the gate, nor empty ranges, nor making the mask or the copies."""
    best: tuple[float, str, list[Call]] | None = None
    for arrangement, arrange in ARRANGEMENTS.items():
        arranged = [arrange(inputs, boolean_mask(inputs) if masked else None) for inputs in sets]
        for implementation, backend in _BACKENDS.items():
            calls: list[Call] = [partial(each.attend, backend) for each in arranged]
            with warnings.catch_warnings():  # about inputs that an implementation does not take
                warnings.simplefilter("ignore")
                try:
                    seconds = gpu_seconds(calls)
                except RuntimeError:  # no such implementation for these inputs, or too little memory
                    torch.cuda.synchronize()
                    continue
            if best is None or seconds < best[0]:
                best = seconds, f"{arrangement}, {implementation}", calls
    if best is None:
        raise NotAvailableError("torch has no attention for this on this GPU")
    return best[1:]


def decoding(shape: Shape, record: Record, target: float | None) -> Result:
    """Times decoding, which memory bandwidth limits, and its share of the copy's bandwidth."""
    sets = input_sets(shape, full_ranges(shape))
    seconds, size = kernel_seconds(sets), moved_bytes(sets[0])
    share = size / seconds / 1e9 / ceiling(record, COPY)
    values: dict[str, Value] = {
        "us": seconds * 1e6,
        "MB": size / 1e6,
        "GB/s": size / seconds / 1e9,
        "of the copy's": share,
    }
    status = MEASURED if target is None else PASSED if share >= target else SLOW
    return Result(status, values, "" if target is None else f"target {target:g} on an H200")


def prefill(record: Record) -> Result:
    """Times prefill, which arithmetic limits, and its share of the rate of a large product."""
    sets = input_sets(PREFILL, prompt_ranges(PREFILL))
    seconds, operations = kernel_seconds(sets), floating_point_operations(sets[0])
    rate = operations / seconds / 1e12
    return Result(MEASURED, {"us": seconds * 1e6, "TFLOP/s": rate, "of the product's": rate / ceiling(record, MATMUL)})


def against_torch(shape: Shape, ranges: Tensor, masked: bool, target: float | None) -> Result:
    """Times the kernel and torch's fastest way in turn: their ratio, of the medians and within each round."""
    sets = input_sets(shape, ranges)
    best, torch_calls = fastest_of_torch(sets, masked)
    calls = [partial(launch, inputs) for inputs in sets]
    rounds = [(gpu_seconds(calls), gpu_seconds(torch_calls)) for _ in range(_ROUNDS)]
    ours, theirs = (statistics.median(times) for times in zip(*rounds, strict=True))
    within = [b / a for a, b in rounds]
    times = theirs / ours
    values: dict[str, Value] = {"us": ours * 1e6, "torch's best us": theirs * 1e6, "times as fast": times}
    values |= {"at least": min(within), "at most": max(within)}
    status = MEASURED if target is None else PASSED if times >= target else SLOW
    note = f"best: {best}" + ("" if target is None else f"; target {target:g} times on an H200")
    return Result(status, values, note)


def table_entry(shape: Shape, ranges: Tensor, number: int) -> Result:
    """Times one entry of the block table."""
    seconds = kernel_seconds(input_sets(shape, ranges), BLOCKS[number])
    return Result(MEASURED, {"us": seconds * 1e6}, str(BLOCKS[number]))


def trials(record: Record) -> Iterator[Trial]:
    """Yields the trials, which need a GPU."""
    shapes = {"decoding": (DECODE, full_ranges(DECODE)), "prefill": (PREFILL, prompt_ranges(PREFILL))}
    yield f"decoding: {DECODE}", partial(decoding, DECODE, record, DECODE_SHARE)
    yield "decoding one request", partial(decoding, DECODE._replace(batch=1), record, None)
    yield f"prefill: {PREFILL}", partial(prefill, record)
    yield "prefill against torch without a mask", partial(against_torch, *shapes["prefill"], False, PREFILL_UNMASKED)
    yield "prefill against torch with a mask", partial(against_torch, *shapes["prefill"], True, PREFILL_MASKED)
    yield "decoding against torch without a mask", partial(against_torch, *shapes["decoding"], False, None)
    for name, (shape, ranges) in shapes.items():
        for number in BLOCKS:
            yield f"{name}, block table's entry {number}", partial(table_entry, shape, ranges, number)
