"""Checks small plans of TensorRT-RTX: whether a GPU takes them, int8 against bf16, refitted weights, and masked
attention against the kernel of the plugin. All functions but `refittable` run plans, so they need a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.gpu_check import attention
from lab.gpu_check.measure import cold_copies, gpu_seconds
from lab.gpu_check.record import MEASURED, PASSED, WRONG, NotAvailableError, Result, Value
from lab.gpu_check.rtx_engines import attention_path
from lab.gpu_check.rtx_plans import (
    NotBuiltError,
    Profile,
    SmallPlan,
    build,
    integers,
    parse,
    product_graph,
    require_gpu,
    validity,
)

DEVICE = "cuda"
SMALL = 64
LARGE = 4096  # rows, columns and depth of the product that is timed
SCALE = 2.0**-12  # of the integers in `product_graph`
INT8_GAIN = 1.3  # times as fast as bf16: int8 has twice the peak rate, and a product of dequantised numbers the same
# The 72B model's cross-attention with the cache of four images of 6 + 1 tiles, in steps of one and eight requests.
CROSS = tuple(attention.Shape(64, 8, 128, batch=rows, tokens=1, cross_tokens=7168) for rows in (1, 8))
USED = 1792  # image tokens of one image: the plugin's kernel reads only these, masked attention the whole cache
WEIGHT = "weight"  # name of the refitted weight


def gpu_validity(targets: Sequence[str]) -> Result:
    """Tell whether this GPU takes a plan for `targets`; a refusal is a result."""
    require_gpu()
    try:
        plan = build(parse(product_graph("bf16", SMALL)), targets)
    except NotBuiltError as error:
        return Result(MEASURED, {"validity": "not built", "diagnostics": ""}, str(error))
    found = validity(plan)
    return Result(MEASURED, {"validity": found.verdict, "diagnostics": ", ".join(found.reasons)}, found.log)


def small_product(targets: Sequence[str]) -> Result:
    """Load and run a small plan, whatever its header says."""
    require_gpu()
    built = build(parse(product_graph("bf16", SMALL)), targets)
    values: dict[str, Value] = {"loads": False, "rms error": None}
    try:
        plan = SmallPlan(built)
        values["loads"] = True
        values["rms error"] = rms = _run_product(plan, "bf16", SMALL)[0]
    except ValueError as error:
        return Result(MEASURED if validity(built).refused else WRONG, values, str(error))
    return Result(PASSED if rms < 1e-2 else WRONG, values)


def int8_product(targets: Sequence[str]) -> Result:
    """Time a product of W8A8 int8 against the same product in bf16."""
    require_gpu()
    errors, times, notes = {}, {}, []
    for kind in ("bf16", "int8"):
        plan = SmallPlan(build(parse(product_graph(kind, LARGE)), targets))
        errors[kind], calls = _run_product(plan, kind, LARGE)
        times[kind], how = seconds_of(plan, calls)
        notes += [f"{kind} {how}"] * bool(how)
    gain = times["bf16"] / times["int8"]
    values: dict[str, Value] = {f"{kind} us": seconds * 1e6 for kind, seconds in times.items()}
    values |= {"times as fast": gain, "TOP/s": 2 * LARGE**3 / times["int8"] / 1e12, "rms error": errors["int8"]}
    verdict = "multiplies as int8" if gain >= INT8_GAIN else "no faster than bf16: not multiplied as int8"
    return Result(MEASURED if max(errors.values()) < 1e-2 else WRONG, values, "; ".join([verdict, *notes]))


def _run_product(plan: SmallPlan, kind: str, size: int) -> tuple[float, list[Callable[[], None]]]:
    """Run a plan of `product_graph`. Returns its rms error relative to torch's product, and the call."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(size, size, generator=random).to(DEVICE, torch.bfloat16)
    y = torch.empty_like(x)
    call = plan.call({"x": x, "y": y})
    call()
    torch.cuda.synchronize()
    left = (x.double() * 32).round().clamp(-128, 127) / 32 if kind == "int8" else x.double()
    expected = left @ (torch.from_numpy(integers(size)).to(DEVICE).double() * SCALE)
    return attention.Error.of(y, expected).rms, [call]


def seconds_of(plan: SmallPlan, calls: Sequence[Callable[[], object]]) -> tuple[float, str]:
    """Return the median time of one of a plan's calls, all of which have run: from a CUDA graph if the plan can be
    recorded; else with the host's time, which the text says."""
    if plan.is_capturable():
        return gpu_seconds(calls), ""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(50)]
    for index, (begin, end) in enumerate(events):
        begin.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3, "timed with the host: no graph"


# --- refitted weights ------------------------------------------------------------------------------------------------


