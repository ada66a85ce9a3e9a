"""Tests what TensorRT-RTX's real parser and builder make of the tiny models, without a GPU: NVLM-D and -H in every
precision, and NVLM-X, whose decoder is that of -H, in three. Nothing here can load a plan: the tests look at the first
64 bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from command_line import Run
from onnx import TensorProto, helper
from rtx_machine import LIMITS, tensorrt_rtx_bindings

from nvlm_trt.backends.plans.graphs import write_graphs
from nvlm_trt.backends.plans.profiles import profiles_of
from nvlm_trt.backends.tensorrt_rtx import SPEC
from nvlm_trt.backends.tensorrt_rtx.options import RtxOptions
from nvlm_trt.backends.tensorrt_rtx.plan import build_plan
from nvlm_trt.backends.tensorrt_rtx.record import record_of
from nvlm_trt.backends.tensorrt_rtx.target import TARGETS
from nvlm_trt.builders import unfinished_build
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.formats import WeightForm, quantised
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.builders.unfinished_build import unfinished_folder
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.progress import no_progress

Directory = Callable[[str], Path]
Build = Callable[[str, str], Engine]
DEFAULT_MASK = 0x7E  # every target but sm75
MASKS = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16, "sm121": 32}


@pytest.fixture(scope="module")
def built(checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`built("d", "int8")`: the engine, built once. int8 and fp8 share a calibration."""
    folder, engines = tmp_path_factory.mktemp("rtx"), {}

    def build(architecture: str, precision: str) -> Engine:
        calibration = folder / f"{architecture}-int8" / "calibration.json"
        options = QuantizationOptions(
            calibration=calibration if calibration.exists() else None,
            calibration_samples=None if calibration.exists() else 14,  # of each task, so that some have several tiles
            gate=None,
        )
        return build_engine(
            checkpoint(f"nvlm-{architecture}-tiny"),
            folder / f"{architecture}-{precision}",
            LIMITS,
            smoke_test=False,
            precision=precision,
            quantization=options,
            backend="tensorrt-rtx",
        )

    def once(architecture: str, precision: str) -> Engine:
        if (architecture, precision) not in engines:
            engines[architecture, precision] = build(architecture, precision)
        return engines[architecture, precision]

    return once


