"""8-bit weights: the numbers themselves, and decoders built with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.backends import open_backend
from nvlm_trt.builders.graphs.common import FLOAT, StageGraph
from nvlm_trt.builders.graphs.int8 import BLOCK, Int8WeightOnly, quantize
from nvlm_trt.builders.onnx_engine import build_engine
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ConfigError, EngineError
from nvlm_trt.evaluation.parity import verify_engine

Directory = Callable[[str], Path]
NAMES = ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"]


@pytest.fixture(scope="module")
def int8_engine(tmp_path_factory: pytest.TempPathFactory, checkpoint: Directory) -> Directory:
    root = tmp_path_factory.mktemp("int8")

    def make(name: str) -> Path:
        if not (root / name).exists():
            build_engine(checkpoint(name), root / name, precision="int8-weight-only")
        return root / name

    return make


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.integers(1, 4), st.integers(1, 3))
def test_error_is_at_most_half_a_step_and_zero_is_exact(seed: int, exponent: float, outputs: int, blocks: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((outputs, blocks * BLOCK), dtype=np.float32)
    weight *= np.float32(2.0**exponent)
    weight[:, ::5] = 0
    values, scales = quantize(weight)
    restored = ((values.astype(np.float32) - 128) * scales[..., None]).reshape(weight.shape)
    assert np.isfinite(restored).all()
    assert (np.abs(restored - weight).reshape(*values.shape) <= scales[..., None] * 0.5001).all()
    assert (restored[:, ::5] == 0).all()


def test_a_block_of_zeros() -> None:
    values, scales = quantize(np.zeros((2, BLOCK), np.float32))
    assert (values == 128).all()
    assert (scales == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_of_8_bit_weights_stays_near_the_reference(
    int8_engine: Directory, engine: Directory, checkpoint: Directory, name: str
) -> None:
    report = verify_engine(int8_engine(name), checkpoint(name), tokens=1, tolerance=0.2)
    stages = {stage.name: stage for stage in report.stages}
    for stage in ("image tokens", "prefill logits", "text-only logits"):
        assert stages[stage].passed
    logits = stages["prefill logits"].max_abs_diff
    assert logits is not None
    assert logits > 1e-4  # else it would not be quantised
    quantised, full = Engine.open(int8_engine(name)).manifest, Engine.open(engine(name)).manifest
    assert quantised.precision["decoder"] == "int8-weight-only"
    assert quantised.precision["vision_encoder"] == "fp32"
    assert quantised.files["decoder.onnx.data"].size < 0.5 * full.files["decoder.onnx.data"].size


def test_neighbours_do_not_change_a_bit(int8_engine: Directory) -> None:
    with open_backend(Engine.open(int8_engine("nvlm-d-tiny")), ("decoder",), threads=2) as backend:
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, 256, length) for length in (40, 7, 91)]
        no_image = np.zeros((0, backend.config.llm.hidden_size), np.float32)

        def prefill(slot: int, ids: np.ndarray) -> np.ndarray:
            return backend.prefill(slot, 0, ids, no_image, np.zeros((len(ids), 2), np.int32))

        together = [prefill(slot, ids) for slot, ids in enumerate(prompts)]
        next_ids = np.array([logits.argmax() for logits in together])
        positions = np.array([len(ids) for ids in prompts])
        decoded = backend.decode(next_ids, positions, np.zeros((3, 2), np.int32)).copy()
        assert np.isfinite(decoded).all()
        for row, ids in enumerate(prompts):
            np.testing.assert_array_equal(prefill(0, ids), together[row])
            alone = backend.decode(next_ids[row : row + 1], positions[row : row + 1], np.zeros((1, 2), np.int32))
            np.testing.assert_array_equal(alone[0], decoded[row])


def test_text_only_x_is_the_same_llm_as_d(int8_engine: Directory) -> None:
    ids = np.arange(50)
    logits = []
    for name in ("nvlm-d-tiny", "nvlm-x-tiny"):
        with open_backend(Engine.open(int8_engine(name)), ("decoder",), threads=2) as backend:
            no_image = np.zeros((0, backend.config.llm.hidden_size), np.float32)
            logits.append(backend.prefill(0, 0, ids, no_image, np.zeros((50, 2), np.int32)))
    np.testing.assert_array_equal(*logits)


def test_inputs_that_do_not_divide_into_blocks_are_refused() -> None:
    class Odd:
        shape = (8, BLOCK + 1)

        def load(self) -> np.ndarray:
            raise AssertionError

    class Weights:
        def take(self, name: str) -> Odd:
            return Odd()

    graph = StageGraph("odd", Weights(), Int8WeightOnly())
    with pytest.raises(ConfigError, match="w.weight has 33 inputs.*multiple of 32"):
        graph.linear(graph.input("x", FLOAT, ["n", 33]), "w")


def test_unknown_precision_lists_those_there_are(checkpoint: Directory, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="'int7' is not one of fp32, int8-weight-only"):
        build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "out", precision="int7")
    assert list(tmp_path.iterdir()) == []
