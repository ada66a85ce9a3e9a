"""Tests what TensorRT-RTX's parser makes of the special nodes of the product's graphs, by count and by kind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from layer_reading import trt
from parsed_network import Attention, CacheUpdate, ParsedNetwork
from tiny_networks import FORMS, QUANTISED, Variant, parsed_stage, reference, stages, variants, write_stage

from nvlm_trt.backends.plans.graphs import DTYPES

Q_AND_DQ = ("QuantizeLinear", "DequantizeLinear")
HEAD = "language_model.lm_head"
# The patch embedding has 147 inputs here, not whole blocks: 8 bits.
STORED = {"int8": {"INT8"}, "fp8": {"FP8"}, "int8-weight-only": {"INT8"}, "int4-weight-only": {"INT4", "INT8"}}


def parse(variant: Variant, stage: str, directory: Path) -> tuple[list[onnx.NodeProto], ParsedNetwork]:
    """Return the nodes of the main graph, and what the parser made of the whole."""
    path = write_stage(variant, stage, directory)
    return list(onnx.load(path, load_external_data=False).graph.node), ParsedNetwork.parse(path)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    values = [onnx.helper.get_attribute_value(found) for found in node.attribute if found.name == name]
    return values[0] if values else None


@pytest.mark.parametrize("variant", variants(DTYPES, ["unquantised"]), ids=str)
def test_decoder(variant: Variant, tmp_path: Path) -> None:
    nodes, parsed = parse(variant, "decoder", tmp_path)
    types = Counter(node.op_type for node in nodes)
    config = reference(variant.architecture).config
    layers, blocks = config.llm.num_layers, len(config.cross_layers)
    causal = [node for node in nodes if attribute(node, "causal_kind") == b"lower_right"]
    assert len(causal) == layers

    # A function's inner Attention has no attribute that lets a build do without a fused kernel.
    masked = Attention("NONE", False, "BOOL", decomposable=variant.cross == "masked")
    special = "TRT_Attention" if variant.cross == "masked" else "GatedCrossAttention"
    assert types[special] == blocks + (layers if special == "TRT_Attention" else 0)
    expected = Counter({Attention("LOWER_RIGHT", True, None, decomposable=True): layers, masked: blocks})
    assert parsed.attentions() == +expected

    pairs = [(f"past_{kind}.{i}", f"present_{kind}.{i}") for i in range(layers) for kind in ("key", "value")]
    assert types["TRT_KVCacheUpdate"] == len(pairs)
    updates = parsed.cache_updates()
    assert len(updates) == len(pairs)
    assert set(updates) == {CacheUpdate(*pair) for pair in pairs}
    assert {layer.api.cache_mode for layer in parsed.of_kind("KV_CACHE_UPDATE")} == {trt.KVCacheMode.LINEAR}
    given = {tensor.name for tensor in parsed.inputs}
    assert {update.cache for update in updates} <= given
    for update in updates:  # nothing else reads a cache, whose memory the update changes
        assert [layer.kind for layer in parsed.readers(update.cache)] == ["KV_CACHE_UPDATE"]
        assert [layer.kind for layer in parsed.readers(update.updated)] == ["ATTENTION_INPUT"]

    rotations = parsed.of_kind("ROTARY_EMBEDDING")
    assert len(rotations) == types["RotaryEmbedding"] == 2 * layers
    assert not any(layer.api.interleaved for layer in rotations)
    assert parsed.kinds()["QUANTIZE"] == parsed.kinds()["DEQUANTIZE"] == 0


@pytest.mark.parametrize("architecture", "DXH")
def test_vision_encoder(architecture: str, tmp_path: Path) -> None:
    nodes, parsed = parse(Variant(architecture, dtype="bf16"), "vision_encoder", tmp_path)
    attentions = [node for node in nodes if node.op_type == "TRT_Attention"]
    assert parsed.attentions() == {Attention("NONE", False, None, decomposable=True): len(attentions)}
    activations = Counter(trt.IActivationLayer.type.fget(layer.api).name for layer in parsed.of_kind("ACTIVATION"))
    assert activations == {"GELU_ERF": sum(node.op_type == "Gelu" for node in nodes)}


@pytest.mark.parametrize("variant", variants(["bf16"], QUANTISED), ids=str)
def test_quantisation(variant: Variant, tmp_path: Path) -> None:
    for stage in stages(variant.architecture):
        nodes, parsed = parse(variant, stage, tmp_path)
        types, kinds = Counter(node.op_type for node in nodes), parsed.kinds()
        assert (kinds["QUANTIZE"], kinds["DEQUANTIZE"]) == tuple(types[name] for name in Q_AND_DQ)
        assert kinds["DEQUANTIZE"] > 0
        weights = [layer.inputs[1] for layer in parsed.of_kind("MATRIX_MULTIPLY")]
        made = [parsed.maker(tensor) for tensor in weights if tensor is not None]
        assert {layer.kind for layer in made} == {"DEQUANTIZE"}
        # only constant weights may stay in their few bits until they are multiplied
        stored = [parsed.maker(layer.inputs[0]) for layer in made if layer.inputs[0]]
        assert {layer.kind for layer in stored} == {"CONSTANT"}
        assert {layer.output.kind for layer in stored} <= STORED[variant.weight_format]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_shapes_that_depend_on_values(form: Variant, tmp_path: Path) -> None:
    """The function reads keys up to the longest range, so a slice's size is a value. The masked form has none, and a
    CUDA graph can record it."""
    parsed = parsed_stage(form, "decoder", tmp_path)
    depends = {tensor.name for tensor in parsed.inputs}
    sizes = []
    for layer in parsed.layers:
        inputs = [tensor.name for tensor in layer.inputs if tensor is not None]
        if layer.kind == "SHAPE":
            continue  # of a tensor, whatever its values
        if depends.intersection(inputs):
            depends.add(layer.output.name)
        if layer.kind in ("SLICE", "SHUFFLE", "FILL"):
            sizes += [name for name in inputs[layer.kind != "FILL" :] if name in depends]
    assert bool(sizes) == (form.cross == "function" and form.architecture != "D")


@pytest.mark.parametrize(
    ("weight_format", "kind"), [("unquantised", "BF16"), ("fp8", "FP8"), ("int8", "INT8"), ("int4-weight-only", "INT4")]
)
def test_constants_keep_their_values(weight_format: str, kind: str, tmp_path: Path) -> None:
    """Numbers of types that NumPy lacks are read through the bindings' pointer."""
    path = write_stage(Variant("D", dtype="bf16", weight_format=weight_format), "decoder", tmp_path)
    parsed = ParsedNetwork.parse(path)
    graph = onnx.load(path).graph
    (head,) = (tensor for tensor in graph.initializer if tensor.name.startswith(HEAD) and tensor.dims == [192, 512])
    stored = onnx.numpy_helper.to_array(head).astype(float)
    found = [parsed.constants[layer.output.name] for layer in parsed.of_kind("CONSTANT") if layer.output.kind == kind]
    assert any(values.shape == stored.shape and (values.astype(float) == stored).all() for values in found)
