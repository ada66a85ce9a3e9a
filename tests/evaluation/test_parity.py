"""Tests `nvlm-trt verify`: it passes a good engine, and names the stage that differs in a damaged one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint
from nvlm_trt.engine import Engine, write_manifest
from nvlm_trt.errors import EngineError
from nvlm_trt.evaluation.engine_stages import EngineStages, fits
from nvlm_trt.evaluation.parity import verify_engine
from nvlm_trt.evaluation.parity_report import ParityReport
from nvlm_trt.model.presets import PRESETS

WHOLE, BY_LAYERS = 1e12, 0  # bytes of memory


@pytest.mark.parametrize("memory", [WHOLE, BY_LAYERS])
@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_a_good_engine_passes_and_its_manifest_says_so(
    engine, checkpoint, tmp_path: Path, name: str, memory: float
) -> None:
    copy = Path(shutil.copytree(engine(name), tmp_path / name))
    report = verify_engine(copy, checkpoint(name), memory=memory)
    assert report.passed
    assert report.title.endswith("a layer at a time") == (memory == BY_LAYERS)
    expected = ["tiles", "image tokens", "prefill logits", "decode logits", "text-only logits"]
    expected.append("greedy tokens" if memory == WHOLE else "likeliest tokens")
    assert list(tmp_path.iterdir()) == [copy]
    if name != "nvlm-d-tiny":
        expected.insert(2, "cross K/V")
    assert [stage.name for stage in report.stages] == expected
    recorded = json.loads((copy / "manifest.json").read_text())["verification"]
    assert recorded["passed"] is True
    assert len(recorded["stages"]) == len(expected)


LLAMA = {"family": "llama", "rope_theta": 5e6, "norm_eps": 1e-5}
OTHER_VISION = {"norm_type": "layer_norm", "qk_norm": False, "qkv_bias": True}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nvlm-d-tiny", {"llm": LLAMA, "vision": OTHER_VISION, "pixel_shuffle": "v1", "projector_hidden_size": 96}),
        ("nvlm-x-tiny", {"llm": LLAMA | {"tie_word_embeddings": True}, "cross_attention": {"qk_norm": True}}),
        ("nvlm-h-tiny", {"llm": LLAMA | {"head_dim": 16}, "cross_attention": {"ffn": False, "interval": 4}}),
    ],
)
def test_llama_and_every_other_option_end_to_end(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """Changes every option that the tiny presets leave at its default, from a checkpoint to 64 greedy tokens."""
    config = PRESETS[name]
    for key, change in changes.items():
        config = replace(
            config, **{key: replace(getattr(config, key), **change) if isinstance(change, dict) else change}
        )
    write_random_checkpoint(tmp_path / "checkpoint", config, seed=0)
    engine = build_engine(tmp_path / "checkpoint", tmp_path / "engine")
    assert replace(engine.config, image_token_id=None) == config
    report = verify_engine(engine.path, tmp_path / "checkpoint")
    assert report.passed, report.stages


@pytest.mark.parametrize(
    ("component", "stage"),
    [("vision_encoder", "image tokens"), ("cross_kv", "cross K/V"), ("decoder", "prefill logits")],
)
@pytest.mark.parametrize("memory", [WHOLE, BY_LAYERS])
def test_a_damaged_component_fails_at_its_own_stage(
    engine, checkpoint, tmp_path: Path, component: str, stage: str, memory: float
) -> None:
    copy = Path(shutil.copytree(engine("nvlm-h-tiny"), tmp_path / "engine"))
    weights = np.memmap(copy / f"{component}.onnx.data", np.float32, mode="r+")
    weights[len(weights) // 2 : len(weights) // 2 + 4096] += 0.5
    weights.flush()
    write_manifest(copy, Engine.open(engine("nvlm-h-tiny")).manifest)
    report = verify_engine(copy, checkpoint("nvlm-h-tiny"), tokens=4, memory=memory)
    assert not report.passed
    first_failed = next(s.name for s in report.stages if not s.passed)
    assert first_failed == stage


def test_an_engine_fits_if_its_weights_and_sessions_do(exact_engine) -> None:
    opened = Engine.open(exact_engine("nvlm-d-tiny"))
    weights = sum(record.size for name, record in opened.manifest.files.items() if name.endswith(".data"))
    assert not fits(opened, weights, tag_length=0)
    assert fits(opened, weights + (64 << 20), tag_length=0)


@pytest.mark.parametrize("memory", [WHOLE, BY_LAYERS])
def test_one_token_and_an_image_of_one_tile(exact_engine, checkpoint, tmp_path: Path, memory: float) -> None:
    """NVLM-H cross-attends nothing of such an image, and nothing is decoded after the prompt."""
    copy = Path(shutil.copytree(exact_engine("nvlm-h-tiny"), tmp_path / "engine"))
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    report = verify_engine(copy, checkpoint("nvlm-h-tiny"), tmp_path / "red.png", tokens=1, memory=memory)
    assert [stage.name for stage in report.stages[:-1]] == [
        "tiles",
        "image tokens",
        "prefill logits",
        "text-only logits",
    ]
    assert report.stages[-1].shape == "1 of 1"
    assert report.passed


def test_a_wrong_last_token_is_counted(
    exact_engine, checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(exact_engine("nvlm-d-tiny"), tmp_path / "engine"))
    answer = EngineStages.answer

    def wrong(self: EngineStages, question: str, image: bytes, tokens: int) -> list[int]:
        *right, last = answer(self, question, image, tokens)
        return [*right, (last + 1) % 256]

    monkeypatch.setattr(EngineStages, "answer", wrong)
    report = verify_engine(copy, checkpoint("nvlm-d-tiny"), tokens=8, memory=WHOLE)
    assert [stage.name for stage in report.stages if not stage.passed] == ["greedy tokens"]
    assert report.stages[-1].shape == "7 of 8"


@pytest.mark.parametrize("memory", [WHOLE, BY_LAYERS])
def test_a_comparison_that_is_stopped_goes_on_where_it_was(engine, checkpoint, tmp_path: Path, memory: float) -> None:
    """Stops it at every layer in turn: each run finishes one layer more, and the result is that of a single run."""
    copy = Path(shutil.copytree(engine("nvlm-h-tiny"), tmp_path / "engine"))
    expected = verify_engine(copy, checkpoint("nvlm-h-tiny"), tokens=3, memory=memory)
    finished: list[tuple[str, float]] = []

    def stop(stage: str, done: float, total: float) -> None:
        if done and (stage, done) not in finished:
            finished.append((stage, done))
            raise KeyboardInterrupt

    runs = 0
    while True:
        runs += 1
        try:
            report = verify_engine(copy, checkpoint("nvlm-h-tiny"), tokens=3, memory=memory, progress=stop)
        except KeyboardInterrupt:
            assert len(list(tmp_path.iterdir())) == 2  # the engine and what is kept
            continue
        break
    assert report == expected
    assert runs == len(finished) + 1
    # the reference: 1 + 4 + 1 of the vision encoder, 3 of keys and values, 1 + 6 + 3 + 1 of the decoder
    engine_layers = 4 if memory == WHOLE else 7 + 1 + 11
    assert len(finished) == 6 + 3 + 11 + engine_layers
    assert list(tmp_path.iterdir()) == [copy]


KILLED = """
import os, signal, sys
from pathlib import Path
from nvlm_trt.evaluation.engine_stages import EngineStages, fits
from nvlm_trt.evaluation.parity import verify_engine
calls = 0
def kill(*report):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
verify_engine(Path(sys.argv[1]), Path(sys.argv[2]), tokens=2, memory=0, progress=kill)
"""


def test_a_comparison_that_is_killed_goes_on(engine, checkpoint, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(engine("nvlm-x-tiny"), tmp_path / "engine"))
    command = [sys.executable, "-c", KILLED, str(copy), str(checkpoint("nvlm-x-tiny")), "20"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    seen: dict[str, float] = {}
    report = verify_engine(
        copy, checkpoint("nvlm-x-tiny"), tokens=2, memory=0, progress=lambda name, done, _: seen.setdefault(name, done)
    )
    assert report.passed
    assert seen["engine: vision encoder"] == 6  # finished before
    assert seen["reference: decoder"] == 0
    assert list(tmp_path.iterdir()) == [copy]


def test_engine_of_another_checkpoint(engine, checkpoint) -> None:
    with pytest.raises(EngineError, match="was not built from checkpoint"):
        verify_engine(engine("nvlm-x-tiny"), checkpoint("nvlm-h-tiny"))


def test_a_damaged_large_file_is_found_before_anything_runs(
    engine, checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(engine("nvlm-d-tiny"), tmp_path / "engine"))
    weights = np.memmap(copy / "decoder.onnx.data", np.uint8, mode="r+")
    weights[-1] ^= 1
    weights.flush()
    monkeypatch.setattr("nvlm_trt.engine._QUICK_HASH_BYTES", 0)
    with pytest.raises(EngineError, match=r"decoder\.onnx\.data does not match the sha256"):
        verify_engine(copy, checkpoint("nvlm-d-tiny"))


@pytest.mark.parametrize("actual", [[1, 2, 4], [1, 2], [1, 2, 3, 4]])
def test_other_tokens_never_pass(actual: list[int]) -> None:
    report = ParityReport("tokens?", tolerance=1e9)
    report.compare_tokens("greedy tokens", [1, 2, 3], [1, 2, 3])
    assert report.passed
    report.compare_tokens("greedy tokens", actual, [1, 2, 3])
    assert not report.passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_never_passes(bad: float) -> None:
    good = np.ones(3, np.float32)
    for actual, expected in (([1, bad, 1], good), (good, [1, bad, 1]), ([1, bad, 1], [1, bad, 1])):
        report = ParityReport("finite?", tolerance=1e9)
        report.compare("stage", np.array(actual, np.float32), np.array(expected, np.float32))
        assert not report.passed


def test_another_shape_never_passes() -> None:
    report = ParityReport("shape?", tolerance=1e9)
    report.compare("stage", np.zeros((2, 3)), np.zeros((3, 2)))
    assert not report.passed


def test_nothing_compared_is_not_a_pass() -> None:
    assert not ParityReport("empty", tolerance=1.0).passed
    report = ParityReport("no tokens", tolerance=1.0)
    report.compare_tokens("greedy tokens", [], [])
    assert not report.passed
