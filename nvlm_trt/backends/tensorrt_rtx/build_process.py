"""Builds one plan in a process of its own: `python -m nvlm_trt.backends.tensorrt_rtx.build_process`.

When memory is short, NVIDIA's builder may end its process with a segmentation fault or wait forever, and Linux kills
the process that has most. So the builder's process is not the one that has to report it, and its memory is free again
after each plan.

Standard input gives an order as one line of JSON, and stays open: its end tells that nobody waits for the plan any
more. Standard output gives the answer as JSON. NVIDIA's libraries print to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_trt.backends.plans.network import build_to_file, error_log, is_out_of_memory, parse
from nvlm_trt.backends.tensorrt_rtx.target import set_targets
from nvlm_trt.errors import EngineError

if TYPE_CHECKING:
    from nvlm_trt.backends.plans.profiles import Profile

STILL_SECONDS = 120
_IDLE = 0.005  # seconds of processor time: looking at the time takes less


@dataclass(frozen=True)
class PlanOrder:
    """What to build."""

    graph: str  # path of the ONNX file
    plan: str  # path of the file to write
    profiles: list[Profile]
    targets: list[str]
    weight_streaming: bool
    # demand fused kernels first, and only where TensorRT-RTX has none, let it compose attention from products and a
    # softmax that hold all scores in memory
    fuse: bool


@dataclass(frozen=True)
class PlanAnswer:
    """What became of an order: the plan is written if there is no error."""

    fused: bool | None = None  # whether every attention has a fused kernel; None: the graph has no attention
    error: str | None = None
    out_of_memory: bool = False
    refused: bool = False  # the error is a whole message for users
    error_number: int | None = None  # of an operating-system error while the plan was written


def main() -> None:
    """Answer one order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is for the process that waits
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        order = PlanOrder(**json.loads(sys.stdin.readline()))
        # the builder lets other threads run
        threading.Thread(target=_end_with_input, daemon=True).start()
        threading.Thread(target=_end_without_progress, daemon=True).start()
        json.dump(asdict(fulfil(order)), answers, allow_nan=False)


def _end_with_input() -> None:
    """Wait for the end of standard input, then end this process."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _end_without_progress() -> None:
    """End this process when it has used no processor time for STILL_SECONDS: its threads then wait for each other.

    Counts seconds in which this thread ran, so that a process that was stopped (Ctrl-Z) is not ended."""
    still, before = 0, time.process_time()
    while still < STILL_SECONDS:
        time.sleep(1)
        now = time.process_time()
        still = still + 1 if now - before < _IDLE else 0
        before = now
    print(f"the builder has stood still for {STILL_SECONDS} s", file=sys.stderr, flush=True)
    os._exit(1)


def fulfil(order: PlanOrder) -> PlanAnswer:
    """Build a plan, without fused kernels if it cannot be had with them."""
    import tensorrt_rtx_bindings as trt  # the process that waits has imported it, too

    logger = error_log(trt)
    try:
        if order.fuse:
            built, attended = _build(trt, logger, order, fused=True)
            if built:
                return PlanAnswer(fused=True if attended else None)
        built, attended = _build(trt, logger, order, fused=False)
    except MemoryError as error:
        return PlanAnswer(error=str(error), out_of_memory=True)
    except OSError as error:
        return PlanAnswer(error=error.strerror, error_number=error.errno)
    except EngineError as error:
        memory = any(map(is_out_of_memory, [str(error), *logger.errors]))
        return PlanAnswer(error=str(error), out_of_memory=memory, refused=True)
    if built:
        return PlanAnswer(fused=False if attended else None)
    return PlanAnswer(
        error=logger.errors[0] if logger.errors else "TensorRT-RTX gives no reason",
        out_of_memory=any(map(is_out_of_memory, logger.errors)),
    )


def _build(trt: Any, logger: Any, order: PlanOrder, fused: bool) -> tuple[bool, bool]:
    """Build once. Return whether the plan is written, else the logger has the errors, and whether there is attention.

    Raises EngineError if the parser refuses the graph, and OSError if the plan cannot be written."""
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parse(parser, Path(order.graph), "this is a fault of nvlm-trt; build it with --backend onnxruntime meanwhile")
    attended = False
    for attention in attentions(trt, network):
        attention.decomposable = not fused
        attended = True
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if order.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    set_targets(trt, config, order.targets)
    for profile in order.profiles:
        made = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            made.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        config.add_optimization_profile(made)
    return build_to_file(trt, builder, network, config, Path(order.plan)), attended


def attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Yield each IAttention of a parsed network.

    `get_layer` returns bare ILayers: Python sees the class of a layer only after it is set."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


if __name__ == "__main__":
    main()
