"""Tests that the interpreter refuses what TensorRT-RTX would refuse or leave undefined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_scenario import CALLS
from layer_meanings import Meaning
from layer_reading import Array
from network_interpreter import LayerError, run
from parsed_network import ParsedNetwork
from tiny_networks import Variant, parsed_stage, scenario


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> ParsedNetwork:
    return parsed_stage(Variant("X", "masked"), "decoder", tmp_path_factory.mktemp("decoder"))


def feeds(name: str = "one token of each row", **changes: Array) -> dict[str, Array]:
    rows = scenario("X")
    return {**rows.feeds(CALLS[name], rows.unused), **changes}


def test_inputs_have_the_declared_types_and_shapes(decoder: ParsedNetwork) -> None:
    ids = feeds()["input_ids"]
    run(decoder, feeds())
    with pytest.raises(AssertionError, match="input_ids is INT64, not int32"):
        run(decoder, feeds(input_ids=ids.astype(np.int32)))
    with pytest.raises(AssertionError, match=r"input_ids is \(-1, -1\), not \(3,\)"):
        run(decoder, feeds(input_ids=ids[:, 0]))
    with pytest.raises(AssertionError, match="batch of logit_index is 1, not 3"):
        run(decoder, feeds(logit_index=np.zeros(1, np.int64)))
    with pytest.raises(AssertionError):
        run(decoder, {name: value for name, value in feeds().items() if name != "logit_index"})


def test_indices_are_in_bounds(decoder: ParsedNetwork) -> None:
    ids = feeds()["input_ids"]
    for wrong in (-1, scenario("X").config.llm.vocab_size):
        with pytest.raises(LayerError, match="GATHER"):
            run(decoder, feeds(input_ids=np.full_like(ids, wrong)))
    with pytest.raises(LayerError, match="GATHER"):
        run(decoder, feeds(logit_index=np.array([0, 1, 0])))


def test_a_cache_is_not_left(decoder: ParsedNetwork) -> None:
    """The rotation refuses a position first; a table of more positions would leave it to the cache update."""
    for name, starts in (("one token of each row", (15, 33, 48)), ("the cache's last position", (15, 33, 47))):
        with pytest.raises(LayerError, match="ROTARY_EMBEDDING|KV_CACHE_UPDATE"):
            run(decoder, feeds(name, write_indices=np.array(starts)))
    for first in (-1, 48):
        with pytest.raises(LayerError, match="KV_CACHE_UPDATE"):
            run(decoder, feeds(), Meaning(first_written=lambda write_index, first=first: first))


def test_unknown_layers_and_modes_are_refused(tmp_path: Path) -> None:
    for operator, kind in (("Softmax", "SOFTMAX"), ("Abs", "ABS")):
        parsed = ParsedNetwork.parse(one_node(tmp_path, operator))
        with pytest.raises((NotImplementedError, LayerError), match=kind):
            run(parsed, {"x": np.ones((2, 3), np.float32)})


def test_a_file_that_the_parser_refuses(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="NoSuchOperator"):
        ParsedNetwork.parse(one_node(tmp_path, "NoSuchOperator"))


def one_node(directory: Path, operator: str) -> Path:
    """Write a model of one node: x [2, 3] -> y [2, 3]."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node(operator, ["x"], ["y"])], "one", values[:1], values[1:])
    path = directory / f"{operator}.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]), path)
    return path
