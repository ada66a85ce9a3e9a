"""Runs a stage of the product both as TensorRT-RTX's parser understood it and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from decoder_scenario import max_difference
from layer_meanings import HONEST, Meaning
from layer_reading import Array
from network_interpreter import run
from parsed_network import ParsedNetwork

from nvlm_trt.backends.onnxruntime.session import session_options


@dataclass(frozen=True)
class OnnxRuntime:
    """A session that runs each node as the file has it, and also returns what activations become by quantisation.

    ONNX Runtime's optimiser would fuse the nodes of int8 to an integer product, whose results differ."""

    session: onnxruntime.InferenceSession
    quantised: frozenset[str]  # names of the extra outputs

    @staticmethod
    def open(path: Path) -> OnnxRuntime:
        model = onnx.load(path, load_external_data=False)
        made = {name for node in model.graph.node if node.op_type == "QuantizeLinear" for name in node.output}
        restored = [
            node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in made
        ]
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in restored
        )
        options = session_options(threads=1)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        return OnnxRuntime(session, frozenset(restored))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))


class Ties:
    """Adopts ONNX Runtime's choice where an activation lies between two quantised numbers.

    The last bits of float32 decide such a tie, and one more step of one activation changes later results by far more
    than the last bits do."""

    SHARE = 1e-3  # of a tensor's activations, or one activation

    def __init__(self, quantised: Mapping[str, Array]) -> None:
        self.quantised = quantised
        self.seen: set[str] = set()
        self.ties = 0

    def __call__(self, name: str, value: Array) -> Array:
        theirs: Any = self.quantised.get(name)
        if theirs is None:
            return value
        self.seen.add(name)
        levels = np.unique(np.concatenate([value.ravel(), theirs.ravel()]))
        steps = np.abs(np.searchsorted(levels, value) - np.searchsorted(levels, theirs))
        ties = np.count_nonzero(steps)
        assert steps.max() <= 1, f"{name} is {steps.max()} steps from ONNX Runtime's"
        assert ties <= max(1, self.SHARE * value.size), f"{name} differs from ONNX Runtime's in {ties} of {value.size}"
        self.ties += ties
        return theirs


class SideBySide:
    """Runs one stage in both, call by call from the same inputs, and keeps the largest difference."""

    def __init__(self, path: Path, meaning: Meaning = HONEST) -> None:
        self.parsed, self.onnxruntime, self.meaning = ParsedNetwork.parse(path), OnnxRuntime.open(path), meaning
        self.difference = 0.0
        self.ties = 0

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        expected = self.onnxruntime.run(feeds)
        ties = Ties({name: expected.pop(name) for name in self.onnxruntime.quantised})
        results = run(self.parsed, feeds, self.meaning, ties)
        assert ties.seen == self.onnxruntime.quantised
        self.difference = np.fmax(self.difference, max_difference(_finite(results), expected))
        self.ties += ties.ties
        return results


def _finite(results: dict[str, Array]) -> dict[str, Array]:
    assert all(np.isfinite(values).all() for values in results.values())
    return results
