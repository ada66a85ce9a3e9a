"""Tests FP8 checkpoints: as the compressed-tensors package writes and dequantises them, and in ModelOpt's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from fp8_checkpoints import DYNAMIC, STATIC, Tensors, compress, edit, edit_config, write_modelopt, write_quant_config

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.checkpoint.inspection import inspect_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.checkpoint.safetensors_file import _FP8_VALUES
from nvlm_trt.engine import Engine
from nvlm_trt.errors import CheckpointError, ConfigError
from nvlm_trt.evaluation.parity import verify_engine

Directory = Callable[[str], Path]
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


def assert_weights(directory: Path, expected: Tensors) -> None:
    with Checkpoint.open(directory) as checkpoint:
        assert set(checkpoint.names) == set(expected)
        for name in checkpoint.names:
            weight = checkpoint.take(name)
            ours = weight.load()
            np.testing.assert_array_equal(ours, expected[name].numpy(), err_msg=name)
            np.testing.assert_array_equal(weight.rows(len(ours) // 3, len(ours)), ours[len(ours) // 3 :])
        checkpoint.finish()


def test_every_bit_pattern_has_its_value() -> None:
    bits = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(_FP8_VALUES, bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("activations", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_compressed_tensors(
    checkpoint: Directory, tmp_path: Path, strategy: str, activations: QuantizationArgs
) -> None:
    expected = compress(checkpoint("nvlm-h-tiny"), tmp_path / "fp8", strategy, activations)
    assert_weights(tmp_path / "fp8", expected)
    found = inspect_checkpoint(tmp_path / "fp8")
    kind = "dynamic" if activations.dynamic else "static"
    assert (found.faults, found.quantised) == ([], f"FP8 of compressed-tensors, activations {kind}")
    assert "F8_E4M3" in found.parts["decoder"].nbytes


@pytest.mark.parametrize("place", ["hf_quant_config.json", "config.json"])
def test_modelopt(checkpoint: Directory, tmp_path: Path, place: str) -> None:
    expected = write_modelopt(checkpoint("nvlm-d-tiny"), tmp_path / "fp8")
    if place == "config.json":
        eight_bits = {"dynamic": False, "num_bits": 8, "type": "float"}
        group = {"input_activations": eight_bits, "weights": eight_bits, "targets": ["Linear"]}
        found = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "quant_algo": "FP8"}
        producer = {"name": "modelopt", "version": "0.47.0"}
        edit_config(tmp_path / "fp8", quantization_config={**found, "producer": producer, "quant_method": "modelopt"})
    else:
        write_quant_config(tmp_path / "fp8")
    assert_weights(tmp_path / "fp8", expected)
    found = inspect_checkpoint(tmp_path / "fp8")
    assert (found.faults, found.quantised) == ([], "FP8 of modelopt, activations static")
    assert len(found.skipped) == 6 * (7 + 2)


def test_an_engine_of_it(checkpoint: Directory, tmp_path: Path) -> None:
    compress(checkpoint("nvlm-x-tiny"), tmp_path / "fp8", "channel", DYNAMIC)
    build_engine(tmp_path / "fp8", tmp_path / "engine")
    assert verify_engine(tmp_path / "engine", tmp_path / "fp8", tokens=8).passed
    raw = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert "quantization_config" not in raw
    assert Engine.open(tmp_path / "engine").manifest.precision["decoder"] == "fp32"


def test_the_digest_follows_the_scales(checkpoint: Directory, tmp_path: Path) -> None:
    compress(checkpoint("nvlm-d-tiny"), tmp_path / "fp8", "channel", DYNAMIC)
    digests = []
    for factor in (1, 2):
        edit(tmp_path / "fp8", lambda tensors, factor=factor: tensors[f"{Q_PROJ}_scale"].mul_(factor))
        with Checkpoint.open(tmp_path / "fp8") as opened:
            digests.append(opened.digest)
    assert digests[0] != digests[1]


class TestRefused:
    @pytest.fixture
    def fp8(self, checkpoint: Directory, tmp_path: Path) -> Path:
        compress(checkpoint("nvlm-d-tiny"), tmp_path / "fp8", "channel", DYNAMIC)
        return tmp_path / "fp8"

    def load(self, directory: Path) -> None:
        with Checkpoint.open(directory) as opened:
            opened.take(Q_PROJ).load()

    def test_a_number_that_is_not_finite(self, fp8: Path) -> None:
        edit(fp8, lambda tensors: tensors[Q_PROJ].view(torch.uint8)[3].fill_(0xFF))
        with pytest.raises(CheckpointError, match=r"q_proj\.weight has a value at \[3, 0\] that is not finite"):
            self.load(fp8)
        edit(fp8, lambda tensors: tensors[f"{Q_PROJ}_scale"][5].fill_(float("inf")))
        with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale has a value at \[5, 0\] that is not finite"):
            self.load(fp8)

    def test_scales_that_are_missing_or_of_another_shape(self, fp8: Path) -> None:
        edit(fp8, lambda tensors: tensors.update({f"{Q_PROJ}_scale": torch.ones(192, 2)}))
        with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale .*\[192, 2\].*\[192, 1\]"):
            self.load(fp8)
        edit(fp8, lambda tensors: tensors.pop(f"{Q_PROJ}_scale"))
        with pytest.raises(CheckpointError, match=r"no tensor .*q_proj\.weight_scale"):
            self.load(fp8)

    def test_a_config_that_does_not_say_how(self, fp8: Path) -> None:
        edit_config(fp8, quantization_config=None)
        with pytest.raises(CheckpointError, match="weight_scale"):
            self.load(fp8)
        edit(fp8, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("_scale")])
        with pytest.raises(CheckpointError, match="stored as F8_E4M3, but config.json has no quantization_config"):
            self.load(fp8)

    @pytest.mark.parametrize(
        ("scheme", "fragment"),
        [
            ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
            ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
            ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {}}}, "pack-"),
            ({"quant_method": "compressed-tensors"}, "config_groups"),
            ({"config_groups": {"g": {"weights": 8}}, "format": "float-quantized"}, "not of compressed-tensors"),
            ([], "not an object"),
        ],
    )  # fmt: skip
    def test_other_schemes(self, fp8: Path, scheme: object, fragment: str) -> None:
        for keys in ({"quantization_config": scheme}, {"quantization_config": None, "compression_config": scheme}):
            edit_config(fp8, **keys)
            with pytest.raises(ConfigError, match=fragment):
                self.load(fp8)
            assert any(fragment in fault for fault in inspect_checkpoint(fp8).faults)

    @pytest.mark.parametrize(
        "weights", [{"num_bits": 4}, {"type": "int"}, {"strategy": "block"}, {"symmetric": False}], ids=str
    )
    def test_other_weights_of_compressed_tensors(self, fp8: Path, weights: dict[str, object]) -> None:
        raw = json.loads((fp8 / "config.json").read_text())["quantization_config"]
        raw["config_groups"]["group_0"]["weights"].update(weights)
        edit_config(fp8, quantization_config=raw)
        with pytest.raises(ConfigError, match=r"config_groups\.group_0"):
            self.load(fp8)

    def test_another_algorithm_of_modelopt(self, checkpoint: Directory, tmp_path: Path) -> None:
        write_modelopt(checkpoint("nvlm-d-tiny"), tmp_path / "fp8")
        write_quant_config(tmp_path / "fp8", "W4A8_AWQ")
        with pytest.raises(ConfigError, match=r"hf_quant_config\.json: .*'W4A8_AWQ'"):
            Checkpoint.open(tmp_path / "fp8")
