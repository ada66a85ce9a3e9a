"""Compares nvlm::GatedCrossAttention, inlined by ONNX Runtime, with its definition in numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxscript import GraphBuilder

from nvlm_trt.plugins.gated_cross_attention import KEY_BLOCK
from nvlm_trt.plugins.gated_cross_attention.onnx_function import PLUGIN_ATTRIBUTES, gated_cross_attention

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 6, 2, 32, 3 * KEY_BLOCK


def expected_output(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, cross_ranges: np.ndarray, gate: np.ndarray
) -> np.ndarray:
    """Compute one softmax at a time, in float64."""
    output = np.zeros(query.shape)
    batch, heads, tokens, head_dim = query.shape
    for b, h, s in np.ndindex(batch, heads, tokens):
        start, end = cross_ranges[b, s]
        if start < end:
            kv_head = h // (heads // key.shape[1])
            scores = key[b, kv_head, start:end].astype(np.float64) @ query[b, h, s] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            output[b, h, s] = weights / weights.sum() @ value[b, kv_head, start:end]
    return np.tanh(gate.astype(np.float64)) * output


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24, "nvlm": 1}, name="attention")
    builder = GraphBuilder(graph)
    inputs = [
        builder.input("query", ir.DataType.FLOAT, ["batch", HEADS, "tokens", HEAD_DIM]),
        builder.input("key", ir.DataType.FLOAT, ["batch", KV_HEADS, "cross_tokens", HEAD_DIM]),
        builder.input("value", ir.DataType.FLOAT, ["batch", KV_HEADS, "cross_tokens", HEAD_DIM]),
        builder.input("cross_ranges", ir.DataType.INT32, ["batch", "tokens", 2]),
        builder.input("gate", ir.DataType.FLOAT, [1]),
    ]
    output = builder.call(gated_cross_attention(24), *inputs, **PLUGIN_ATTRIBUTES)
    output.dtype = ir.DataType.FLOAT
    output.shape = ir.Shape(["batch", HEADS, "tokens", HEAD_DIM])
    builder.add_output(output, "output")
    return ir.to_proto(ir.Model(graph, ir_version=11, functions=list(builder.functions.values())))


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(["output"], inputs)[0]


def random_inputs(cross_ranges: list[list[tuple[int, int]]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ranges = np.array(cross_ranges, np.int32)
    batch, tokens = ranges.shape[:2]
    kv_shape = (batch, KV_HEADS, TOKENS, HEAD_DIM)
    return {
        "query": rng.standard_normal((batch, HEADS, tokens, HEAD_DIM), dtype=np.float32),
        "key": rng.standard_normal(kv_shape, dtype=np.float32),
        "value": rng.standard_normal(kv_shape, dtype=np.float32),
        "cross_ranges": ranges,
        "gate": np.array([-0.7], np.float32),
    }


@pytest.mark.parametrize(
    "cross_ranges",
    [
        [[(0, TOKENS)]],
        [[(0, 0), (0, 5), (5, 11), (0, 11)]],
        [[(7, 8), (19, 20)], [(0, 0), (3, 3)], [(0, 20), (10, 4)]],
    ],
    ids=["everything", "prompt", "ragged batch"],
)
def test_equals_definition(model: onnx.ModelProto, cross_ranges: list[list[tuple[int, int]]]) -> None:
    inputs = random_inputs(cross_ranges)
    output = run(model, inputs)
    assert np.isfinite(output).all()
    np.testing.assert_allclose(output, expected_output(**inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_empty_ranges_give_exact_zero_whatever_the_cache_holds(model: onnx.ModelProto, poison: float) -> None:
    inputs = random_inputs([[(0, 0), (4, 4)], [(9, 2), (0, 0)]])
    inputs["key"][:] = poison
    inputs["value"][:] = poison
    assert (run(model, inputs) == 0).all()


def test_reads_nothing_beyond_the_block_of_the_largest_end(model: onnx.ModelProto) -> None:
    inputs = random_inputs([[(0, 3), (3, 9)]])
    output = run(model, inputs)
    inputs["key"][:, :, KEY_BLOCK:] = np.nan
    inputs["value"][:, :, KEY_BLOCK:] = np.nan
    assert np.array_equal(run(model, inputs), output)


@pytest.mark.parametrize("tokens", [1, 3])
def test_bits_do_not_depend_on_how_far_neighbours_read(model: onnx.ModelProto, tokens: int) -> None:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for end in range(1, TOKENS + 1):
        inputs = random_inputs([[(0, end)] * tokens, [(0, TOKENS)] * tokens], seed=end)
        alone = {name: values[:1] for name, values in inputs.items()}
        (together,) = session.run(["output"], inputs)
        assert np.isfinite(together).all()
        assert np.array_equal(session.run(["output"], alone)[0][0], together[0]), end


def test_checker_and_plugin_attributes(model: onnx.ModelProto) -> None:
    """TensorRT's parser looks for these attributes on a node of the main graph, and for the op's own name."""
    onnx.checker.check_model(model, full_check=True)
    (node,) = [node for node in model.graph.node if node.op_type == "GatedCrossAttention"]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes == {"plugin_namespace": b"nvlm_v1", "plugin_version": b"1", "aot": 1}
    (function,) = model.functions
    assert (function.domain, function.name) == (node.domain, node.op_type) == ("nvlm", "GatedCrossAttention")
    assert set(function.attribute) == set(attributes)
