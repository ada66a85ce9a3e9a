"""Tests `nvlm-trt plan`: one table or one JSON object, and a one-line error for every mistake."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.gpus import GPUS

Directory = Callable[[str], Path]
H200 = ("plan", "--preset", "nvlm-d-72b", "--backend", "tensorrt", "--gpu", "h200")


def test_foretells_the_engine_that_build_makes(run_cli: Run, checkpoint: Directory, tmp_path: Path) -> None:
    source = checkpoint("nvlm-h-tiny")
    limits = ("--concurrency", 2, "--context", 256)
    status, out, err = run_cli("plan", "--checkpoint", source, "--precision", "int8-weight-only", *limits, "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    overrides = {"max_slots": 2, "max_seq_len": 256}
    engine = build_engine(source, tmp_path / "engine", overrides, precision="int8-weight-only", smoke_test=False)
    assert plan["limits"] == engine.limits.model_dump()
    assert plan["precision"].items() >= engine.manifest.precision.items()
    data = sum(record.size for name, record in engine.manifest.files.items() if name.endswith(".data"))
    assert sum(plan["memory"]["weights"].values()) == pytest.approx(data, 0.1)  # tensors begin at whole pages
    assert plan["build"]["engine"] == sum(plan["memory"]["weights"].values())
    assert plan["memory"]["checkpoint"] == (source / "model.safetensors").stat().st_size
    assert plan["prompt"] == {"text_tokens": 128, "tiles": 7}
    assert "times" not in plan  # nothing says how fast this machine is


def test_plans_an_engine_as_its_checkpoint(run_cli: Run, engine: Directory, checkpoint: Directory) -> None:
    """The engine of the fixture has the limits of a build without options."""
    rates = ("--bandwidth", 20, "--tflops", 1, "--json")
    of_engine = json.loads(run_cli("plan", engine("nvlm-x-tiny"), *rates)[1])
    limits = of_engine["limits"]
    asked = (
        *("--concurrency", limits["max_slots"], "--context", limits["max_seq_len"]),
        *("--max-image-tokens", limits["max_image_tokens"]),
    )
    of_checkpoint = json.loads(run_cli("plan", "--checkpoint", checkpoint("nvlm-x-tiny"), *asked, *rates)[1])
    for key in ("memory", "limits", "times", "fit", "tokens_per_s"):
        if key == "memory":  # an engine does not say how large its checkpoint was
            del of_engine[key]["checkpoint"], of_checkpoint[key]["checkpoint"]
        assert of_engine[key] == of_checkpoint[key], key
    assert "build" not in of_engine


@pytest.mark.parametrize(
    ("preset", "backend", "is_shown"),
    [("nvlm-d-72b", "onnxruntime", True), ("nvlm-d-72b", "tensorrt-rtx", False), ("nvlm-d-tiny", "onnxruntime", False)],
)
def test_the_least_memory_of_a_build(run_cli: Run, preset: str, backend: str, is_shown: bool) -> None:
    """An engine on the CPU that does not fit is built all the same, by a smoke test of a layer at a time."""
    command = ("plan", "--preset", preset, "--backend", backend)
    assert ("the least, without a gate" in run_cli(*command)[1]) == is_shown
    build = json.loads(run_cli(*command, "--json")[1])["build"]
    assert build["least_host_memory"] == (2_000_000_000 if is_shown else build["host_memory"])


def test_table_and_times(run_cli: Run) -> None:
    command = ("plan", "--preset", "nvlm-d-72b", "--backend", "tensorrt", "--bandwidth", 4800, "--tflops", 989)
    status, out, err = run_cli(*command)
    assert (status, err) == (0, "")
    assert "nvlm-d-72b, bf16, tensorrt" in out
    rows = {line.split("  ")[1]: line.split() for line in out.splitlines() if line.startswith("  ")}
    assert rows["decoder in files"][3:] == ["70.21", "G", "140.43", "GB"]
    assert "cross-attention cache" not in rows
    weights = 2 * (70.21e9 + 1.25e9)  # of decoder and lm_head, at 0.75 of 4800 GB/s
    assert float(rows["token, 1 request"][3]) == pytest.approx(1e3 * weights / 3600e9, 0.01)


def test_without_an_image_nothing_is_encoded(run_cli: Run) -> None:
    command = ("plan", "--preset", "nvlm-x-tiny", "--tiles", 0, "--bandwidth", 20, "--tflops", 1, "--json")
    plan = json.loads(run_cli(*command)[1])
    assert plan["times"].keys() == {"prompt", "token, 1 request", "token, 8 requests"}
    assert plan["ttft_s"] == plan["times"]["prompt"]["seconds"]


@pytest.mark.parametrize("option", ["--concurrency", "--context"])
def test_each_change_that_is_proposed_fits(run_cli: Run, option: str) -> None:
    command = ("plan", "--preset", "nvlm-d-72b", "--backend", "tensorrt", "--precision", "fp8", "--gpu", "h200")
    asked = {"--concurrency": 64, "--context": 8192}
    plan = json.loads(run_cli(*command, *(word for pair in asked.items() for word in pair), "--json")[1])
    assert not plan["fit"]["fits"]
    change = next(change for change in plan["fit"]["changes"] if change.startswith(option))
    changed = asked | {option: int(change.split()[1])}
    fixed = json.loads(run_cli(*command, *(word for pair in changed.items() for word in pair), "--json")[1])
    assert fixed["fit"]["fits"]
    largest = changed | {option: changed[option] + {"--concurrency": 1, "--context": 128}[option]}
    beyond = json.loads(run_cli(*command, *(word for pair in largest.items() for word in pair), "--json")[1])
    assert not beyond["fit"]["fits"]


def test_weights_that_do_not_fit(run_cli: Run) -> None:
    _, out, _ = run_cli(*H200)
    assert "not even one slot does. Any of these would: --precision int8, --precision fp8" in out
    _, out, _ = run_cli(*H200[:-1], "b200", "--concurrency", 8)
    assert "Does not fit in 0.9 of 180.0 GB (B200 SXM 180 GB): 2 slots do. Any of these would: --concurrency 2" in out
    _, out, _ = run_cli(*H200, "--memory", 400)
    assert "Fits in 0.9 of 400.0 GB" in out


def test_engines_on_several_gpus_share_the_load(run_cli: Run) -> None:
    one, four = (json.loads(run_cli(*H200, "--gpus", count, "--json")[1]) for count in (1, 4))
    assert four["tokens_per_s"] == 4 * one["tokens_per_s"]
    assert four["ttft_s"] == one["ttft_s"]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts an nvidia-smi on PATH that prints these lines."""

    def put(lines: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<END\n{lines}\nEND\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


AUTO = ("plan", "--preset", "nvlm-d-72b", "--backend", "tensorrt", "--gpu", "auto")


def test_the_gpu_of_this_machine(run_cli: Run, nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("NVIDIA H200, 575.57.08, 143771 MiB, 9.0\nNVIDIA H200, 575.57.08, 143771 MiB, 9.0")
    device = json.loads(run_cli(*AUTO, "--json")[1])["device"]
    assert device["name"] == "h200"
    assert device["bandwidth"]["value"] == 4.8e12
    assert device["memory"] == {"value": 143771 * 2**20, "source": "nvidia-smi", "derived": ""}


@pytest.mark.parametrize(
    ("lines", "fragments"),
    [
        ("NVIDIA H200, 1, 143771 MiB, 9.0\nNVIDIA L40S, 1, 46068 MiB, 8.9", ("different GPUs", "H200", "L40S")),
        ("Tesla V100-SXM2-16GB, 1, 16384 MiB, 7.0", ("Tesla V100-SXM2-16GB", "not known", *GPUS, "--bandwidth")),
        ("", ("lists no GPU", *GPUS)),
    ],
)
def test_a_machine_without_a_known_gpu(
    run_cli: Run, nvidia_smi: Callable[[str], None], lines: str, fragments: tuple[str, ...]
) -> None:
    nvidia_smi(lines)
    assert_one_line_error(run_cli(*AUTO), *fragments)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ((), ("an engine directory", "--checkpoint", "--preset")),
        (("--preset", "nvlm-d-tiny", "--checkpoint", "x"), ("name one of",)),
        (("nowhere",), ("nowhere is not an engine directory",)),
        (("--preset", "nvlm-e-tiny"), ("'nvlm-e-tiny'", *PRESETS)),
        (("--checkpoint", "nowhere"), ("nowhere",)),
        (("--preset", "nvlm-d-tiny", "--backend", "abacus"), ("onnxruntime, tensorrt",)),
        (("--preset", "nvlm-d-tiny", "--precision", "fp16"), ("computes nothing in fp16",)),
        (("--preset", "nvlm-d-tiny", "--bandwidth", "20"), ("--bandwidth and --tflops",)),
        (("--preset", "nvlm-d-tiny", "--bandwidth", "20", "--tflops", "0"), ("above 0",)),
        (("--preset", "nvlm-d-tiny", "--memory", "nan"), ("--memory nan",)),
        (("--preset", "nvlm-d-tiny", "--memory-share", "1.5"), ("--memory-share 1.5", "above 0")),
        (("--preset", "nvlm-d-tiny", "--disk-bandwidth", "nan"), ("--disk-bandwidth nan",)),
        (("--preset", "nvlm-d-tiny", "--tiles", "8"), ("at most 7 tiles", "--tiles")),
        (("--preset", "nvlm-d-tiny", "--context", "999999"), ("max_seq_len 999999", "--max-seq-len")),
        (("--preset", "nvlm-d-tiny", "--context", "64", "--tiles", "7"), ("has 240 tokens", "raise --context")),
        (("--preset", "nvlm-x-tiny", "--max-image-tokens", "0"), ("NVLM-X", "--max-image-tokens above 0")),
        (("--preset", "nvlm-d-tiny", "--slo-ttft", "100"), ("give --fleet",)),
        (("--preset", "nvlm-d-tiny", "--gpus", "2"), ("--gpus", "onnxruntime runs on one device")),
    ],
)
def test_mistakes(run_cli: Run, options: tuple, fragments: tuple) -> None:
    assert_one_line_error(run_cli("plan", *options), *fragments)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--precision", "fp32"), ("--precision", "built already")),
        (("--context", "128"), ("--context", "built already")),
        (("--concurrency", "99"), ("slots, not 99", "--max-slots 99")),
    ],
)
def test_options_that_an_engine_does_not_leave_open(
    run_cli: Run, engine: Directory, options: tuple, fragments: tuple
) -> None:
    assert_one_line_error(run_cli("plan", engine("nvlm-d-tiny"), *options), *fragments)
