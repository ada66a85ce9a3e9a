"""Drives the TensorRT plugin through TensorRT's real Python API, as a build does."""

from __future__ import annotations

import builtins
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import tensorrt_session
from assembly import TARGETS, assemble, entry_parameters

from nvlm_trt.plugins.gated_cross_attention import tensorrt_plugin
from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS

CAPABILITY = 90  # one per process: TensorRT keeps the first registration
DYNAMIC = [(0, 0), (0, 2), (1, 0), (2, 0), (3, 0), (3, 1)]  # sequences and new tokens


def shapes(batch: int, heads: int, tokens: int, head_dim: int, kv_heads: int, cross_tokens: int) -> list[list[int]]:
    key = [batch, kv_heads, cross_tokens, head_dim]
    return [[batch, heads, tokens, head_dim], key, key, [batch, tokens, 2], [1]]


@pytest.mark.parametrize(
    ("dtype", "sizes", "tactics"),
    [
        ("BF16", (8, 64, 1, 128, 8, 1792), [1, 3, 4]),  # a decoding step of the 72B model
        ("HALF", (1, 14, 300, 64, 2, 408), [1, 3, 4]),
        ("FLOAT", (2, 56, 5, 128, 8, 1792), [1]),
    ],
)
def test_taken_as_a_build_takes_it(
    tensorrt_process: ProcessPoolExecutor, dtype: str, sizes: tuple[int, ...], tactics: list[int], tmp_path: Path
) -> None:
    batch, heads, tokens, head_dim, kv_heads, cross_tokens = sizes
    taken = tensorrt_process.submit(tensorrt_session.take, CAPABILITY, dtype, shapes(*sizes), DYNAMIC).result()
    assert (taken.output_types, taken.output_shape) == ([dtype], [batch, heads, tokens, head_dim])
    floating = (dtype, "LINEAR")
    assert taken.combinations == [[floating, floating, floating, ("INT32", "LINEAR"), floating, floating]]
    assert sorted(taken.tactics) == tactics
    for tactic in tactics:
        blocks, launch = BLOCKS[tactic], taken.launches[tactic]
        rows = tokens * heads // kv_heads
        assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == (batch * kv_heads, -(-rows // blocks.rows), 1)
        assert (launch["block_x"], launch["block_y"], launch["block_z"]) == (32 * blocks.warps, 1, 1)
        assert 0 < launch["shared_mem"] <= 48 << 10
        assert taken.scalars[tactic] == [tokens, cross_tokens]
        name, ptx = taken.kernels[tactic]
        assert entry_parameters(ptx) == "pppppiip"
        assert name == "gated_cross_attention_kernel"
        assemble(ptx, TARGETS[CAPABILITY], tmp_path)


@pytest.mark.parametrize(
    ("dtype", "sizes", "message"),
    [
        ("HALF", (1, 4, 1, 72, 2, 16), r"head size 72 is not one of \(32, 64, 80, 96, 128\)"),
        ("HALF", (1, 5, 1, 64, 2, 16), "5 heads are not a multiple of 2 key heads"),
        ("INT8", (1, 4, 1, 64, 2, 16), "query is INT8; it must be HALF, BF16 or FLOAT"),
    ],
)
def test_refuses_what_the_kernel_lacks(
    tensorrt_process: ProcessPoolExecutor, dtype: str, sizes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tensorrt_process.submit(tensorrt_session.take, CAPABILITY, dtype, shapes(*sizes), DYNAMIC).result()


def test_heads_must_be_known_at_build(tensorrt_process: ProcessPoolExecutor) -> None:
    dynamic = [*DYNAMIC, (0, 1)]
    with pytest.raises(RuntimeError, match="non-constant"):
        tensorrt_process.submit(tensorrt_session.take, CAPABILITY, "HALF", shapes(1, 4, 1, 64, 2, 16), dynamic).result()


def test_one_compute_capability_per_process(tensorrt_process: ProcessPoolExecutor) -> None:
    tensorrt_process.submit(tensorrt_plugin.register_plugin, CAPABILITY).result()
    with pytest.raises(ValueError, match="registered for compute capability 90; build for 80 in a process of its own"):
        tensorrt_process.submit(tensorrt_plugin.register_plugin, 80).result()


def test_needs_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_tensorrt(name: str, *arguments: object) -> object:
        if name.split(".")[0] == "tensorrt":
            raise ImportError(name)
        return real(name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_tensorrt)
    with pytest.raises(ImportError, match="tensorrt"):
        tensorrt_plugin.register_plugin(CAPABILITY)
