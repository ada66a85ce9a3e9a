"""Tests `nvlm-trt plan`: one table or one JSON object, and a one-line error for every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.model.presets import PRESETS

Directory = Callable[[str], Path]


def test_foretells_the_engine_that_build_makes(run_cli: Run, checkpoint: Directory, tmp_path: Path) -> None:
    source = checkpoint("nvlm-h-tiny")
    limits = ("--max-slots", 2, "--max-seq-len", 256)
    status, out, err = run_cli("plan", "--checkpoint", source, "--precision", "int8-weight-only", *limits, "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    overrides = {"max_slots": 2, "max_seq_len": 256}
    engine = build_engine(source, tmp_path / "engine", overrides, precision="int8-weight-only", smoke_test=False)
    assert plan["limits"] == engine.limits.model_dump()
    assert plan["precision"].items() >= engine.manifest.precision.items()
    data = sum(record.size for name, record in engine.manifest.files.items() if name.endswith(".data"))
    assert sum(plan["memory"]["weights"].values()) == pytest.approx(data, 0.1)  # tensors begin at whole pages
    assert plan["memory"]["checkpoint"] == (source / "model.safetensors").stat().st_size
    assert plan["prompt"] == {"text_tokens": 128, "tiles": 7}
    assert plan["roofline"].keys() == {"prefill vision_encoder", "prefill cross_kv", "prefill decoder", "decode"}
    assert plan["roofline"]["decode"]["seconds"] is None


def test_table_and_times(run_cli: Run) -> None:
    command = ("plan", "--preset", "nvlm-d-72b", "--backend", "tensorrt", "--bandwidth", 4800, "--tflops", 989)
    status, out, err = run_cli(*command)
    assert (status, err) == (0, "")
    assert "nvlm-d-72b, bf16, tensorrt" in out
    rows = {line.split("  ")[1]: line.split() for line in out.splitlines() if line.startswith("  ")}
    assert rows["decoder weights"][2:] == ["70.21", "G", "parameters", "140.43", "GB"]
    assert "cross-attention cache" not in rows
    bandwidth_bound = float(rows["decode"][3]) / 4.8
    assert float(rows["decode"][-2]) == pytest.approx(bandwidth_bound, 1e-3)


def test_without_an_image_nothing_is_encoded(run_cli: Run) -> None:
    _, out, _ = run_cli("plan", "--preset", "nvlm-x-tiny", "--tiles", 0, "--json")
    assert json.loads(out)["roofline"].keys() == {"prefill decoder", "decode"}


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ((), ("either a checkpoint or a preset", "--preset")),
        (("--preset", "nvlm-d-tiny", "--checkpoint", "x"), ("either a checkpoint or a preset",)),
        (("--preset", "nvlm-e-tiny"), ("'nvlm-e-tiny'", *PRESETS)),
        (("--checkpoint", "nowhere"), ("nowhere",)),
        (("--preset", "nvlm-d-tiny", "--backend", "abacus"), ("onnxruntime, tensorrt",)),
        (("--preset", "nvlm-d-tiny", "--precision", "fp16"), ("computes nothing in fp16",)),
        (("--preset", "nvlm-d-tiny", "--bandwidth", "20"), ("--bandwidth and --tflops",)),
        (("--preset", "nvlm-d-tiny", "--bandwidth", "20", "--tflops", "0"), ("above 0",)),
        (("--preset", "nvlm-d-tiny", "--tiles", "8"), ("at most 7 tiles", "--tiles")),
        (("--preset", "nvlm-d-tiny", "--max-seq-len", "999999"), ("max_seq_len 999999", "--max-seq-len")),
        (("--preset", "nvlm-x-tiny", "--max-image-tokens", "0"), ("NVLM-X", "--max-image-tokens above 0")),
    ],
)
def test_mistakes(run_cli: Run, options: tuple, fragments: tuple) -> None:
    assert_one_line_error(run_cli("plan", *options), *fragments)
