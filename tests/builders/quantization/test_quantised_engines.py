"""Whole engines in every precision: near the fp32 engine, smaller, and independent of a request's neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from step_requests import StepRequest, decode

from nvlm_trt.backends.opening import open_backend
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.model.presets import PRESETS

QuantisedEngine = Callable[[str, str], Path]
# precisions that quantise every linear layer -> the least cosine between the engine's logits and those of fp32, for an
# image of noise that is not in the calibration
PRECISIONS = {
    "int8,vision_encoder=int8,projector=int8,lm_head=int8": 0.95,
    "int8-weight-only,vision_encoder=int8-weight-only,projector=int8-weight-only": 0.998,
    "int4-weight-only": 0.9,
    "fp8,vision_encoder=fp8,projector=fp8,lm_head=fp8": 0.98,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-h-tiny"])
def test_neighbours_do_not_change_a_bit(quantised_engine: QuantisedEngine, name: str, precision: str) -> None:
    """Prefill through a slot's view and decode in a batch of three: the logits equal those of a request alone."""
    path = quantised_engine(name, precision)
    with open_backend(Engine.open(path), threads=2) as backend:
        prompts = [("Hello", []), ("What is <image>?", [3]), ("Compare <image> with <image>.", [1, 5])]
        requests = [StepRequest(backend, path, text, tiles, seed) for seed, (text, tiles) in enumerate(prompts)]
        tokens = np.random.default_rng(0).integers(0, 256, (2, 3))
        alone = []
        for row, request in enumerate(requests):
            logits = [request.prefill(0)]
            logits += [decode(backend, [request], step[row : row + 1], i)[0].copy() for i, step in enumerate(tokens)]
            alone.append(logits)
        together = [[request.prefill(slot)] for slot, request in enumerate(requests)]
        for i, step in enumerate(tokens):
            for logits, row in zip(together, decode(backend, requests, step, i).copy(), strict=True):
                logits.append(row)
        assert np.isfinite(np.array(alone)).all()
        np.testing.assert_array_equal(np.array(alone), np.array(together))
        # of a prompt in chunks, lm_head and the last layer compute the last token alone
        *_, whole = requests[2].prefill_chunks(0, 11)
        *_, last = requests[2].prefill_chunks(1, 11, all_logits=False)
        np.testing.assert_array_equal(last, whole)
        # tiles are encoded two at a time
        pixels = np.random.default_rng(0).standard_normal((3, 3, 56, 56), dtype=np.float32)
        one_by_one = np.concatenate([backend.to_host(backend.encode(tile[None])) for tile in pixels])
        np.testing.assert_array_equal(backend.to_host(backend.encode(pixels)), one_by_one)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny"])
def test_stays_near_fp32(
    quantised_engine: QuantisedEngine, engine: Callable[[str], Path], name: str, precision: str
) -> None:
    logits = []
    for path in (engine(name), quantised_engine(name, precision)):
        with open_backend(Engine.open(path), threads=1) as backend:
            logits.append(StepRequest(backend, path, "What is <image>?", [3], seed=0).prefill(0).astype(np.float64))
    full, quantised = logits
    cosine = full @ quantised / np.linalg.norm(full) / np.linalg.norm(quantised)
    assert PRECISIONS[precision] < cosine < 0.9999999


def test_text_only_x_is_the_same_llm_as_d(quantised_engine: QuantisedEngine) -> None:
    ids = np.arange(50)
    logits = []
    for name in ("nvlm-d-tiny", "nvlm-x-tiny"):
        with open_backend(Engine.open(quantised_engine(name, "int8-weight-only")), ("decoder",), threads=2) as backend:
            no_image = backend.embeddings([], 0, 0)
            logits.append(backend.prefill(0, 0, ids, no_image, np.zeros((50, 2), np.int32)))
    of_d, of_x = logits
    np.testing.assert_array_equal(of_d, of_x)


def test_the_manifest_says_what_was_done(quantised_engine: QuantisedEngine, engine: Callable[[str], Path]) -> None:
    full = Engine.open(engine("nvlm-x-tiny")).manifest
    int8, int4 = (
        Engine.open(quantised_engine("nvlm-x-tiny", precision), full_check=True).manifest
        for precision in ("int8", "int4-weight-only")
    )
    assert int8.precision == {
        "vision_encoder": "bf16",
        "projector": "bf16",
        "decoder": "int8",
        "lm_head": "int8-weight-only",
        "cross_attention": "int8",
    }
    assert int8.calibration is not None
    assert int8.calibration["smoothquant_alpha"] == 0.5
    assert int8.calibration["samples"]["count"] == 3
    assert "calibration.json" in int8.files
    assert int4.precision["decoder"] == "int4-weight-only"
    assert int4.calibration is None
    assert "calibration.json" not in int4.files
    sizes = [manifest.files["decoder.onnx.data"].size for manifest in (full, int8, int4)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.35 * sizes[0]


def test_a_quantised_tied_head_is_stored_beside_the_table(tmp_path: Path, samples: Path) -> None:
    llm = replace(PRESETS["nvlm-d-tiny"].llm, tie_word_embeddings=True)
    write_random_checkpoint(tmp_path / "checkpoint", replace(PRESETS["nvlm-d-tiny"], llm=llm), seed=0)
    calibration = samples
    for precision in ("int8", "fp8", "int4-weight-only"):
        options = QuantizationOptions(calibration=calibration, gate=None)
        engine = build_engine(
            tmp_path / "checkpoint", tmp_path / precision, precision=f"lm_head={precision}", quantization=options
        )
        assert engine.manifest.precision["lm_head"] == precision
        calibration = tmp_path / "int8" / "calibration.json"


def test_calibration_is_part_of_an_engines_digest(
    quantised_engine: QuantisedEngine, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A cache must not return image tokens of another calibration."""
    first = Engine.open(quantised_engine("nvlm-d-tiny", "int8"))
    options = QuantizationOptions(calibration=first.path / "calibration.json", smoothquant_alpha=0.8, gate=None)
    second = build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "engine", precision="int8", quantization=options)
    assert first.manifest.precision == second.manifest.precision
    assert first.digest != second.digest
    with Checkpoint.open(checkpoint("nvlm-d-tiny")) as source:
        assert second.manifest.checkpoint_digest == source.digest
