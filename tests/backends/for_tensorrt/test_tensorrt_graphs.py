"""Tests the graphs for TensorRT: validity, types, linter, and their results in ONNX Runtime against the reference."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from decoder_runner import CROSS_TOKENS, LIMITS, DecoderRunner, random_prompt
from stages import IMAGE_TOKEN, ReferenceWeights, assert_close, random_reference, session, tiny_config

from nvlm_trt.backends.plans.graphs import DTYPES
from nvlm_trt.backends.plans.linter import lint
from nvlm_trt.backends.plans.profiles import profiles_of
from nvlm_trt.builders.graphs.common import WeightFormat
from nvlm_trt.builders.graphs.cross_attention import CrossAttention, GatedFunction, MaskedAttention
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import GroupQueryAttention, TensorRtAttention
from nvlm_trt.builders.graphs.tensorrt_functions import MASKED_DOMAIN
from nvlm_trt.builders.graphs.vision_attention import tensorrt_vision_attention
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.quantization.blocked_weights import BlockedWeights
from nvlm_trt.builders.quantization.calibration import LinearInput
from nvlm_trt.builders.quantization.fp8 import Fp8
from nvlm_trt.builders.quantization.int8 import Int8
from nvlm_trt.reference.model import ReferenceModel

MODELS = {name: random_reference(tiny_config(name)) for name in ("D", "X", "H")}
CROSS: list[type[CrossAttention]] = [GatedFunction, MaskedAttention]
MODELS_AND_CROSS = [("D", GatedFunction), *itertools.product(("X", "H"), CROSS)]
TAGS = np.random.default_rng(3).standard_normal((6, 5, 192), dtype=np.float32)


class Everywhere:
    """Replaces a calibration: the inputs of every linear layer are at most 6."""

    def of(self, name: str, inputs: int) -> LinearInput:
        return LinearInput(abs_max=6.0, clip=6.0, channels=[6.0] * inputs)


FORMATS = {
    "unquantised": None,
    "int8": Int8(Everywhere()),
    "fp8": Fp8(Everywhere(), fold_weights=False),
    "int8-weight-only": BlockedWeights(8),
    "int4-weight-only": BlockedWeights(4),
}


def graphs(
    model: ReferenceModel,
    weight_format: WeightFormat | None,
    dtype: ir.DataType,
    cross_attention: type[CrossAttention] = GatedFunction,
) -> list[ir.Model]:
    config, weights = model.config, ReferenceWeights(model)
    built = [vision_encoder_graph(config, weights, weight_format, tensorrt_vision_attention, dtype)]
    if config.cross_layers:
        tags = TAGS if config.architecture == "H" else None
        built.append(cross_kv_graph(config, weights, tags, weight_format, dtype))
    decoder = decoder_graph(
        config, weights, LIMITS, weight_format, TensorRtAttention, cross_attention=cross_attention, dtype=dtype
    )
    built.append(decoder)
    assert weights.remaining == set()
    return built


@pytest.mark.parametrize(("architecture", "cross_attention"), MODELS_AND_CROSS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_is_valid_strongly_typed_and_passes_the_linter(
    architecture: str, dtype: str, weight_format: str, cross_attention: type[CrossAttention]
) -> None:
    model, onnx_type = MODELS[architecture], DTYPES[dtype]
    profiles = profiles_of(model.config, LIMITS)
    for graph in graphs(model, FORMATS[weight_format], onnx_type, cross_attention):
        proto = ir.to_proto(graph)
        onnx.checker.check_model(proto, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
        assert lint(proto) == []
        without_plugins = lint(proto, plugins=False)
        assert bool(without_plugins) == any(node.op_type == "GatedCrossAttention" for node in proto.graph.node)
        assert all(" in " in str(finding) and "depends on the value" in str(finding) for finding in without_plugins)
        types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.input, *inferred.output)}
        integers = {"input_ids", "write_indices", "logit_index", "cross_ranges"}
        for name, kind in types.items():
            if name not in integers:
                assert kind == (onnx.TensorProto.FLOAT if name == "logits" else onnx_type), name
        for profile in profiles[inferred.name]:
            assert profile.keys() == {value.name for value in inferred.input}
            for value in inferred.input:
                for shape in profile[value.name]:
                    dimensions = value.type.tensor_type.shape.dim
                    assert len(shape) == len(dimensions)
                    fixed = zip(shape, dimensions, strict=True)
                    assert all(d.dim_param or d.dim_value == size for size, d in fixed)


@pytest.mark.parametrize("architecture", ["X", "H"])
def test_cross_kv_runs_at_every_shape_of_its_profile(architecture: str) -> None:
    """TensorRT refuses a profile that an operator's shapes contradict: NVLM-H has no tag for the thumbnail."""
    model = MODELS[architecture]
    cross_kv = session(graphs(model, None, DTYPES["fp32"])[1])
    (profile,) = profiles_of(model.config, LIMITS)["cross_kv"]
    fewest, _, most = profile["image_tokens"]
    assert (fewest[0], most[0]) == (1, 7 if architecture == "X" else 6)
    for shape in profile["image_tokens"]:
        for output in cross_kv.run(None, {"image_tokens": np.zeros(shape, np.float32)}):
            assert output.shape[1] == shape[0] * (shape[1] + (TAGS.shape[1] if architecture == "H" else 0))


