"""Tests that TensorRT-RTX's parser understands the product's graphs: the parsed networks, run in NumPy, give the
results of ONNX Runtime on the same files and those of the PyTorch oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_scenario import CALLS, max_difference
from layer_reading import Array
from network_interpreter import run
from side_by_side import SideBySide
from tiny_networks import (
    FORMS,
    NUMPY,
    QUANTISED,
    Variant,
    image_tokens,
    parsed_stage,
    pixels,
    reference,
    scenario,
    tag_ids,
    variants,
    write_stage,
)

EXACT = 3e-5  # results are at most 6; sums in another order are 7e-6 apart
# Largest differences from the oracle: bf16 has 8 bits, fp16 11.
HALF = {"bf16": 0.15, "fp16": 0.02}
# Largest parts of the logits' norm that quantisation changes. A network that is wrong somewhere changes 1.4.
QUANTISATION_ERROR = {"int8": 0.2, "fp8": 0.25, "int8-weight-only": 0.05, "int4-weight-only": 0.4}


def oracle_image_tokens(architecture: str) -> dict[str, Array]:
    return {"image_tokens": reference(architecture).encode(torch.from_numpy(pixels(architecture))).numpy()}


def oracle_cross_kv(architecture: str) -> dict[str, Array]:
    tokens = image_tokens(architecture)
    tags = torch.from_numpy(tag_ids()[: len(tokens)]) if architecture == "H" else None
    pairs = reference(architecture).cross_kv(torch.from_numpy(tokens), tags)
    return {
        f"cross_{kind}.{j}": tensor.numpy()
        for j, pair in enumerate(pairs)
        for kind, tensor in zip(("key", "value"), pair, strict=True)
    }


@pytest.mark.parametrize("variant", FORMS, ids=str)
def test_decoder_equals_onnxruntime_and_the_oracle(variant: Variant, tmp_path: Path) -> None:
    both, rows = SideBySide(write_stage(variant, "decoder", tmp_path)), scenario(variant.architecture)
    played = rows.play(both)
    assert both.difference < EXACT
    assert played.difference(rows.expected()) < EXACT


@pytest.mark.parametrize("architecture", "DXH")
def test_vision_encoder_equals_onnxruntime_and_the_oracle(architecture: str, tmp_path: Path) -> None:
    both = SideBySide(write_stage(Variant(architecture), "vision_encoder", tmp_path))
    results = both({"pixel_values": pixels(architecture)})
    assert both.difference < EXACT
    assert max_difference(results, oracle_image_tokens(architecture)) < EXACT


@pytest.mark.parametrize("architecture", "XH")
def test_cross_kv_equals_onnxruntime_and_the_oracle(architecture: str, tmp_path: Path) -> None:
    both = SideBySide(write_stage(Variant(architecture), "cross_kv", tmp_path))
    results = both({"image_tokens": image_tokens(architecture)})
    assert both.difference < EXACT
    assert max_difference(results, oracle_cross_kv(architecture)) < EXACT


@pytest.mark.parametrize("variant", variants(HALF, ["unquantised"]), ids=str)
def test_half_precision_decoder_is_near_the_oracle(variant: Variant, tmp_path: Path) -> None:
    parsed, rows = parsed_stage(variant, "decoder", tmp_path), scenario(variant.architecture)
    played = rows.play(lambda feeds: run(parsed, feeds), dtype=NUMPY[variant.dtype])
    assert played.difference(rows.expected()) < HALF[variant.dtype]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("architecture", "DXH")
def test_half_precision_images_are_near_the_oracle(architecture: str, dtype: str, tmp_path: Path) -> None:
    variant = Variant(architecture, dtype=dtype)
    encoder = parsed_stage(variant, "vision_encoder", tmp_path)
    results = run(encoder, {"pixel_values": pixels(architecture).astype(NUMPY[dtype])})
    assert max_difference(results, oracle_image_tokens(architecture)) < HALF[dtype]
    if architecture != "D":
        cross_kv = parsed_stage(variant, "cross_kv", tmp_path)
        results = run(cross_kv, {"image_tokens": image_tokens(architecture).astype(NUMPY[dtype])})
        assert max_difference(results, oracle_cross_kv(architecture)) < HALF[dtype]


@pytest.mark.parametrize("variant", variants(["fp32"], QUANTISED), ids=str)
def test_quantised_decoder_equals_onnxruntime(variant: Variant, tmp_path: Path) -> None:
    both = SideBySide(write_stage(variant, "decoder", tmp_path))
    scenario(variant.architecture).play(both)
    assert both.difference < EXACT


@pytest.mark.parametrize("weight_format", QUANTISED)
@pytest.mark.parametrize("architecture", "DXH")
def test_quantised_images_equal_onnxruntime(architecture: str, weight_format: str, tmp_path: Path) -> None:
    variant = Variant(architecture, weight_format=weight_format)
    both = SideBySide(write_stage(variant, "vision_encoder", tmp_path))
    both({"pixel_values": pixels(architecture)})
    assert both.difference < EXACT
    if architecture != "D":
        both = SideBySide(write_stage(variant, "cross_kv", tmp_path))
        both({"image_tokens": image_tokens(architecture)})
        assert both.difference < EXACT


@pytest.mark.parametrize("variant", variants(["bf16"], QUANTISED), ids=str)
def test_quantised_decoder_runs_in_bf16(variant: Variant, tmp_path: Path) -> None:
    """bf16 rounds the scales, too, and so moves the quantised numbers. The oracle is not quantised."""
    parsed, rows = parsed_stage(variant, "decoder", tmp_path), scenario(variant.architecture)
    call = dict(list(CALLS.items())[:1])
    (logits,) = rows.play(lambda feeds: run(parsed, feeds), call, NUMPY["bf16"]).logits.values()
    (expected,) = rows.expected(call).logits.values()
    assert np.linalg.norm(logits - expected) < QUANTISATION_ERROR[variant.weight_format] * np.linalg.norm(expected)