def refittable(form: str, weight: Tensor | None, targets: Sequence[str] = ()) -> bytes:
    """Build a plan of x [8, SMALL] times a weight [SMALL, SMALL], bf16, as "constant" or "convolution" 1 x 1.

    `weight` None: a placeholder, which is refitted when the plan is loaded."""

    def fill(trt: Any, network: Any) -> Any:
        pointer = 0 if weight is None else weight.data_ptr()
        values = trt.Weights(trt.bfloat16, pointer, SMALL * SMALL)
        x = network.add_input("x", trt.bfloat16, (8, SMALL, 1, 1) if form == "convolution" else (8, SMALL))
        if form == "convolution":  # [outputs, inputs, 1, 1]
            layer = network.add_convolution_nd(x, SMALL, (1, 1), values)
            stored = layer.kernel
        else:  # [inputs, outputs]
            constant = network.add_constant((SMALL, SMALL), values)
            none = trt.MatrixOperation.NONE
            layer = network.add_matrix_multiply(x, none, constant.get_output(0), none)
            stored = constant.weights
        if weight is None:
            named = network.set_weights_name(stored, WEIGHT) and network.mark_weights_refittable(WEIGHT)
            assert named, "TensorRT-RTX does not mark the placeholder as one to refit"
        y = layer.get_output(0)
        y.name = "y"
        network.mark_output(y)
        return values, weight

    flags = ("STRIP_PLAN", "REFIT_INDIVIDUAL") if weight is None else ()
    return build(fill, targets, flags=flags)


def refit(form: str, targets: Sequence[str]) -> Result:
    """Refit a placeholder and compare the numbers with those of a plan that has the weight."""
    require_gpu()
    random = torch.Generator().manual_seed(2)
    weight = (torch.randn(SMALL, SMALL, generator=random) / 8).to(torch.bfloat16)
    x = torch.randn(8, SMALL, generator=random).to(DEVICE, torch.bfloat16)
    shape = (8, SMALL, 1, 1) if form == "convolution" else (8, SMALL)
    outputs = []
    sizes = []
    for built_in in (weight, None):
        built = build_or_tell(partial(refittable, form, built_in, targets))
        sizes.append(len(built))
        plan = SmallPlan(built)
        if built_in is None and not _refitted(plan, weight):
            error = plan.logger.errors[0] if plan.logger.errors else "no reason given"
            return Result(MEASURED, {"refits": False, "equal numbers": None}, error)
        y = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
        call = plan.call({"x": x.reshape(shape), "y": y})
        call()
        torch.cuda.synchronize()
        outputs.append(y)
    equal = outputs[0].equal(outputs[1])
    return Result(PASSED if equal else WRONG, {"refits": True, "equal numbers": equal}, f"plans of {sizes} bytes")


def _refitted(plan: SmallPlan, weight: Tensor) -> bool:
    trt = plan.trt
    refitter = trt.Refitter(plan.engine, plan.logger)
    given = refitter.set_named_weights(WEIGHT, trt.Weights(trt.bfloat16, weight.data_ptr(), weight.numel()))
    return bool(given and refitter.refit_cuda_engine())


def build_or_tell(make: Callable[[], bytes]) -> bytes:
    """Return a plan. Raises NotAvailableError if TensorRT-RTX does not build it."""
    try:
        return make()
    except NotBuiltError as error:
        raise NotAvailableError(f"TensorRT-RTX does not build it: {error}") from None


# --- masked attention ------------------------------------------------------------------------------------------------


def attention_profile() -> Profile:
    """Return the shapes of masked attention: one to eight rows, as a decoder's second profile has them."""
    most = CROSS[-1]
    batches = (1, most.batch, most.batch)
    cache = [[batch, most.kv_heads, most.cross_tokens, most.head_dim] for batch in batches]
    query = [[batch, most.heads, 1, most.head_dim] for batch in batches]
    return {"query": query, "key": cache, "value": cache, "cross_ranges": [[batch, 1, 2] for batch in batches]}


def masked_attention(directory: Path, rows: int, targets: Sequence[str]) -> Result:
    """Time masked attention over a whole cross-attention cache, as the product's graphs have it, against the plugin's
    kernel. The graph is in the engines' directory."""
    require_gpu()
    graph = attention_path(directory)
    shape = next(shape for shape in CROSS if shape.batch == rows)
    plan = SmallPlan(build_or_tell(partial(build, parse(graph.read_bytes()), targets, attention_profile())))
    first = attention.make_inputs(shape, attention.full_ranges(shape), torch.bfloat16, DEVICE)
    copies = cold_copies(first[:3])
    sets = [first, *[first._replace(key=first.key.clone(), value=first.value.clone()) for _ in range(copies - 1)]]
    outputs = [torch.full_like(first.query, torch.nan) for _ in sets]
    calls = [plan.call(inputs._asdict() | {"output": output}) for inputs, output in zip(sets, outputs, strict=True)]
    for call in calls:
        call()
    torch.cuda.synchronize()
    error = attention.Error.of(outputs[-1], attention.launch(first).double())
    seconds, how = seconds_of(plan, calls)
    ours = gpu_seconds([partial(attention.launch, inputs) for inputs in sets])
    ranges = torch.tensor([0, USED], dtype=torch.int32, device=DEVICE).expand(first.cross_ranges.shape).contiguous()
    used = gpu_seconds([partial(attention.launch, inputs._replace(cross_ranges=ranges)) for inputs in sets])
    values: dict[str, Value] = {
        "masked us": seconds * 1e6,
        "kernel us": ours * 1e6,
        f"kernel us for {USED} tokens": used * 1e6,
        "times the kernel": seconds / ours,
        "rms error": error.rms,
    }
    return Result(MEASURED if error.is_within(torch.bfloat16) else WRONG, values, how)
