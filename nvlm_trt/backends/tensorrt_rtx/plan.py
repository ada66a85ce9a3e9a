"""Builds one plan of TensorRT-RTX from one ONNX graph, and streams the plan to disk. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvlm_trt.backends.plans.linter import check_graph
from nvlm_trt.backends.plans.network import error_log, is_out_of_memory, parse, stream_writer
from nvlm_trt.backends.plans.profiles import Profile
from nvlm_trt.backends.tensorrt_rtx.options import RtxOptions
from nvlm_trt.backends.tensorrt_rtx.target import import_rtx, names_of, set_targets
from nvlm_trt.errors import EngineError


def build_plan(
    graph: Path, plan: Path, profiles: Sequence[Profile], options: RtxOptions, fuse: bool, expected: int
) -> bool:
    """Build `graph` into the file `plan`. Returns whether every attention has a fused kernel.

    `fuse`: demand fused kernels first, and only where TensorRT-RTX has none, let it compose attention from products
    and a softmax that hold all scores in memory. `expected`: bytes of host memory that an error about too little memory
    names.
    Raises EngineError if the linter or TensorRT-RTX refuses the graph, or if memory does not suffice."""
    trt = import_rtx()
    check_graph(graph, plugins=False)
    if fuse and not _build(trt, graph, plan, profiles, options, fused=True):
        return True
    failure = _build(trt, graph, plan, profiles, options, fused=False)
    if failure:
        raise EngineError(
            f"{graph.name} could not be built for {names_of(options.targets)}{_explain(failure, expected)}"
        )
    return False


def _build(
    trt: Any, graph: Path, plan: Path, profiles: Sequence[Profile], options: RtxOptions, fused: bool
) -> list[str]:
    """Build once. Return the errors of a build that failed, and nothing if the plan is written."""
    logger = error_log(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parse(parser, graph, "this is a fault of nvlm-trt; build it with --backend onnxruntime meanwhile")
    for attention in attentions(trt, network):
        attention.decomposable = not fused
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    set_targets(trt, config, options.targets)
    for profile in profiles:
        made = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            made.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        config.add_optimization_profile(made)
    with plan.open("wb") as file:
        built = builder.build_serialized_network_to_stream(network, config, stream_writer(trt, file))
    return [] if built else list(logger.errors) or ["TensorRT-RTX gives no reason"]


def attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Yield each IAttention of a parsed network.

    `get_layer` returns bare ILayers: Python sees the class of a layer only after it is set."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def _explain(failure: Sequence[str], expected: int) -> str:
    """Return the end of the message `could not be built`: the expected memory, or TensorRT-RTX's first error."""
    if any(map(is_out_of_memory, failure)):
        return (
            f": out of memory. The build was expected to take {expected / 1e9:.2f} GB of host memory; free memory, or "
            "choose a --precision with smaller weights"
        )
    return f": {failure[0]}"
