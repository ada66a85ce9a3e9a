"""Tests the graphs that stand for plans on a machine without a GPU: widened to float32, run by ONNX Runtime.

The oracle is the PyTorch reference with the numbers that an engine stores, and with rounded inputs where activations
are quantised. NVLM-X is left out there: its graphs multiply by tanh(gate) before the rounded input of o_proj."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from backend_steps import run_steps, three_prompts
from decoder_runner import LIMITS as RUNNER_LIMITS
from decoder_runner import DecoderRunner, random_prompt
from onnx import helper
from rtx_machine import LIMITS, build_for_cpu
from stages import IMAGE_TOKEN, ReferenceWeights, random_reference, tiny_config

from nvlm_trt.backends.onnxruntime.session import InferenceSession, open_session, session_options
from nvlm_trt.backends.plans.graphs import DTYPES
from nvlm_trt.backends.tensorrt_rtx import SPEC
from nvlm_trt.backends.tensorrt_rtx.on_cpu import widen, widen_file
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.builders.graphs.common import Unquantised, WeightFormat
from nvlm_trt.builders.graphs.cross_attention import MaskedAttention
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import TensorRtAttention
from nvlm_trt.builders.graphs.vision_attention import tensorrt_vision_attention
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization import fp8, int8
from nvlm_trt.builders.quantization.blocked_weights import BlockedWeights, quantize_signed
from nvlm_trt.builders.quantization.calibration import LinearInput
from nvlm_trt.builders.quantization.formats import ByComponent
from nvlm_trt.builders.quantization.fp8 import Fp8
from nvlm_trt.builders.quantization.int8 import Int8
from nvlm_trt.builders.quantization.rows import rounded
from nvlm_trt.model.precision import BLOCK, FLOATING, WEIGHT_ONLY_BITS, component_of, floating_type
from nvlm_trt.progress import no_progress
from nvlm_trt.reference import decoder
from nvlm_trt.reference.model import ReferenceModel

Directory = Callable[[str], Path]
MODELS = {name: random_reference(tiny_config(name)) for name in ("D", "X", "H")}
# a number a hair's breadth from a half is rounded either way, by a whole step, which grows from layer to layer
SHALLOW = random_reference(tiny_config("D", llm={"num_layers": 1}))
TAGS = np.random.default_rng(3).standard_normal((6, 5, 192), dtype=np.float32)
LARGEST_INPUT = 6.0
HALF_TYPES = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Everywhere:
    """Replaces a calibration: the inputs of every linear layer are at most LARGEST_INPUT."""

    def of(self, name: str, inputs: int) -> LinearInput:
        return LinearInput(abs_max=LARGEST_INPUT, clip=LARGEST_INPUT, channels=[LARGEST_INPUT] * inputs)


FORMATS: dict[str, WeightFormat] = {
    **dict.fromkeys(FLOATING, Unquantised()),
    "int8": Int8(Everywhere()),
    "fp8": Fp8(Everywhere(), fold_weights=False),
    "int8-weight-only": BlockedWeights(8),
    "int4-weight-only": BlockedWeights(4),
}
PRECISIONS = [name for name in SPEC.precisions.names if name != "fp32"]
STATIC = ("int8", "fp8")  # quantise activations, too


def write(model: ReferenceModel, precision: str, folder: Path) -> dict[str, Path]:
    """Writes the graphs of plans, with all weights, as a build does. Returns stage -> file."""
    precisions = SPEC.precisions.parse(precision)
    dtype = DTYPES[floating_type(precisions)]
    weight_format = ByComponent({component: FORMATS[name] for component, name in precisions.items()})
    config, weights = model.config, ReferenceWeights(model)
    graphs = {"vision_encoder": vision_encoder_graph(config, weights, weight_format, tensorrt_vision_attention, dtype)}
    if config.cross_layers:
        tags = TAGS if config.architecture == "H" else None
        graphs["cross_kv"] = cross_kv_graph(config, weights, tags, weight_format, dtype)
    graphs["decoder"] = decoder_graph(
        config, weights, RUNNER_LIMITS, weight_format, TensorRtAttention, MaskedAttention, dtype=dtype
    )
    for stage, graph in graphs.items():
        save_model(graph, folder / f"{stage}.onnx", no_progress)
    return {stage: folder / f"{stage}.onnx" for stage in graphs}


def widened(model: ReferenceModel, precision: str, folder: Path, stage: str) -> InferenceSession:
    path = write(model, precision, folder)[stage]
    widen_file(path)
    return open_session(path, session_options(threads=1))


# --- the oracle ------------------------------------------------------------------------------------------------------


def as_stored(precision: str, weight: torch.Tensor) -> torch.Tensor:
    """Returns the numbers that a weight [outputs, inputs] of a linear layer has after it was stored."""
    rows, dtype = weight.numpy(), DTYPES["bf16"]
    if precision in FLOATING:
        return weight.to(HALF[precision]).float()
    if precision == "fp8":
        scales = rounded(fp8.row_scales(rows), dtype)
        return torch.from_numpy(fp8.quantize(rows, scales).astype(np.float32) * scales[:, None])
    if precision == "int8":
        values, scales = int8.quantize_rows(rows, dtype)
        return torch.from_numpy(values.astype(np.float32) * scales[:, None])
    bits = WEIGHT_ONLY_BITS[precision]
    values, scales = quantize_signed(rows, bits, dtype)
    return torch.from_numpy(values.astype(np.float32) * np.repeat(scales, BLOCK[bits], axis=1))


def quantised_input(precision: str, _: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Rounds the input of a linear layer as QuantizeLinear and DequantizeLinear do."""
    (x,) = inputs
    if precision == "int8":
        scale = to_bf16(torch.tensor(LARGEST_INPUT / 127))
        return (torch.clamp(torch.round(x / scale), -128, 127) * scale,)
    scale = to_bf16(torch.tensor(LARGEST_INPUT / 448))
    return (torch.clamp(x / scale, -448, 448).to(torch.float8_e4m3fn).float() * scale,)


