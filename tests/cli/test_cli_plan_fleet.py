"""Tests `nvlm-trt plan` for several GPUs and with the figures of a GPU's data sheet."""

from __future__ import annotations

import json

import pytest
from command_line import Run, assert_one_line_error

from nvlm_trt.planner.gpus import GPUS

COMMAND = ("plan", "--preset", "nvlm-x-72b", "--backend", "tensorrt-llm")


def test_a_fleet_as_json(run_cli: Run) -> None:
    status, out, err = run_cli(*COMMAND, "--gpu", "h100", "--tp", 4, "--pp", 2, "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    fleet = plan["fleet"]
    assert (fleet["tp"], fleet["pp"], fleet["fits"], fleet["what_fits"]) == (4, 2, True, [])
    assert [stage["layers"] for stage in fleet["stages"]] == [45, 45]
    for stage in fleet["stages"]:
        assert stage["total"] == stage["fixed"] + 8 * (stage["kv_per_request"] + stage["cross_kv_per_request"])
    assert plan["times"].keys() == {"image", "prompt", "token, 1 request", "token, 8 requests"}
    assert plan["device"]["memory"] == {"value": 80e9, "source": GPUS["h100"].memory.source, "derived": ""}
    assert plan["assumed"].keys() >= {"compute efficiency", "link efficiency"}


def test_a_fleet_that_is_too_small_says_what_fits(run_cli: Run) -> None:
    status, out, _ = run_cli(*COMMAND, "--gpu", "h100")
    assert status == 0
    assert "Does not fit" in out
    assert "bf16 --tp 1 --pp 3 (" in out  # 90 layers with the blocks
    assert "fp8 --tp 2 --pp 1 (" in out
    _, out, _ = run_cli(*COMMAND, "--gpu", "h100", "--tp", 4)
    assert "Fits in 0.9 of 80 GB per GPU (4 x H100 SXM 80 GB), with" in out
    _, out, _ = run_cli(*COMMAND, "--gpu", "h100", "--tp", 4, "--memory-share", 0.5)
    assert "Does not fit" in out


def test_without_a_gpu_there_are_no_times(run_cli: Run) -> None:
    _, out, _ = run_cli(*COMMAND, "--tp", 2, "--json")
    plan = json.loads(out)
    assert (plan["fleet"]["fits"], plan["fleet"]["requests_that_fit"]) == (None, None)
    assert "times" not in plan
    _, out, _ = run_cli(*COMMAND, "--tp", 2, "--pp", 5)
    assert "stage 4" in out
    assert "Fits" not in out


def test_a_gpu_gives_the_rates_of_other_backends(run_cli: Run) -> None:
    command = ("plan", "--preset", "nvlm-d-72b", "--backend", "tensorrt", "--precision", "fp8", "--json")
    _, out, _ = run_cli(*command, "--gpu", "h200")
    _, given, _ = run_cli(*command, "--bandwidth", 4800, "--tflops", 1979)
    times, by_hand = (json.loads(text)["times"] for text in (out, given))
    assert times["token, 8 requests"] == by_hand["token, 8 requests"]
    assert times["prompt"] == by_hand["prompt"]
    # computes in bf16, at half the rate
    assert times["image"]["products"] == pytest.approx(2 * by_hand["image"]["products"])


@pytest.mark.parametrize(("gpus", "tp", "pp"), [(1, 1, 1), (4, 4, 1), (8, 8, 1), (6, 2, 3)])
def test_a_number_of_gpus_chooses_the_split(run_cli: Run, gpus: int, tp: int, pp: int) -> None:
    """90 layers with the blocks, 64 heads: pipeline stages only where heads do not divide."""
    fleet = json.loads(run_cli(*COMMAND, "--gpu", "h100", "--gpus", gpus, "--json")[1])["fleet"]
    assert (fleet["tp"], fleet["pp"]) == (tp, pp)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--gpu", "v100"), ("'v100'", "h100, h200, b200")),
        (("--gpu", "h100", "--bandwidth", "1", "--tflops", "1"), ("--gpu", "--bandwidth and --tflops")),
        (("--gpu", "h100", "--bandwidth", "1"), ("--gpu", "--bandwidth and --tflops")),
        (("--bandwidth", "1", "--tflops", "1"), ("give --gpu instead",)),
        (("--gpu", "a100", "--precision", "fp8"), ("fp8", "8.0", "int8 or bf16")),
        (("--tp", "3"), ("--tp 3", "64 heads", "1, 2, 4, 8")),
        (("--gpus", "7"), ("7 GPUs", "--gpus from 1, 2, 3, 4, 5, 6, 8")),
        (("--gpus", "4", "--tp", "2"), ("--tp 2 times --pp 1", "--gpus 4")),
        (("--pp", "4"), ("--pp 4", "80 layers and 10 cross-attention blocks", "1, 2, 3, 5")),
        (("--memory-share", "1.5"), ("--memory-share 1.5", "above 0")),
        (("--memory-share", "nan"), ("--memory-share nan",)),
        (("--backend", "tensorrt", "--tp", "2"), ("--tp", "tensorrt runs on one device")),
        (("--backend", "onnxruntime", "--gpu", "h100"), ("onnxruntime runs on the CPU", "--gpu")),
    ],
)
def test_mistakes(run_cli: Run, options: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    assert_one_line_error(run_cli(*COMMAND, *options), *fragments)
