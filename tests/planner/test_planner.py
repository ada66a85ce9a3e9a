"""Tests the planner against engine files, the backends' caches, and PyTorch's count of FLOPs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.plans.graphs import write_graphs
from nvlm_trt.backends.plans.profiles import profiles_of
from nvlm_trt.backends.table import find_backend
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.builders.quantization.calibration import LinearInput
from nvlm_trt.builders.quantization.formats import WeightForm, quantised
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.precision import floating_type
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import IMAGE_CACHE, EnginePlan, plan_engine, stage_weights
from nvlm_trt.planner.roofline import Roofline, Work
from nvlm_trt.progress import no_progress
from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.runtime.pipeline import RuntimeOptions

Directory = Callable[[str], Path]
NAMES = ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"]
LIMITS = EngineLimits(max_slots=3, max_seq_len=512, max_image_tokens=408, max_tiles=6)
TENSORRT = find_backend("tensorrt")
TAG_LENGTH = 1  # of a random checkpoint's tokenizer


def design_of(
    name: str, precision: str, backend: str, limits: EngineLimits = LIMITS, tag_length: int = TAG_LENGTH
) -> EngineDesign:
    spec = find_backend(backend)
    return EngineDesign(PRESETS[name], limits, spec.precisions.parse(precision), spec, tag_length)


def plan_of(name: str, precision: str, backend: str, limits: EngineLimits = LIMITS) -> EnginePlan:
    return plan_engine(design_of(name, precision, backend, limits))


def stored_bytes(graph: Path) -> int:
    total = 0
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        nbytes = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total += nbytes // 2 if tensor.data_type == onnx.TensorProto.INT4 else nbytes
    return total


def assert_just_above(actual: int, planned: int) -> None:
    """Asserts nearly equal bytes: graphs hold some constants that the planner does not count."""
    assert planned <= actual < 1.002 * planned


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_files(engine: Directory, name: str) -> None:
    opened = Engine.open(engine(name))
    stages = stage_weights(design_of(name, "fp32", "onnxruntime", opened.limits))
    assert stages.keys() == {path.stem for path in opened.path.glob("*.onnx")}
    for stage, weights in stages.items():
        assert_just_above(stored_bytes(opened.path / f"{stage}.onnx"), weights.nbytes)


@pytest.mark.parametrize("precision", ["int8-weight-only", "int4-weight-only,vision_encoder=int8-weight-only"])
def test_weights_in_blocks_are_those_of_the_files(checkpoint: Directory, tmp_path: Path, precision: str) -> None:
    built = build_engine(checkpoint("nvlm-h-tiny"), tmp_path / "engine", smoke_test=False, precision=precision)
    for stage, weights in stage_weights(design_of("nvlm-h-tiny", precision, "onnxruntime", built.limits)).items():
        assert_just_above(stored_bytes(built.path / f"{stage}.onnx"), weights.nbytes)


class Everywhere(SimpleNamespace):
    """Replaces a calibration: the inputs of every linear layer are at most 6."""

    def of(self, name: str, inputs: int) -> LinearInput:
        return LinearInput(abs_max=6.0, clip=6.0, channels=[6.0] * inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("tensorrt", "bf16"),
        ("tensorrt", "int8,lm_head=int8"),
        ("tensorrt", "fp16,decoder=fp8,projector=fp8"),
        ("tensorrt-rtx", "int8-weight-only"),
        ("tensorrt-rtx", "int4-weight-only,vision_encoder=int4-weight-only"),
    ],
)
def test_weights_are_those_of_the_graphs_for_plans(
    checkpoint: Directory, tmp_path: Path, name: str, backend: str, precision: str
) -> None:
    precisions = find_backend(backend).precisions.parse(precision)
    source = EngineSource(checkpoint(name), {"max_slots": 3, "max_seq_len": 512})
    with Checkpoint.open(checkpoint(name)) as opened:
        recipe = quantised(opened, precisions, Everywhere(samples={}), alpha=0, form=WeightForm.TENSORRT)
    graphs = write_graphs(source, recipe, floating_type(precisions), tmp_path, no_progress)
    stages = plan_of(name, precision, backend, source.limits).stages
    assert stages.keys() == graphs.keys()
    for stage, graph in graphs.items():
        assert_just_above(stored_bytes(graph), stages[stage].weights)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_checkpoint(checkpoint: Directory, name: str) -> None:
    with safe_open(checkpoint(name) / "model.safetensors", "np") as file:
        elements = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    plan = plan_of(name, "fp32", "onnxruntime")
    assert sum(plan.parameters.values()) == elements
    assert plan.checkpoint == 2 * elements  # in bfloat16


def test_parameters_are_those_of_published_models() -> None:
    """By their model cards: NVLM-D-72B 79.4 billion, 7 of InternViT's 32 heads being dummies; Qwen2-0.5B 0.49."""
    vision = PRESETS["nvlm-d-72b"].vision
    dummies = vision.num_layers * 7 * vision.head_dim * (4 * vision.hidden_size)
    assert sum(plan_of("nvlm-d-72b", "bf16", "tensorrt").parameters.values()) + dummies == pytest.approx(79.4e9, 1e-3)
    small = plan_of("nvlm-d-small", "bf16", "tensorrt").parameters
    assert small["embedding"] + small["decoder"] == pytest.approx(0.494e9, 1e-3)


