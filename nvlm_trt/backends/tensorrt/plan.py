"""Builds one TensorRT plan from one ONNX graph by Polygraphy, and streams the plan to disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from nvlm_trt.backends.plans.linter import check_graph
from nvlm_trt.backends.plans.network import build_to_file, error_log, is_out_of_memory, one_line, parse
from nvlm_trt.backends.plans.profiles import Profile
from nvlm_trt.backends.tensorrt.options import PlanOptions
from nvlm_trt.backends.tensorrt.target import import_tensorrt
from nvlm_trt.errors import EngineError
from nvlm_trt.planner.memory import StageMemory


def build_plan(
    graph: Path,
    plan: Path,
    profiles: Sequence[Profile],
    options: PlanOptions,
    timing_cache: Path | None,
    expected: StageMemory,
) -> None:
    """Build `graph` into the file `plan`. The caller has registered plugins.

    `timing_cache`: a file of one GPU, TensorRT and plugin version; the build reads it, if it exists, and replaces it.
    `expected`: the memory that an error about too little memory names.
    Raises EngineError if the linter or TensorRT refuses the graph, or if memory does not suffice."""
    trt = import_tensorrt()
    check_graph(graph)
    try:
        from polygraphy.backend.trt import CreateConfig
        from polygraphy.backend.trt import Profile as PolygraphyProfile
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise EngineError("building for TensorRT needs polygraphy; `pip install polygraphy`") from None

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # our own errors say all that matters
        try:
            logger = error_log(trt)
            logger.errors.clear()
            trt.init_libnvinfer_plugins(logger, "")
            builder = trt.Builder(logger)
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parse(trt.OnnxParser(network, logger), graph, "check that TensorRT is 11.0 or later")
            _check_plugins(network, graph, trt)
            configure = CreateConfig(
                profiles=[_fill(PolygraphyProfile(), profile) for profile in profiles],
                load_timing_cache=str(timing_cache) if timing_cache and _is_readable(timing_cache) else None,
                profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
                strip_plan=options.strip_weights,
                weight_streaming=options.weight_streaming,
            )
            config = configure(builder, network)
        except PolygraphyException as error:
            raise EngineError(f"{graph.name}: TensorRT refuses its configuration: {one_line(error)}") from error
        if options.strip_weights:
            config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
        if not build_to_file(trt, builder, network, config, plan):
            raise EngineError(f"{graph.name} could not be built{_explain(expected, logger.errors)}")
        if timing_cache:
            _save_timing_cache(config, timing_cache)


def _check_plugins(network: Any, graph: Path, trt: Any) -> None:
    """Raise EngineError if the parser took fewer plugins than the graph has.

    The parser inlines the function of a plugin that it does not find: right results, slowly, without a warning."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    wanted = sum(any(attribute.name == "plugin_namespace" for attribute in node.attribute) for node in nodes)
    layers = (network.get_layer(i) for i in range(network.num_layers))
    taken = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    if taken != wanted:
        raise EngineError(
            f"{graph.name}: TensorRT took {taken} of {wanted} plugin nodes; register the plugin before parsing, with a "
            "TensorRT that has tensorrt.plugin"
        )


def _fill(target: Any, profile: Profile) -> Any:
    for name, (smallest, usual, largest) in profile.items():
        target.add(name, min=tuple(smallest), opt=tuple(usual), max=tuple(largest))
    return target


def _explain(expected: StageMemory, errors: Sequence[str]) -> str:
    """Return the end of the message `could not be built`: the expected memory, or TensorRT's first error."""
    if any(map(is_out_of_memory, errors)):
        return (
            f": out of memory. The plan was expected to take {expected} on the GPU, and trying kernels takes more; "
            "free the GPU, choose smaller --max-slots or --max-seq-len, or try --weight-streaming"
        )
    return f": {errors[0]}" if errors else "; run it with --debug for TensorRT's log"


def _is_readable(path: Path) -> bool:
    return os.path.isfile(path) and os.access(path, os.R_OK)


def _save_timing_cache(config: Any, path: Path) -> None:
    """Keep the timings for the next build. A cache that cannot be written costs that build its timing, no more."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(config.get_timing_cache().serialize())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