def test_cache_is_input_and_output_of_every_update() -> None:
    decoder = ir.to_proto(graphs(MODELS["X"], None, DTYPES["bf16"])[-1]).graph
    updates = [node for node in decoder.node if node.op_type == "TRT_KVCacheUpdate"]
    pairs = {node.output[0]: node.input[0] for node in updates}
    layers = MODELS["X"].config.llm.num_layers
    assert pairs == {f"present_{kind}.{i}": f"past_{kind}.{i}" for i in range(layers) for kind in ("key", "value")}


@pytest.mark.parametrize(("architecture", "cross_attention"), MODELS_AND_CROSS)
def test_decoder_equals_reference_in_prefill_and_decoding(
    architecture: str, cross_attention: type[CrossAttention]
) -> None:
    """One sequence with an image (D: among its tokens), then three of different lengths decoded as one batch."""
    input_ids, ranges = random_prompt(3, 21)
    images = None
    if architecture == "D":
        input_ids[1, 3:11] = IMAGE_TOKEN
        images = np.random.default_rng(1).standard_normal((8, 192), dtype=np.float32)
    check_prefill_and_decoding(MODELS[architecture], input_ids, ranges, images, cross_attention)


@pytest.mark.parametrize("architecture", ["X", "H"])
@pytest.mark.parametrize("cross_tokens", [CROSS_TOKENS, LIMITS.max_image_tokens], ids=["part", "whole capacity"])
@pytest.mark.parametrize("cross_attention", CROSS)
def test_a_token_reads_exactly_its_range(
    architecture: str, cross_tokens: int, cross_attention: type[CrossAttention]
) -> None:
    """Ranges in any order within one call: empty, all, a tile's, with an odd start, of one token."""
    kinds = [[0, 0], [0, cross_tokens], [16, 32], [7, 7], [3, cross_tokens], [13, 20], [cross_tokens - 1, cross_tokens]]
    input_ids, _ = random_prompt(3, 21)
    ranges = np.array(kinds, np.int32)[np.random.default_rng(2).integers(0, len(kinds), (3, 21))]
    ranges[:, [9, 20, 1]] = kinds[2:5]  # what is decoded
    check_prefill_and_decoding(MODELS[architecture], input_ids, ranges, None, cross_attention, cross_tokens)


def check_prefill_and_decoding(
    model: ReferenceModel,
    input_ids: np.ndarray,  # [3, 21]
    ranges: np.ndarray,  # [3, 21, 2]
    images: np.ndarray | None,  # of sequence 1
    cross_attention: type[CrossAttention],
    cross_tokens: int = CROSS_TOKENS,
) -> None:
    """Compare three prompts, each alone, and their next tokens, as one batch. Junk fills what is unused of the
    cross-attention cache."""

    def make_runner(slots: int) -> DecoderRunner:
        made = DecoderRunner(model, TensorRtAttention, slots, cross_attention, cross_tokens)
        for values in made.cross.values():
            values[:, :, cross_tokens:] = 1e6
        return made

    runner = make_runner(slots=3)
    lengths = [9, 20, 1]
    expected = runner.reference_logits(input_ids, ranges, images)
    for slot, length in enumerate(lengths):
        alone = make_runner(slots=1)
        shown = images if slot == 1 else None
        logits = alone.step(input_ids[slot : slot + 1, :length], [0], ranges[slot : slot + 1, :length], shown)
        assert_close(logits, expected[slot : slot + 1, length - 1], 1e-4)
        for name in runner.cache:
            runner.cache[name][slot] = alone.cache[name][0]
    rows = np.arange(3)
    logits = runner.step(input_ids[rows, lengths][:, None], lengths, ranges[rows, lengths][:, None])
    assert_close(logits, expected[rows, lengths], 1e-4)


