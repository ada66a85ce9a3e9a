"""Safetensors files that are written piece by piece, as the safetensors package and torch read them."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from nvlm_trt.builders.tensorrt_llm.layout import TensorSpec
from nvlm_trt.builders.tensorrt_llm.tensor_file import NUMPY_DTYPES, TensorFile
from nvlm_trt.checkpoint.safetensors_file import SafetensorsFile
from nvlm_trt.errors import EngineError

SPECS = st.builds(
    TensorSpec,
    st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 5), st.integers(1, 7))),
    st.sampled_from(list(NUMPY_DTYPES)),
)


@given(specs=st.lists(SPECS, min_size=1, max_size=6), seed=st.integers(0, 999), data=st.data())
def test_any_tensors_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec], seed: int, data: st.DataObject
) -> None:
    """Every tensor begins at a multiple of its item's size, also after tensors of odd sizes."""
    path = tmp_path_factory.mktemp("file") / "rank0.safetensors"
    layout = {f"tensor {i}": spec for i, spec in enumerate(specs)}
    random = np.random.default_rng(seed)
    values = {name: random.integers(-9, 9, math.prod(spec.shape)).astype(np.float32) for name, spec in layout.items()}
    pieces = []
    for name, flat in values.items():
        cut = data.draw(st.integers(0, len(flat)))
        pieces += [(name, 0, flat[:cut]), (name, cut, flat[cut:])]
    order = data.draw(st.permutations(pieces))
    half = len(order) // 2
    with TensorFile(path, layout, keep=False) as file:
        for name, first, piece in order[:half]:
            file.write(name, first, piece)
    with TensorFile(path, layout, keep=True) as file:
        for name, first, piece in order[half:]:
            file.write(name, first, piece)
    found = load_file(path)
    assert found.keys() == layout.keys()
    with contextlib.closing(SafetensorsFile(path)) as reader:
        records = reader.records
    for name, spec in layout.items():
        assert records[name].begin % found[name].element_size() == 0
        assert tuple(found[name].shape) == spec.shape
        np.testing.assert_array_equal(found[name].float().numpy().reshape(-1), values[name])


def test_what_nobody_writes_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "rank0.safetensors"
    path.write_bytes(b"\xff" * 1000)
    with TensorFile(path, {"lm_head.weight": TensorSpec((4, 3), "BF16")}, keep=False) as file:
        file.write("lm_head.weight", 3, np.ones((2, 3), np.float32))
    assert load_file(path)["lm_head.weight"].tolist() == [[0] * 3, [1] * 3, [1] * 3, [0] * 3]


@pytest.mark.parametrize("layout", [{"a": TensorSpec((2,), "F32")}, {"b": TensorSpec((1,), "F32")}])
def test_only_the_same_file_is_kept(tmp_path: Path, layout: dict[str, TensorSpec]) -> None:
    path = tmp_path / "rank0.safetensors"
    TensorFile(path, {"a": TensorSpec((1,), "F32")}, keep=False).close()
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError):
        TensorFile(path, layout, keep=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65520.0), ("BF16", 3.4e38), ("F16", float("nan"))])
def test_values_beyond_the_dtype(tmp_path: Path, dtype: str, value: float) -> None:
    with TensorFile(tmp_path / "file", {"norm": TensorSpec((2,), dtype)}, keep=False) as file:
        name, wider = {"F16": ("fp16", "bf16"), "BF16": ("bf16", "fp32")}[dtype]
        message = rf"^norm has {re.escape(f'{value:g}')} at \[1\], and {name} ends at .*; choose {wider} with"
        for first in (0, 1):
            with pytest.raises(EngineError, match=message):
                file.write("norm", first, np.array([1, value], np.float32)[first:])
        file.write("norm", 0, np.array([1, 65504], np.float32))
    assert torch.isfinite(load_file(tmp_path / "file")["norm"]).all()
