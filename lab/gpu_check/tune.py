"""Tries alternatives to the kernels' block sizes: checks each against the choice in place and times it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from lab.gpu_check.attention import DECODE, PREFILL, Error, Inputs, Shape, full_ranges, launch, oracle, prompt_ranges
from lab.gpu_check.attention_speed import DTYPE, input_sets
from lab.gpu_check.measure import gpu_seconds
from lab.gpu_check.record import MEASURED, WRONG, NotAvailableError, Record, Result, Trial
from lab.gpu_check.resample import LARGE, cold_images
from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS, Blocks, choose_blocks
from nvlm_trt.plugins.tile_resample import launcher as resample_launcher

SECTION = "tune"

KIB = 1 << 10
DECODE_BLOCKS = [
    Blocks(16, key_bytes, 4, stages, chunk=chunk)
    for chunk, key_bytes, stages in itertools.product((None, 256, 512, 1024), (8 * KIB, 16 * KIB, 32 * KIB), (2, 3, 4))
]
PREFILL_BLOCKS = [
    Blocks(rows, key_bytes, rows // 16, stages)
    for rows, key_bytes, stages in itertools.product((64, 128), (8 * KIB, 16 * KIB, 32 * KIB), (2, 3, 4))
]


class Squares(NamedTuple):
    """Block sizes and warps of tile_resample."""

    block: int
    source: int
    warps: int


SQUARES = [Squares(*sizes) for sizes in itertools.product((32, 64), (32, 64, 128), (2, 4, 8))]

Case = tuple[str, object]  # "decoding", "prefill" or "tile_resample", and one of its alternatives


def cases() -> list[Case]:
    """Lists the alternatives, the choices in place first, so that a short run times them too."""
    decode = list(dict.fromkeys([*BLOCKS.values(), *DECODE_BLOCKS]))
    prefill = list(dict.fromkeys([*BLOCKS.values(), *PREFILL_BLOCKS]))
    in_place = Squares(resample_launcher.BLOCK, resample_launcher.SOURCE, resample_launcher.WARPS)
    squares = dict.fromkeys([in_place, *SQUARES])
    of_each: list[tuple[str, Sequence[object]]] = [
        ("decoding", decode),
        ("prefill", prefill),
        ("tile_resample", list(squares)),
    ]
    return [(kernel, alternative) for kernel, alternatives in of_each for alternative in alternatives]


def compile_ahead(all_cases: Sequence[Case], deadline: float) -> None:
    """Launches each case once, in about as many processes as cores: Triton's disk cache keeps the compiled kernels."""
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 1))
    started = time.time()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        try:
            compiled = sum(pool.map(_launch_once, all_cases, itertools.repeat(deadline)))
        except BrokenProcessPool:
            print("tune: a compiling process died; the timing compiles the rest", flush=True)
            return
    print(f"tune: {compiled} of {len(all_cases)} compiled and launched in {time.time() - started:.0f} s", flush=True)


def _launch_once(case: Case, deadline: float) -> bool:
    """Launches a case in a process of the pool. Ignores errors: the timing meets and reports them again."""
    if time.time() >= deadline:
        return False
    try:
        _one_call(*case)()
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


@cache
def _sets(kernel: str) -> list[Inputs]:
    shape, ranges = _shape(kernel)
    return input_sets(shape, ranges)


def _shape(kernel: str) -> tuple[Shape, Tensor]:
    return (DECODE, full_ranges(DECODE)) if kernel == "decoding" else (PREFILL, prompt_ranges(PREFILL))


@cache
def _images() -> list[Tensor]:
    return cold_images(LARGE)


@cache
def _expected(kernel: str) -> Tensor:
    if kernel == "tile_resample":
        return resample_launcher.tile_resample(_images()[0], *LARGE[2:])
    return oracle(_sets(kernel)[0])


def _resample(image: Tensor, squares: Squares) -> Tensor:
    with_sizes = {"BLOCK": squares.block, "SOURCE": squares.source, "WARPS": squares.warps}
    before = {name: getattr(resample_launcher, name) for name in with_sizes}
    try:
        for name, value in with_sizes.items():
            setattr(resample_launcher, name, value)
        return resample_launcher.tile_resample(image, *LARGE[2:])
    finally:
        for name, value in before.items():
            setattr(resample_launcher, name, value)


def _calls(kernel: str, alternative: object) -> list[Callable[[], Tensor]]:
    if isinstance(alternative, Squares):
        return [partial(_resample, image, alternative) for image in _images()]
    assert isinstance(alternative, Blocks), alternative
    return [partial(launch, inputs, alternative) for inputs in _sets(kernel)]


def _one_call(kernel: str, alternative: object) -> Callable[[], Tensor]:
    return _calls(kernel, alternative)[0]


def measure(kernel: str, alternative: object) -> Result:
    """Times an alternative if its result is right."""
    from triton.runtime.errors import OutOfResources

    calls = _calls(kernel, alternative)
    try:
        output = calls[0]()
    except OutOfResources as error:
        raise NotAvailableError(str(error)) from None
    expected = _expected(kernel)
    good = output.equal(expected) if kernel == "tile_resample" else Error.of(output, expected).is_within(DTYPE)
    if not good:
        return Result(WRONG, {}, "its result is wrong")
    in_place = {
        "decoding": choose_blocks(DECODE.tokens * DECODE.heads // DECODE.kv_heads, DTYPE.itemsize),
        "prefill": choose_blocks(PREFILL.tokens * PREFILL.heads // PREFILL.kv_heads, DTYPE.itemsize),
        "tile_resample": Squares(resample_launcher.BLOCK, resample_launcher.SOURCE, resample_launcher.WARPS),
    }
    has_own_kernel = kernel == "prefill" and torch.cuda.get_device_capability() == (9, 0)
    note = ("in place on other GPUs" if has_own_kernel else "in place") if alternative == in_place[kernel] else ""
    return Result(MEASURED, {"us": gpu_seconds(calls) * 1e6}, note)


def trials(deadline: float) -> Iterator[Trial]:
    """Yields the trials, which need a GPU. Compiling ahead takes half of the time at most."""
    all_cases = cases()
    compile_ahead(all_cases, (time.time() + deadline) / 2)
    for kernel, alternative in all_cases:
        yield f"{kernel}: {alternative}", partial(measure, kernel, alternative)


def best(record: Record) -> Iterator[str]:
    """Yields for each kernel its fastest alternatives, and the choice in place."""
    timed = [check for check in record.read() if check.section == SECTION and "us" in check.values]
    for kernel, of_one in itertools.groupby(timed, key=lambda check: check.name.split(":")[0]):
        ranked = sorted(of_one, key=lambda check: float(check.values["us"]))  # type: ignore[arg-type]
        yield f"{kernel}: of {len(ranked)} the fastest:"
        for check in ranked[:5] + [check for check in ranked[5:] if check.note]:
            yield f"  {check.values['us']:8.1f} us  {check.name.split(': ', 1)[1]}  {check.note}"