# --- caches and activations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_caches_are_what_the_backend_for_onnx_runtime_allocates(engine: Directory, name: str) -> None:
    opened = Engine.open(engine(name))
    plan = plan_of(name, "fp32", "onnxruntime", opened.limits)
    with open_backend(opened, ["decoder"]) as backend:
        caches = backend._cache.items()  # type: ignore[attr-defined]
        assert plan.self_cache == sum(cache.nbytes for key, cache in caches if key.startswith("past_"))
        assert plan.cross_cache == sum(cache.nbytes for key, cache in caches if key.startswith("cross_"))
        assert plan.stages["decoder"].caches == sum(cache.nbytes for _, cache in caches)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("fp32", 4), ("fp8", 2)])
def test_caches_are_what_the_profiles_for_tensorrt_take(name: str, precision: str, size: int) -> None:
    """The backend's caches are the largest shapes of the decoding profile (tests/builders/test_tensorrt_engine.py)."""
    largest = {key: shapes[-1] for key, shapes in profiles_of(PRESETS[name], LIMITS)["decoder"][1].items()}
    plan = plan_of(name, precision, "tensorrt")
    for kind, planned in (("past_", plan.self_cache), ("cross_", plan.cross_cache)):
        names = [key for key in largest if key.startswith(kind) and key != "cross_ranges"]
        assert planned == size * sum(math.prod(largest[key]) for key in names)


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_near_what_the_graph_holds_at_once(checkpoint: Directory, tmp_path: Path, name: str) -> None:
    """A runtime without fusion holds each tensor of a graph from the node that makes it to its last reader."""
    source = EngineSource(checkpoint(name), {"max_slots": 3, "max_seq_len": 512})
    with Checkpoint.open(checkpoint(name)) as opened:
        recipe = quantised(opened, TENSORRT.precisions.parse("fp32"), None, 0, form=WeightForm.TENSORRT)
    graphs = write_graphs(source, recipe, "fp32", tmp_path, no_progress)
    stages = plan_of(name, "fp32", "tensorrt", source.limits).stages
    for stage, profiles in profiles_of(source.config, source.limits).items():
        held = held_at_once(graphs[stage], {key: shapes[-1] for key, shapes in profiles[0].items()})
        assert 0.7 * held < stages[stage].activations < 1.3 * held, stage


def held_at_once(path: Path, shapes: dict[str, list[int]]) -> int:
    """Runs a graph with ONNX Runtime. Returns the peak bytes of the tensors between nodes, caches not counted."""
    model = onnx.load(path)
    nodes = model.graph.node
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    names = [name for node in nodes for name in node.output if not name.startswith("present_")]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {key: np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(types[key])) for key, shape in shapes.items()}
    sizes = {name: array.nbytes for name, array in zip(names, session.run(names, feeds), strict=True)}
    last = {name: index for index, node in enumerate(nodes) for name in node.input}
    held = most = 0
    for index, node in enumerate(nodes):
        held += sum(sizes.get(name, 0) for name in node.output)
        most = max(most, held)
        held -= sum(sizes.get(name, 0) for name in {*node.input} if last[name] == index)
    return most


# --- roofline ----------------------------------------------------------------------------------------------------