@pytest.mark.parametrize("cross_attention", CROSS)
def test_tokens_with_an_empty_range_pass_bit_for_bit(cross_attention: type[CrossAttention]) -> None:
    with_blocks, alone = MODELS["X"], random_reference(tiny_config("D"))
    alone.load_state_dict(with_blocks.state_dict() | alone.mlp1.state_dict(prefix="mlp1."), strict=False)
    input_ids, ranges = random_prompt(2, 10)
    ranges[0] = 0
    runners = [DecoderRunner(model, TensorRtAttention, 2, cross_attention) for model in (with_blocks, alone)]
    for step in (slice(0, 9), slice(9, 10)):
        logits = [runner.step(input_ids[:, step], [step.start] * 2, ranges[:, step]) for runner in runners]
        assert np.isfinite(logits[0]).all()
        assert np.array_equal(logits[0][0], logits[1][0])
    assert not np.array_equal(logits[0][1], logits[1][1])


def test_the_blocks_of_the_masked_form_share_one_mask() -> None:
    """A graph imports a domain only where it has a node of it: graphs of the other form stay the same bytes."""
    gated, masked = (ir.to_proto(graphs(MODELS["X"], None, DTYPES["bf16"], form)[-1]) for form in CROSS)
    blocks = [node for node in masked.graph.node if node.domain == MASKED_DOMAIN]
    assert len(blocks) == len(MODELS["X"].config.cross_layers)
    assert {node.op_type for node in blocks} == {"TRT_Attention"}
    assert len({node.input[3] for node in blocks}) == 1
    assert not any(node.op_type == "GatedCrossAttention" for node in masked.graph.node)
    domains = [{opset.domain for opset in model.opset_import} for model in (gated, masked)]
    assert domains[1] - domains[0] == {MASKED_DOMAIN}


def test_masked_form_in_skipped_blocks_equals_reference() -> None:
    model = MODELS["X"]
    runner = DecoderRunner(model, GroupQueryAttention, cross_attention=MaskedAttention)
    input_ids, ranges = random_prompt(1, 12)
    expected = runner.reference_logits(input_ids, ranges)
    assert_close(runner.step(input_ids[:, :3], [0], ranges[:, :3]), expected[:, 2], 1e-4)  # no range: all are skipped
    for position in range(3, 12):
        here = slice(position, position + 1)
        assert_close(runner.step(input_ids[:, here], [position], ranges[:, here]), expected[:, position], 1e-4)


@pytest.mark.parametrize("architecture", MODELS)
def test_vision_encoder_equals_reference(architecture: str) -> None:
    model = MODELS[architecture]
    encoder = session(graphs(model, None, DTYPES["fp32"])[0])
    edge = model.config.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((2, 3, edge, edge), dtype=np.float32)
    (image_tokens,) = encoder.run(None, {"pixel_values": pixels})
    assert_close(image_tokens, model.encode(torch.from_numpy(pixels)), 1e-4)


@pytest.mark.parametrize(
    ("weight_format", "tolerance"),
    [("int8", 0.12), ("fp8", 0.25), ("int8-weight-only", 0.02), ("int4-weight-only", 0.25)],
)
def test_quantised_decoder_is_near_the_reference(weight_format: str, tolerance: float) -> None:
    model = MODELS["X"]
    runner = DecoderRunner(model, TensorRtAttention)
    runner.session = quantised_session(model, weight_format)
    input_ids, ranges = random_prompt(1, 12)
    logits, expected = (
        runner.step(input_ids, [0], ranges),
        np.asarray(runner.reference_logits(input_ids, ranges)[:, -1]),
    )
    assert np.isfinite(logits).all()
    assert np.linalg.norm(logits - expected) < tolerance * np.linalg.norm(expected)


def quantised_session(model: ReferenceModel, weight_format: str) -> onnxruntime.InferenceSession:
    return session(graphs(model, FORMATS[weight_format], DTYPES["fp32"])[-1])


def test_unread_cache_does_not_show() -> None:
    """Nothing reads the cache beyond kv_lengths."""
    runner = DecoderRunner(MODELS["X"], TensorRtAttention)
    input_ids, ranges = random_prompt(1, 12)
    clean = runner.step(input_ids, [0], ranges)
    for values in runner.cache.values():
        values[:, :, 12:] = 1e6
    dirty = runner.step(input_ids[:, -1:], [11], ranges[:, -1:])
    assert LIMITS.max_image_tokens > CROSS_TOKENS  # the cross-attention cache has an unread rest too
    assert_close(dirty, clean, 1e-4)
