"""Tests what can go wrong with TensorRT-RTX: one line that says what to do, exit status 2, and nothing left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from command_line import Run, assert_one_line_error
from google.protobuf import text_format
from onnx import TensorProto, helper
from rtx_machine import build_in_fp32, tensorrt_rtx_bindings
from tritonclient.grpc import model_config_pb2

from nvlm_trt.backends.plans.network import is_out_of_memory
from nvlm_trt.backends.tensorrt_rtx import build as rtx_build
from nvlm_trt.backends.tensorrt_rtx.options import RtxOptions
from nvlm_trt.backends.tensorrt_rtx.plan import build_plan
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.serving.triton.repository import RepositoryOptions, placement_of, render_repository

Directory = Callable[[str], Path]
RTX = ("--backend", "tensorrt-rtx")


@pytest.fixture
def build(run_cli: Run, checkpoint: Directory, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`build("--backend", ...)`: the command's result for NVLM-D-tiny, after which nothing is left."""

    def run(*options: object) -> tuple[int, str, str]:
        result = run_cli(
            "build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "out" / "engine", *options
        )
        assert list(tmp_path.glob("out/*")) == []
        return result

    return run


def test_without_the_extra(build: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    expected = ("TensorRT-RTX cannot be imported", "pip install 'nvlm-trt[tensorrt-rtx]'", "--backend onnxruntime")
    assert_one_line_error(build(*RTX), *expected)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ((*RTX, "--target", "sm90"), ("--target 'sm90' is not one of sm75, sm80", "sm121; separate targets by commas")),
        ((*RTX, "--target", "sm86,sm86"), ("--target names sm86 twice; name it once",)),
        ((*RTX, "--target", "sm86,"), ("--target '' is not one of sm75",)),
        ((*RTX, "--target", ""), ("--target '' is not one of sm75",)),
        ((*RTX, "--target", "sm75"), ("--target sm75: GPUs of compute capability 7.5 have no bf16",)),
        ((*RTX, "--target", "sm75", "--precision", "fp32"), ("7.5 have no fp32",)),
        ((*RTX, "--target", "sm120,sm86", "--precision", "fp8"), ("--target sm86", "8.6 have no fp8")),
        (("--target", "sm86"), ("--target belongs to the backend tensorrt-rtx, not to onnxruntime; leave it out",)),
        (("--backend", "tensorrt", "--target", "sm86"), ("belongs to the backend tensorrt-rtx, not to tensorrt",)),
        (("--weight-streaming",), ("--weight-streaming belongs to the backend tensorrt and tensorrt-rtx",)),
        ((*RTX, "--strip-weights"), ("--strip-weights belongs to the backend tensorrt, not to tensorrt-rtx",)),
        ((*RTX, "--precision", "int4"), ("'int4' is not one of bf16, fp16, fp32, int8, fp8",)),
        ((*RTX, "--precision", "fp16,decoder=bf16"), ("one floating-point type",)),
        ((*RTX, "--max-seq-len", 255), ("max_seq_len 255", "a multiple of 2")),
    ],
)
def test_mistakes(build: Run, options: tuple[object, ...], fragments: tuple[str, ...]) -> None:
    assert_one_line_error(build(*options), *fragments)


# --- engines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose plans are not of interest."""

    def write(graph: Path, plan: Path, *_: Any) -> None:
        plan.write_bytes(b"vtrt" + bytes(100))

    monkeypatch.setattr(rtx_build, "build_plan", write)
    return build_in_fp32(checkpoint("nvlm-d-tiny"), tmp_path / "engine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan[:-1], "decoder.plan has 103 bytes, its manifest says 104"),
        (lambda plan: plan[:-1] + b"x", "decoder.plan does not match the sha256 in its manifest"),
        (lambda plan: None, "decoder.plan"),
    ],
    ids=["cut short", "changed", "missing"],
)
def test_damaged_engines(run_cli: Run, engine: Engine, change: Callable[[bytes], bytes | None], message: str) -> None:
    plan = engine.path / "decoder.plan"
    content = change(plan.read_bytes())
    plan.unlink()
    if content is not None:
        plan.write_bytes(content)
    assert_one_line_error(run_cli("ask", "Hello", "--engine", engine.path), message, "nvlm-trt build")


