"""Tests the TensorRT engine and its backend without a GPU: every call against TensorRT's real classes, the answers
against ONNX Runtime's engine (tensorrt_on_cpu.py says which parts are real)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorrt_scenarios as scenarios
import torch
from backend_steps import run_steps, three_prompts
from command_line import Run, assert_one_line_error

from nvlm_trt.backends.tensorrt import SPEC
from nvlm_trt.backends.tensorrt.record import record_of
from nvlm_trt.backends.tensorrt.target import Target, check_target, container_with
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import plan_engine

pytest.importorskip("polygraphy", reason="needs polygraphy: pip install 'nvlm-trt[test]'")

Directory = Callable[[str], Path]


@pytest.mark.parametrize("architecture", ["d", "x", "h"])
def test_answers_as_the_engine_for_onnx_runtime(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path, architecture: str
) -> None:
    source = checkpoint(f"nvlm-{architecture}-tiny")
    portable = build_engine(source, tmp_path / "portable", scenarios.LIMITS, precision="fp32", smoke_test=False)
    given = three_prompts(portable)
    expected = run_steps(portable, given)
    answers = tensorrt_process.submit(scenarios.ask, source, tmp_path / "engine", given).result()
    assert answers.keys() == expected.keys()
    for name, values in expected.items():
        assert np.isfinite(answers[name]).all(), name
        np.testing.assert_allclose(answers[name], values, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny"])
def test_takes_image_tokens_that_are_on_the_device(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path, name: str
) -> None:
    pixels = np.random.default_rng(0).standard_normal((1, 3, 56, 56), dtype=np.float32)
    arguments = [checkpoint(name), tmp_path / "engine", pixels]
    events = tensorrt_process.submit(scenarios.ask_with_tokens_on_the_device, *arguments).result()
    # nobody reads what another stream may still be writing: after each of two imports, and of two splits
    assert events[events.index("import") :].count("synchronised") == 4


def test_refuses_rows_at_addresses_that_tensorrt_does_not_take(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path
) -> None:
    arguments = [checkpoint("nvlm-d-tiny"), tmp_path / "engine", {"max_seq_len": 255}, "bf16"]
    with pytest.raises(EngineError, match="max_seq_len 255 .* a multiple of 2"):
        tensorrt_process.submit(scenarios.build_with_limits, *arguments).result()
    assert list(tmp_path.iterdir()) == []


def test_build_records_what_it_was_built_for(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path
) -> None:
    build = [scenarios.build, checkpoint("nvlm-x-tiny"), tmp_path / "engine"]
    events = tensorrt_process.submit(*build).result()
    built = [event for event in events if event.startswith("built")]
    assert built == ["built vision_encoder", "built cross_kv", "built decoder"]
    assert events.count("replay") == 8  # the smoke test's 2 prompts of 4 tokens
    assert events[0] == "timing cache of 0 bytes"
    assert "timing cache of 7 bytes" in events  # what the first plan left for the next ones
    opened = Engine.open(tmp_path / "engine")
    manifest, record = opened.manifest, record_of(opened)
    assert (manifest.backend, record.version, record.capability) == ("tensorrt", "11.4.0.106", 90)
    assert record.plugin == "nvlm_v1::GatedCrossAttention"
    assert record.aliased["present_key.0"] == "past_key.0"
    assert sorted(path.name for path in (tmp_path / "engine").iterdir() if path.suffix != ".json") == [
        "cross_kv.plan",
        "decoder.plan",
        "vision_encoder.plan",
    ]
    decoder = record.profiles["decoder"]
    assert [profile["input_ids"][-1] for profile in decoder] == [[1, 256], [3, 1]]


def test_a_cache_that_cannot_be_written_costs_no_build(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    events = tensorrt_process.submit(scenarios.build, checkpoint("nvlm-d-tiny"), tmp_path / "engine").result()
    assert {event for event in events if event.startswith("timing")} == {"timing cache of 0 bytes"}
    assert (tmp_path / "engine" / "decoder.plan").exists()


@pytest.mark.parametrize(
    ("option", "flags", "kept"),
    [("strip_weights", "REFIT_IDENTICAL STRIP_PLAN", True), ("weight_streaming", "WEIGHT_STREAMING", False)],
)
def test_plans_without_weights_or_with_streamed_ones(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path, option: str, flags: str, kept: bool
) -> None:
    source = checkpoint("nvlm-d-tiny")
    events = tensorrt_process.submit(scenarios.build, source, tmp_path / "engine", **{option: True}).result()
    assert f"built decoder {flags}" in events
    assert (tmp_path / "engine" / "decoder.onnx.data").exists() == kept
    assert events.count("refitted decoder.onnx") == kept
    assert events.count("streaming budget 123") == (0 if kept else 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Error Code 2: OutOfMemory", r"vision_encoder.onnx .* out of memory. .* {planned} on the GPU"),
        ("no kernel\nfor this", "vision_encoder.onnx could not be built: no kernel for this"),
    ],
)
def test_failed_builds_leave_nothing(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path, text: str, message: str
) -> None:
    limits = EngineLimits(**scenarios.LIMITS, max_tiles=6)
    planned = plan_engine(EngineDesign(PRESETS["nvlm-d-tiny"], limits, SPEC.precisions.parse("fp32"), SPEC, 0)).stages
    arguments = [checkpoint("nvlm-d-tiny"), tmp_path / "engine", text]
    with pytest.raises(EngineError, match=message.format(planned=re.escape(str(planned["vision_encoder"])))):
        tensorrt_process.submit(scenarios.fail_to_build, *arguments).result()
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])


def test_says_what_was_expected_when_the_finished_engine_does_not_fit(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path
) -> None:
    arguments = [checkpoint("nvlm-d-tiny"), tmp_path / "engine"]
    with pytest.raises(EngineError, match=r"no GPU memory for the caches of 3 slots; .* expected to take 0\.0\d GB"):
        tensorrt_process.submit(scenarios.fail_to_allocate, *arguments).result()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-h-tiny"])
def test_caches_take_what_the_planner_says(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path, name: str
) -> None:
    caches = tensorrt_process.submit(scenarios.cache_bytes, checkpoint(name), tmp_path / "engine").result()
    engine = Engine.open(tmp_path / "engine")
    plan = plan_engine(EngineDesign.of(engine, tag_length=1))
    assert plan.self_cache == sum(nbytes for cache, nbytes in caches.items() if cache.startswith("past_"))
    assert plan.cross_cache == sum(nbytes for cache, nbytes in caches.items() if cache.startswith("cross_"))


def test_builds_heads_that_the_plugin_lacks_with_masked_attention(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path
) -> None:
    source = checkpoint("nvlm-x-tiny")
    portable = build_engine(source, tmp_path / "portable", scenarios.LIMITS, precision="fp32", smoke_test=False)
    given = three_prompts(portable)
    expected = run_steps(portable, given)
    arguments = [source, tmp_path / "engine", given]
    answers = tensorrt_process.submit(scenarios.ask_with_a_plugin_of_wider_heads, *arguments).result()
    assert record_of(Engine.open(tmp_path / "engine")).plugin is None
    for name, values in expected.items():
        np.testing.assert_allclose(answers[name], values, rtol=0, atol=1e-4, err_msg=name)


def test_refuses_another_version_gpu_and_a_truncated_plan(
    tensorrt_process: ProcessPoolExecutor, checkpoint: Directory, tmp_path: Path
) -> None:
    tensorrt_process.submit(scenarios.build, checkpoint("nvlm-d-tiny"), tmp_path / "engine").result()
    engine = Engine.open(tmp_path / "engine")
    here = Target("11.4.0.106", 90, "H200")
    check_target(engine, here)
    with pytest.raises(EngineError, match=r"TensorRT 11\.4\.0\.106, this is 11\.1\.0\.5; run it in .*TensorRT 11\.4"):
        check_target(engine, replace(here, tensorrt="11.1.0.5"))
    with pytest.raises(EngineError, match=r"capability 9\.0 .* has 8\.9 \(L40S\); rebuild"):
        check_target(engine, replace(here, capability=89, gpu="L40S"))
    plan = tmp_path / "engine" / "decoder.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"decoder.plan has \d+ bytes, its manifest says \d+"):
        Engine.open(tmp_path / "engine")


def test_containers() -> None:
    assert container_with("11.1.0.33") == "nvcr.io/nvidia/tritonserver:26.07-py3"
    assert container_with("12.0.1") == "a tritonserver container with TensorRT 12.0"


@pytest.mark.parametrize(
    ("module", "fragments"),
    [
        (None, ("TensorRT cannot be imported", "nvcr.io/nvidia/tritonserver")),
        (SimpleNamespace(__version__="10.14.1.48"), ("TensorRT 10.14.1.48 is older than 11.0",)),
        (SimpleNamespace(__version__="11.1.0.33"), ("needs an NVIDIA GPU",)),
    ],
    ids=["missing", "old", "no GPU"],
)
def test_without_what_it_needs(
    run_cli: Run,
    checkpoint: Directory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    fragments: tuple,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "out")
    result = run_cli(*command, "--backend", "tensorrt")
    assert_one_line_error(result, *fragments, "`--backend onnxruntime` serves on the CPU meanwhile")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--backend", "tensorrt", "--precision", "int4-weight-only"), ("int4-weight-only", "fp16, bf16")),
        (("--backend", "tensorrt", "--precision", "int8,lm_head=fp16"), ("bf16 and fp16", "one floating-point type")),
        (("--backend", "tensorrt", "--gate-samples", "3"), ("passes no gate", "--gate-samples")),
        (("--strip-weights",), ("belongs to the backend tensorrt",)),
        (("--backend", "tensorrt", "--strip-weights", "--weight-streaming"), ("exclude each other",)),
        (("--backend", "abacus"), ("onnxruntime, tensorrt",)),
    ],
)
def test_mistakes(run_cli: Run, checkpoint: Directory, tmp_path: Path, options: tuple, fragments: tuple) -> None:
    result = run_cli("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "out", *options)
    assert_one_line_error(result, *fragments)


def test_precisions() -> None:
    assert set(SPEC.precisions.parse("bf16").values()) == {"bf16"}
    assert SPEC.precisions.parse("fp8")["vision_encoder"] == "bf16"
    assert SPEC.precisions.parse("fp16,decoder=int8")["decoder"] == "int8"


def test_manifest_of_an_engine_for_onnx_runtime_has_no_record(engine: Directory) -> None:
    directory = engine("nvlm-d-tiny")
    assert json.loads((directory / "manifest.json").read_text())["backend_record"] is None
    with pytest.raises(EngineError, match="does not say what it was built for"):
        check_target(Engine.open(directory), Target("11.4.0.106", 90, "H200"))
