"""Builds small plans of TensorRT-RTX and runs them. Needs TensorRT-RTX and onnx; only running needs a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.gpu_check.record import NotAvailableError
from nvlm_trt.backends.plans.network import error_log
from nvlm_trt.backends.tensorrt_rtx.target import import_rtx, set_targets

CURRENT = "current"  # target: the GPU of the machine that builds
Profile = Mapping[str, Sequence[Sequence[int]]]  # input -> smallest, usual and largest shape


class NotBuiltError(Exception):
    """TensorRT-RTX does not build a plan; the message is its first error."""


def product_graph(kind: str, size: int) -> bytes:
    """Write the ONNX graph of x [size, size] times a weight [size, size], both bf16, or int8 with scales as W8A8."""
    from onnx import TensorProto, helper, numpy_helper

    bf16 = TensorProto.BFLOAT16
    tensors, nodes = [], []
    if kind == "int8":
        scale = helper.make_tensor("scale", bf16, [], [2.0**-5])
        scales = helper.make_tensor("scales", bf16, [size], [2.0**-12] * size)
        zero, zeros = np.array(0, np.int8), np.zeros(size, np.int8)
        weight = numpy_helper.from_array(integers(size), "weight")
        tensors += [scale, scales, weight, numpy_helper.from_array(zero, "zero")]
        tensors += [numpy_helper.from_array(zeros, "zeros")]
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x8"]),
            helper.make_node("DequantizeLinear", ["x8", "scale", "zero"], ["left"]),
            helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["right"], axis=1),
        ]
    else:
        right = torch.from_numpy(integers(size)).to(torch.bfloat16) * 2.0**-12
        raw = right.view(torch.int16).numpy().tobytes()
        tensors.append(helper.make_tensor("right", bf16, [size, size], raw, raw=True))
        nodes.append(helper.make_node("Identity", ["x"], ["left"]))
    nodes.append(helper.make_node("MatMul", ["left", "right"], ["y"]))
    x, y = (helper.make_tensor_value_info(name, bf16, [size, size]) for name in "xy")
    graph = helper.make_graph(nodes, kind, [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return bytes(model.SerializeToString())


def integers(size: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Draw the weight [size, size] of `product_graph` in units of 2**-12: bf16 has these numbers exactly."""
    return np.random.default_rng(0).integers(-127, 128, (size, size), dtype=np.int8)


def parse(graph: bytes) -> Callable[[Any, Any], Any]:
    """Return a function for `build` that parses an ONNX graph."""

    def fill(trt: Any, network: Any) -> Any:
        parser = trt.OnnxParser(network, error_log(trt))
        if not parser.parse(graph):
            raise NotBuiltError(parser.get_error(0).desc() if parser.num_errors else "the parser gives no reason")
        return parser  # owns the weights until the plan is built

    return fill


def build(
    fill: Callable[[Any, Any], Any],
    targets: Sequence[str] = (),
    profile: Profile | None = None,
    flags: Sequence[str] = (),
) -> bytes:
    """Build a plan of the network that `fill(trt, network)` makes; what it returns lives until the plan is built.

    Raises NotBuiltError if TensorRT-RTX refuses."""
    trt = import_rtx()
    logger = error_log(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    kept = fill(trt, network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if CURRENT in targets:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    else:
        set_targets(trt, config, targets)
    if profile:
        made = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            made.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        config.add_optimization_profile(made)
    plan = builder.build_serialized_network(network, config)
    del kept
    if plan is None:
        raise NotBuiltError(logger.errors[0] if logger.errors else "TensorRT-RTX gives no reason")
    return bytes(memoryview(plan))


class Validity(NamedTuple):
    """What TensorRT-RTX says of a plan on this GPU."""

    verdict: str  # VALID, SUBOPTIMAL or INVALID
    reasons: list[str]
    log: str  # its first error message, if it logged one

    @property
    def refused(self) -> bool:
        return self.verdict == "INVALID"

    def __str__(self) -> str:
        return "; ".join([self.verdict.lower(), *self.reasons, *[self.log] * bool(self.log)])


def validity(plan: bytes | Path) -> Validity:
    """Ask TensorRT-RTX whether a plan runs on this GPU."""
    trt = import_rtx()
    logger = error_log(trt)
    logger.errors.clear()
    runtime = trt.Runtime(logger)
    size = runtime.engine_header_size
    if isinstance(plan, Path):
        with plan.open("rb") as file:
            header = file.read(size)
    else:
        header = plan[:size]
    verdict, bits = runtime.get_engine_validity(header)
    members = trt.EngineInvalidityDiagnostics.__members__.items()
    reasons = [name.lower().replace("_", " ") for name, reason in members if int(reason) & int(bits)]
    return Validity(verdict.name, reasons, logger.errors[0] if logger.errors else "")


def require_gpu() -> None:
    """Raise NotAvailableError without a GPU."""
    if not torch.cuda.is_available():
        raise NotAvailableError("torch sees no GPU here; run this on a machine with one")


class SmallPlan:
    """A loaded plan. Each call has an execution context of its own, so that one CUDA graph can record several."""

    def __init__(self, plan: bytes) -> None:
        """Load a plan. Raises ValueError with TensorRT-RTX's first error if it cannot be loaded."""
        self.trt = import_rtx()
        logger = error_log(self.trt)
        logger.errors.clear()
        self.logger, self._runtime = logger, self.trt.Runtime(logger)
        self._contexts: list[Any] = []
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise ValueError(logger.errors[0] if logger.errors else "TensorRT-RTX gives no reason")

    def call(self, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a function that queues one run on torch's current stream; the tensors are its inputs and outputs."""
        context = self.engine.create_execution_context(self._config)
        if context is None:
            raise ValueError("no execution context, for lack of GPU memory perhaps")
        for name, tensor in tensors.items():
            is_input = self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            if is_input and not context.set_input_shape(name, tuple(tensor.shape)):
                raise ValueError(f"the plan does not take {name} of shape {tuple(tensor.shape)}")
            context.set_tensor_address(name, tensor.data_ptr())

        self._contexts.append(context)

        def run() -> None:
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise ValueError(self.logger.errors[0] if self.logger.errors else "the plan did not run")

        return run

    def is_capturable(self) -> bool:
        """Return whether a CUDA graph can record the calls, which have all run."""
        stream = torch.cuda.Stream().cuda_stream
        return all(context.is_stream_capturable(stream) for context in self._contexts)

    @cached_property
    def _config(self) -> Any:
        """Configure contexts as nvlm-trt does: all kernels of a shape are compiled before its first run."""
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.DISABLED
        return config