def header(plan: Path) -> bytes:
    with plan.open("rb") as file:
        return file.read(64)


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [*itertools.product("dh", SPEC.precisions.names), *itertools.product("x", ["bf16", "fp8", "int4-weight-only"])],
)
def test_builds(built: Build, architecture: str, precision: str) -> None:
    engine = built(architecture, precision)
    record = record_of(engine)
    half = precision if precision in ("fp32", "fp16") else "bf16"
    stages = ["vision_encoder", "decoder"] if architecture == "d" else ["vision_encoder", "cross_kv", "decoder"]
    assert (record.version, record.targets, record.dtype, record.form) == (
        tensorrt_rtx_bindings.__version__,
        [],
        half,
        "plan",
    )
    assert engine.manifest.backend == "tensorrt-rtx"
    assert engine.manifest.precision["decoder"] == precision
    # cross_kv has no attention, and float32 no fused kernel
    assert record.fused == dict.fromkeys(["vision_encoder", "decoder"], precision != "fp32")
    others = ["calibration.json"] if precision in ("int8", "fp8") else []
    files = [*others, "config.json", "manifest.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in engine.path.iterdir()) == sorted(files + [f"{stage}.plan" for stage in stages])
    for stage in stages:
        assert header(engine.path / f"{stage}.plan").startswith(b"vtrt")
        assert header(engine.path / f"{stage}.plan")[32] == DEFAULT_MASK
    assert [path.name for path in engine.path.parent.iterdir() if path.name.startswith(".")] == []


def test_finds_out_whether_attention_is_fused(checkpoint: Directory, tmp_path: Path) -> None:
    """Float32 has no fused kernel: a build that demands one fails, and the next one says so."""
    source, precisions = EngineSource(checkpoint("nvlm-d-tiny"), LIMITS), SPEC.precisions.parse("fp32")
    with Checkpoint.open(source.checkpoint_dir) as weights:
        recipe = quantised(weights, precisions, None, 0, WeightForm.TENSORRT)
    graph = write_graphs(source, recipe, "fp32", tmp_path, no_progress)["vision_encoder"]
    profiles = profiles_of(source.config, source.limits)["vision_encoder"]
    assert build_plan(graph, tmp_path / "plan", profiles, RtxOptions(), fuse=True, expected=0) is False
    assert header(tmp_path / "plan").startswith(b"vtrt")


@pytest.mark.parametrize("architecture", ["d", "h"])
def test_smaller_weights_make_smaller_plans(built: Build, architecture: str) -> None:
    sizes = {
        precision: (built(architecture, precision).path / "decoder.plan").stat().st_size
        for precision in ("fp32", "int8-weight-only", "int4-weight-only")
    }
    assert sizes["int4-weight-only"] < sizes["int8-weight-only"] < sizes["fp32"]


def test_the_command_builds_for_the_targets(run_cli: Run, checkpoint: Directory, tmp_path: Path) -> None:
    command = ("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "engine")
    options = ("--backend", "tensorrt-rtx", "--target", "sm86, SM120", "--max-seq-len", 256, "--weight-streaming")
    status, out, err = run_cli(*command, *options)
    assert (status, out) == (0, ""), err
    engine = Engine.open(tmp_path / "engine")
    record = record_of(engine)
    assert (record.targets, record.weight_streaming, record.dtype) == (["sm86", "sm120"], True, "bf16")
    for plan in engine.path.glob("*.plan"):
        assert header(plan)[32] == MASKS["sm86"] | MASKS["sm120"]


def product(folder: Path) -> Path:
    """Writes a graph that every target builds: x [n, 8] times a weight, in fp16."""
    weight = helper.make_tensor("w", TensorProto.FLOAT16, [8, 8], bytes(128), raw=True)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x], [y], [weight])
    path = folder / "product.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_says_for_which_gpu_it_is(tmp_path: Path, target: str) -> None:
    profile = {"x": [[1, 8], [2, 8], [4, 8]]}
    options = RtxOptions(targets=(target,))
    assert build_plan(product(tmp_path), tmp_path / "plan", [profile], options, fuse=True, expected=0) is None
    assert header(tmp_path / "plan").startswith(b"vtrt")
    assert header(tmp_path / "plan")[32] == MASKS[target]


def test_goes_on_with_the_plans_that_an_interrupted_build_has_finished(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished_build, "_WORTH_KEEPING", 0)
    output, folder = tmp_path / "engine", unfinished_folder(tmp_path / "engine")
    options = {"precision": "bf16", "backend": "tensorrt-rtx", "smoke_test": False}

    def stop(stage: str, done: float, total: float) -> None:
        if stage == "building decoder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(checkpoint("nvlm-d-tiny"), output, LIMITS, progress=stop, **options)
    assert (folder / "graphs" / "decoder.onnx.data").exists()
    plan = (folder / "engine" / "vision_encoder.plan").read_bytes()
    shares: dict[str, list[float]] = {}

    def watch(stage: str, done: float, total: float) -> None:
        shares.setdefault(stage, []).append(done / total)

    engine = build_engine(checkpoint("nvlm-d-tiny"), output, LIMITS, progress=watch, **options)
    assert (output / "vision_encoder.plan").read_bytes() == plan
    assert "building vision_encoder" not in shares
    assert record_of(engine).fused == {"decoder": True, "vision_encoder": True}
    assert set(engine.manifest.files) >= {"vision_encoder.plan", "decoder.plan"}
    assert list(tmp_path.iterdir()) == [output]
