"""A weight that fp16 cannot hold stops a build: the error names tensor, number and place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from command_line import Run, assert_one_line_error
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nvlm_trt.builders.narrow import narrowed
from nvlm_trt.errors import EngineError

Directory = Callable[[str], Path]
BACKENDS = {"tensorrt-llm": ["--checkpoint-only"], "tensorrt-rtx": []}


@given(st.lists(st.floats(width=32), min_size=1, max_size=9), st.sampled_from([np.float16, ml_dtypes.bfloat16]))
def test_what_fits_is_rounded_and_the_first_that_does_not_is_named(numbers: list[float], dtype: type) -> None:
    values = np.array(numbers, np.float32)
    with np.errstate(all="ignore"):
        stored = values.astype(dtype)
        faults = np.flatnonzero(~np.isfinite(stored.astype(np.float32)))
    if not len(faults):
        np.testing.assert_array_equal(narrowed(values, dtype, lambda element: ("w", [element])), stored)
        return
    with pytest.raises(EngineError) as raised:
        narrowed(values, dtype, lambda element: ("w", [element]))
    assert str(raised.value).startswith(f"w has {float(values[faults[0]]):g} at [{faults[0]}], and ")


def test_float32_keeps_everything() -> None:
    values = np.array([3e38, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(narrowed(values, np.float32, lambda element: ("w", [element])), values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("language_model.model.layers.2.self_attn.k_proj.weight", (5, 190)),
        ("language_model.model.layers.0.self_attn.v_proj.bias", (63,)),
        ("language_model.model.embed_tokens.weight", (400, 0)),
        ("vision_model.encoder.layers.3.attn.qkv.weight", (380, 127)),
        ("mlp1.3.weight", (191, 3)),
    ],
)
def test_a_build_in_fp16(
    run_cli: Run, checkpoint: Directory, tmp_path: Path, backend: str, tensor: str, place: tuple[int, ...]
) -> None:
    if backend == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")
    source = Path(shutil.copytree(checkpoint("nvlm-d-tiny"), tmp_path / "checkpoint"))
    tensors = load_file(source / "model.safetensors")
    tensors[tensor][place] = -70144
    save_file(tensors, source / "model.safetensors")
    command = ("build", "--checkpoint", source, "--output", tmp_path / "engine", "--backend", backend)
    result = run_cli(*command, "--precision", "fp16", *BACKENDS[backend])
    told = f"{tensor} has -70144 at {list(place)}, and fp16 ends at 65504; choose bf16 with --precision"
    assert_one_line_error(result, told)
    assert not (tmp_path / "engine").exists()