def test_opening_needs_a_gpu(run_cli: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run_cli("ask", "Hello", "--engine", engine.path)
    assert_one_line_error(result, "needs an NVIDIA GPU", "`--backend onnxruntime` serves on the CPU meanwhile")


def test_opening_needs_the_extra(run_cli: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    result = run_cli("ask", "Hello", "--engine", engine.path)
    assert_one_line_error(result, "pip install 'nvlm-trt[tensorrt-rtx]'")


def test_opening_an_engine_of_another_version(run_cli: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tensorrt_rtx_bindings, "__version__", "1.8.0.1")
    result = run_cli("ask", "Hello", "--engine", engine.path)
    assert_one_line_error(result, "was built with TensorRT-RTX 1.7.1", "this is 1.8.0.1; rebuild it here, or install")


def test_triton_serves_every_stage_with_our_python_models(engine: Engine, tmp_path: Path) -> None:
    render_repository(
        engine, placement_of(engine), tmp_path / "models", tmp_path / "models" / "draining", RepositoryOptions()
    )
    configs = {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        for folder in (tmp_path / "models").iterdir()
    }
    tiling, vision, decoder = (configs[name] for name in ("tiling", "vision_encoder", "nvlm"))
    most = engine.limits.max_tiles + 1  # the thumbnail
    assert (vision.backend, vision.platform, vision.max_batch_size) == ("python", "", most)
    tokens = [tensor for tensor in decoder.input if tensor.name == "image_tokens"]
    for tensor in (tiling.output[0], *vision.input, *vision.output, *tokens):
        assert tensor.data_type == model_config_pb2.TYPE_FP32, tensor.name
    assert tiling.parameters["image_type"].string_value == "TYPE_FP32"
    assert len(tokens) == 1
    assert not list((tmp_path / "models").rglob("*.plan"))


# --- graphs ----------------------------------------------------------------------------------------------------------


def write_graph(path: Path, *operators: str, dtype: int = TensorProto.FLOAT16) -> Path:
    """Writes a chain of operators with one input each, from x [n, 8] to y."""
    names = ["x", *(f"v{i}" for i in range(len(operators) - 1)), "y"]
    nodes = [
        helper.make_node(operator, [names[i]], [names[i + 1]], name=f"node_{i}") for i, operator in enumerate(operators)
    ]
    x, y = (helper.make_tensor_value_info(name, dtype, ["n", 8]) for name in "xy")
    graph = helper.make_graph(nodes, "chain", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


def refusal(graph: Path, profiles: list[dict[str, list[list[int]]]], targets: tuple[str, ...] = ()) -> str:
    with pytest.raises(EngineError) as caught:
        build_plan(graph, graph.with_suffix(".plan"), profiles, RtxOptions(targets), fuse=True, expected=0)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def test_the_parser_names_the_node_that_it_refuses(tmp_path: Path) -> None:
    message = refusal(write_graph(tmp_path / "decoder.onnx", "Relu", "Det"), [{"x": [[1, 8]] * 3}])
    assert message.startswith("decoder.onnx: TensorRT's parser refuses node_1 (Det): ")
    assert message.endswith("this is a fault of nvlm-trt; build it with --backend onnxruntime meanwhile")


def test_the_builder_says_why_it_refuses(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "decoder.onnx", "Relu", dtype=TensorProto.BFLOAT16)
    message = refusal(graph, [{"x": [[1, 8]] * 3}], ("sm75",))
    assert message.startswith("decoder.onnx could not be built for 7.5: ")
    assert "HW-specific datatypes" in message
    message = refusal(graph, [{"x": [[1, 9]] * 3}])
    assert message.startswith("decoder.onnx could not be built for 8.0, 8.6, 8.9, 12.0, 12.1: ")
    assert not message.endswith("gives no reason")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        ("[raiiMyelinGraph.h:37] Error Code 1: Myelin (Unexpected exception std::bad_alloc)", True),
        ("Error Code 1: Myelin (Unexpected exception Resource temporarily unavailable In RAIIMyelinGraph)", True),
        ("Error Code 2: OutOfMemory (Requested size was 123 bytes.)", True),
        ("Error Code 1: Myelin (the model contains HW-specific datatypes: b16)", False),
    ],
)
def test_knows_errors_that_are_about_memory(error: str, memory: bool) -> None:
    assert is_out_of_memory(error) == memory


def test_the_linter_comes_first(tmp_path: Path) -> None:
    message = refusal(write_graph(tmp_path / "decoder.onnx", "Relu", "NonZero"), [{"x": [[1, 8]] * 3}])
    assert "node_1" in message
    assert "depends on values" in message


def test_a_refused_stage_leaves_nothing(build: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = rtx_build.write_graphs

    def write_graphs(*arguments: Any) -> dict[str, Path]:
        graphs = real(*arguments)
        write_graph(graphs["vision_encoder"], "Relu", "Det")
        return graphs

    monkeypatch.setattr(rtx_build, "write_graphs", write_graphs)
    assert_one_line_error(build(*RTX), "vision_encoder.onnx: TensorRT's parser refuses node_1 (Det)")
