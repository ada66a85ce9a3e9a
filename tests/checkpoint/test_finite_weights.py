"""Weights that are not finite are refused when they are read, whatever reads them: the error names file and tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from command_line import Run, assert_one_line_error
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nvlm_trt.checkpoint.finite import first_not_finite
from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint
from nvlm_trt.checkpoint.safetensors_file import SafetensorsFile
from nvlm_trt.errors import CheckpointError
from nvlm_trt.model.layout import EMBEDDING

Directory = Callable[[str], Path]
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
BAD = [np.nan, -np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_the_first_element_that_is_not_finite_is_found(dtype: str, data: st.DataObject) -> None:
    """For any bits: denormals, both zeros, every NaN."""
    unsigned = np.dtype(f"u{np.dtype(DTYPES[dtype]).itemsize}")
    bits = np.array(data.draw(st.lists(st.integers(0, np.iinfo(unsigned).max), max_size=20)), unsigned)
    with np.errstate(invalid="ignore"):
        faults = np.flatnonzero(~np.isfinite(bits.view(DTYPES[dtype]).astype(np.float64)))
    assert first_not_finite(bits, dtype) == (faults[0] if len(faults) else -1)


def test_all_sixteen_bit_numbers_are_told_apart() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for dtype in ("BF16", "F16"):
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(bits.view(DTYPES[dtype]).astype(np.float32))
        assert [first_not_finite(bits[i : i + 1], dtype) < 0 for i in bits] == finite.tolist()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_read_names_file_tensor_and_place(tmp_path: Path, dtype: str, value: float) -> None:
    values = np.ones((3, 5), DTYPES[dtype])
    values[1, 4] = value
    save_file({"good": np.ones(7, DTYPES[dtype]), "bad": values}, tmp_path / "weights.safetensors")
    file = SafetensorsFile(tmp_path / "weights.safetensors")
    file.load("good")
    file.load_rows("bad", np.array([0, 2]))
    for read in (lambda: file.load("bad"), lambda: file.load_rows("bad", np.array([0, 1]))):
        with pytest.raises(CheckpointError, match=r"weights\.safetensors: bad has a value at \[1, 4\] .* not finite"):
            read()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_element_of_a_tensor_of_several_blocks_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr("nvlm_trt.checkpoint.safetensors_file._BLOCK_BYTES", 64)
    values = np.ones((40, 10), DTYPES[dtype])
    values[39, 9] = np.inf
    save_file({"w": values}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"\[39, 9\]"):
        SafetensorsFile(tmp_path / "w.safetensors").load("w")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    """Makes a checkpoint whose tensor has one value that is not finite, in its last row."""
    folder = tmp_path_factory.mktemp("poisoned")

    def make(tensor: str, value: float) -> Path:
        directory = folder / f"{tensor}-{value}"
        if directory.exists():
            return directory
        init_checkpoint(directory, "nvlm-h-tiny", seed=0)
        weights = load_file(directory / "model.safetensors")
        flat = weights[tensor].reshape(-1)
        flat[-1] = value
        save_file(weights, directory / "model.safetensors")
        return directory

    return make


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-weight-only", "int4-weight-only"])
@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        (EMBEDDING, np.nan),
        ("language_model.model.layers.1.mlp.down_proj.weight", np.inf),
        ("language_model.cross_layers.0.attn_gate", np.nan),
        ("vision_model.embeddings.position_embedding", -np.inf),
        ("mlp1.0.bias", np.nan),
    ],
)
def test_no_build_publishes_it(
    run_cli: Run, poisoned: Callable[[str, float], Path], tmp_path: Path, precision: str, tensor: str, value: float
) -> None:
    checkpoint = poisoned(tensor, value)
    options = [] if precision == "fp32" else ["--no-gate"]
    if precision == "int8":
        options += ["--calibration-samples", "1"]
    output = tmp_path / "engine"
    result = run_cli("build", "--checkpoint", checkpoint, "--output", output, "--precision", precision, *options)
    assert_one_line_error(result, str(checkpoint / "model.safetensors"), tensor, "not finite", "restore the file")
    assert list(tmp_path.iterdir()) == []