def counted(run: Callable[[], object]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    """PyTorch also multiplies by the zeros of a mask, and makes logits of every token: both are subtracted."""
    config = dataclasses.replace(PRESETS[name], image_token_id=259)
    llm = config.llm
    model = ReferenceModel(config).eval()
    roofline = Roofline(dataclasses.replace(design_of(name, "fp32", "onnxruntime"), config=config))
    tiles, text = 3, 11
    in_llm = {"D": 3, "X": 0, "H": 1}[config.architecture]
    work = roofline.prefill(text, tiles)

    edge = config.vision.image_size
    pixels = torch.zeros(tiles, 3, edge, edge)
    assert work["vision_encoder"].flops == counted(lambda: model.encode(pixels))

    tokens = text + in_llm * config.tokens_per_tile
    input_ids = torch.zeros(1, tokens, dtype=torch.int64)
    input_ids[0, : tokens - text] = config.image_token_id
    images = torch.zeros(tokens - text, llm.hidden_size)
    cross: list[object] = [None, None]
    if config.cross_layers:
        cross_tiles = tiles - in_llm
        tags = torch.zeros(cross_tiles, TAG_LENGTH, dtype=torch.int64) if config.architecture == "H" else None
        image_tokens = torch.zeros(cross_tiles, config.tokens_per_tile, llm.hidden_size)
        assert work["cross_kv"].flops == counted(lambda: model.cross_kv(image_tokens, tags))
        cross_kv = model.cross_kv(image_tokens, tags)
        cross_tokens = cross_kv[0][0].shape[1]
        cross = [cross_kv, torch.tensor([0, cross_tokens]).expand(1, tokens, 2)]
    else:
        assert "cross_kv" not in work
        cross_tokens = 0
    masked = 2 * tokens * (tokens - 1) * llm.num_heads * llm.head_dim * llm.num_layers
    logits = 2 * (tokens - 1) * llm.hidden_size * llm.vocab_size
    prefill = counted(lambda: model(input_ids, images, *cross))
    assert work["decoder"].flops == prefill - masked - logits

    _, cache = model(input_ids, images, *cross)
    last = cross[1][:, -1:] if config.cross_layers else None  # type: ignore[index]
    step = counted(lambda: model(torch.zeros(1, 1, dtype=torch.int64), None, cross[0], last, cache))
    assert roofline.decode(1, tokens + 1, cross_tokens).flops == step
    assert roofline.decode(3, tokens + 1, cross_tokens).flops == 3 * step


def test_bytes_of_a_decoding_step_are_the_weights_and_the_caches_in_use() -> None:
    """With full caches, a step reads all that the decoder holds, except for embeddings that are looked up."""
    plan = plan_of("nvlm-x-tiny", "int8", "tensorrt")
    step = Roofline(design_of("nvlm-x-tiny", "int8", "tensorrt")).decode(LIMITS.max_slots, LIMITS.max_seq_len, 416)
    decoder = plan.stages["decoder"]
    assert step.nbytes == decoder.weights + decoder.caches - plan.weights["embedding"]


def test_tensorrt_rtx_reads_the_whole_cross_attention_cache() -> None:
    """Its masked attention computes over the capacity, so what a request uses does not matter."""
    rtx = design_of("nvlm-x-tiny", "bf16", "tensorrt-rtx")
    roofline = Roofline(rtx)
    full = Roofline(design_of("nvlm-x-tiny", "bf16", "tensorrt")).decode(1, 9, 416)
    assert [roofline.decode(1, 9, cross_tokens) for cross_tokens in (0, 16, 416)] == [full] * 3
    few = Roofline(rtx.with_limits(max_image_tokens=16))
    assert few.decode(1, 9, 16).nbytes < roofline.decode(1, 9, 16).nbytes
    assert few.prefill(9, 0)["decoder"].flops < roofline.prefill(9, 0)["decoder"].flops


def test_a_prompt_reads_the_weights_once_for_each_chunk() -> None:
    roofline = Roofline(design_of("nvlm-d-72b", "bf16", "tensorrt"))
    one, two = (roofline.prefill(tokens, 0)["decoder"].nbytes for tokens in (1024, 1025))
    assert 1.9 < two / one < 2.1
    assert TENSORRT.prefill_chunk == 1024
    assert RuntimeOptions().image_cache_bytes == IMAGE_CACHE


def test_time_is_bound_by_the_slower_of_the_two() -> None:
    work = Work(flops=2e12, nbytes=3e9)
    assert work.seconds(bandwidth=1e9, flop_rate=1e12) == 3
    assert work.seconds(bandwidth=1e10, flop_rate=1e12) == 2


# --- peaks -------------------------------------------------------------------------------------------------------


def test_peaks() -> None:
    plain, small = (plan_of("nvlm-d-72b", precision, "tensorrt") for precision in ("bf16", "int8"))
    assert plain.peak_running == plain.peak_building + IMAGE_CACHE
    assert small.peak_running < 0.6 * plain.peak_running
    assert small.peak_building == plain.peak_building  # the gate's
    assert small.host_building == 4 * sum(small.parameters.values())  # the calibration's
    assert plain.host_building == 2 * plain.stages["decoder"].weights


def test_fp8_is_small_on_disk_only_for_onnx_runtime() -> None:
    plan, plain = (plan_of("nvlm-d-72b", precision, "onnxruntime") for precision in ("fp8", "fp32"))
    assert sum(plan.weights.values()) < 0.5 * sum(plain.weights.values())
    assert plan.stages["decoder"].weights == plain.stages["decoder"].weights