def to_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).float()


def oracle(model: ReferenceModel, precision: str) -> ReferenceModel:
    """Returns the reference with the numbers that an engine of `precision` stores, in float32."""
    made, precisions = copy.deepcopy(model), SPEC.precisions.parse(precision)
    half = HALF[floating_type(precisions)]
    for parameter in made.parameters():
        parameter.copy_(parameter.to(half).float())
    for name, layer in made.named_modules():
        if isinstance(layer, torch.nn.Linear):
            here = precisions[component_of(f"{name}.weight")]
            layer.weight.copy_(as_stored(here, model.get_submodule(name).weight))
            if here in STATIC:
                layer.register_forward_pre_hook(partial(quantised_input, here))
    return made


@pytest.fixture(autouse=True)
def stored_rotation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds the reference's tables of cosines and sines as the graphs store them."""
    half = HALF["fp16" if "fp16" in request.node.name else "bf16"]
    exact = decoder.rotary_embedding
    monkeypatch.setattr(
        decoder, "rotary_embedding", lambda *given: tuple(table.to(half).float() for table in exact(*given))
    )


def assert_near(actual: np.ndarray, expected: torch.Tensor | np.ndarray, tolerance: float) -> None:
    """Asserts that the norm of the error is at most `tolerance` of the expected array's norm."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [(name, precision) for name in ("D", "X") for precision in PRECISIONS if name == "D" or precision not in STATIC],
)
def test_widened_decoder_equals_the_oracle(tmp_path: Path, architecture: str, precision: str) -> None:
    """The attention's scale, rounded in the graph, makes the difference of 6e-5 at most; of int8 and fp8, a number or
    two that are rounded the other way: 2e-3."""
    model = SHALLOW if precision in STATIC else MODELS[architecture]
    tolerance = 5e-3 if precision in STATIC else 1e-4
    runner = DecoderRunner(oracle(model, precision), TensorRtAttention, cross_attention=MaskedAttention)
    runner.session = widened(model, precision, tmp_path, "decoder")
    input_ids, ranges = random_prompt(1, 12)
    images = None
    if architecture == "D":
        input_ids[0, 3:7] = IMAGE_TOKEN
        images = np.random.default_rng(1).standard_normal((4, model.config.llm.hidden_size), dtype=np.float32)
    expected = runner.reference_logits(input_ids, ranges, images)
    logits = runner.step(input_ids[:, :11], [0], ranges[:, :11], images)
    assert_near(logits, expected[:, 10], tolerance)
    logits = runner.step(input_ids[:, 11:], [11], ranges[:, 11:])
    assert_near(logits, expected[:, 11], tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_widened_vision_encoder_equals_the_oracle(tmp_path: Path, precision: str) -> None:
    model = MODELS["D"]
    edge = model.config.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((2, 3, edge, edge), dtype=np.float32)
    (tokens,) = widened(model, precision, tmp_path, "vision_encoder").run(None, {"pixel_values": pixels})
    assert_near(tokens, oracle(model, precision).encode(torch.from_numpy(pixels)), 1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_widened_cross_kv_equals_the_oracle(tmp_path: Path, precision: str) -> None:
    model = MODELS["X"]
    config = model.config
    shape = (2, config.tokens_per_tile, config.llm.hidden_size)
    image_tokens = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    outputs = widened(model, precision, tmp_path, "cross_kv").run(None, {"image_tokens": image_tokens})
    expected = oracle(model, precision).cross_kv(torch.from_numpy(image_tokens))
    for actual, tensor in zip(outputs, (tensor for pair in expected for tensor in pair), strict=True):
        assert_near(actual, tensor, 1e-6)


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", MODELS)
def test_only_stored_weights_are_in_half_precision(tmp_path: Path, architecture: str, precision: str) -> None:
    for path in write(MODELS[architecture], precision, tmp_path).values():
        data = path.with_name(f"{path.name}.data").read_bytes()
        widen_file(path)
        assert path.with_name(f"{path.name}.data").read_bytes() == data
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path))
        stored = {tensor.name for tensor in model.graph.initializer if tensor.data_type in HALF_TYPES}
        assert stored
        for node in model.graph.node:
            assert not stored & set(node.input) or node.op_type == "Cast", node.name
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
        values = (*inferred.input, *inferred.output, *inferred.value_info)
        assert len(values) > len(model.graph.input) + len(model.graph.output)
        assert [value.name for value in values if value.type.tensor_type.elem_type in HALF_TYPES] == []
        for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
            for attribute in node.attribute:
                assert attribute.t.data_type not in HALF_TYPES, node.name
                assert attribute.name != "to" or attribute.i not in HALF_TYPES, node.name


def test_widens_casts_and_constants_in_functions_and_branches() -> None:
    """The graphs of plans have none of these at present."""
    model = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["": 23, "own": 1]>
        g (float[n] x, bool c) => (bfloat16[n] y) {
            h = Cast <to = 16> (x)
            d = own.Double (h)
            y = If (c) <
                then_branch = a () => (bfloat16[n] p) { o = Cast <to = 16> (x)  p = Add (o, d) },
                else_branch = b () => (bfloat16[n] q) { q = Identity (d) }
            >
        }
        <domain: "own", opset_import: ["": 23]>
        Double (v) => (w) { w = Mul (v, t) }"""
    )
    two = helper.make_tensor("", onnx.TensorProto.BFLOAT16, [], [2.0])
    model.functions[0].node.insert(0, helper.make_node("Constant", [], ["t"], value=two))
    widen(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([1.001], np.float32)  # not a number of bfloat16
    for condition, factor in ((True, 3), (False, 2)):
        (y,) = session.run(None, {"x": x, "c": np.array(condition)})
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, factor * x, rtol=1e-6)


def test_an_engine_in_this_form_answers_as_the_engine_for_onnx_runtime(checkpoint: Directory, tmp_path: Path) -> None:
    """In fp32: the same numbers. Two of the three prompts have no image."""
    source = checkpoint("nvlm-h-tiny")
    portable = build_engine(source, tmp_path / "portable", LIMITS, precision="fp32", smoke_test=False)
    given = three_prompts(portable)
    expected = run_steps(portable, given)
    answers = run_steps(build_for_cpu(source, tmp_path / "fp32", "fp32"), given)
    assert answers.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(answers[name], values, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.9999), ("int4-weight-only", 0.9)])
def test_an_engine_in_another_precision_answers_nearly_so(
    checkpoint: Directory, tmp_path: Path, precision: str, least: float
) -> None:
    source = checkpoint("nvlm-h-tiny")
    engine = build_for_cpu(source, tmp_path / "engine", precision)
    given = three_prompts(engine)
    answers = run_steps(engine, given)
    expected = run_steps(build_for_cpu(source, tmp_path / "fp32", "fp32"), given)
    for name, values in expected.items():
        cosine = np.vdot(answers[name], values) / np.linalg.norm(answers[name]) / np.linalg.norm(values)
        assert cosine >= least, name
