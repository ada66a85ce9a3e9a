"""Compares the Triton kernel of nvlm::GatedCrossAttention, in Triton's interpreter, with the reference model.

Only fp32 and fp16: the interpreter's products in bf16 are wrong."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import interpreted
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import GraphBuilder

from nvlm_trt.model.config import CrossAttentionConfig, LlmConfig
from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS, candidates
from nvlm_trt.plugins.gated_cross_attention.onnx_function import PLUGIN_ATTRIBUTES, gated_cross_attention
from nvlm_trt.reference.cross_attention import CrossAttention

TOLERANCE = {"float32": 2e-6, "float16": 2e-3}


class Inputs(NamedTuple):
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    cross_ranges: np.ndarray
    gate: np.ndarray


def random_inputs(
    cross_ranges: list[list[tuple[int, int]]] | np.ndarray,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    cross_tokens: int = 100,
    dtype: str = "float32",
    gate: float = -0.7,
    seed: int = 0,
) -> Inputs:
    rng = np.random.default_rng(seed)
    ranges = np.array(cross_ranges, np.int32)
    batch, tokens = ranges.shape[:2]
    shapes = (batch, heads, tokens, head_dim), *[(batch, kv_heads, cross_tokens, head_dim)] * 2
    query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return Inputs(query, key, value, ranges, np.array([gate], dtype))


def random_ranges(batch: int, tokens: int, cross_tokens: int, seed: int = 0) -> np.ndarray:
    """Make ranges [B, S, 2] of every length, a third of them empty."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, cross_tokens + 1, (batch, tokens, 2)), axis=-1)
    ends[rng.random((batch, tokens)) < 1 / 3] = 0
    return ends


@torch.no_grad()
def oracle(inputs: Inputs) -> np.ndarray:
    """Run the reference model's attention with identities for projections, in float64: [B, H, S, D]."""
    heads, head_dim = inputs.query.shape[1], inputs.query.shape[3]
    llm = LlmConfig(
        family="llama",
        hidden_size=heads * head_dim,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=inputs.key.shape[1],
        intermediate_size=1,
        vocab_size=1,
        rope_theta=1e4,
        head_dim=head_dim,
    )
    attention = CrossAttention(llm, CrossAttentionConfig(interval=1)).double()
    for projection in (attention.q_proj, attention.o_proj):
        projection.weight.copy_(torch.eye(heads * head_dim))
    query, key, value = (torch.from_numpy(array).double() for array in inputs[:3])
    ranges = torch.from_numpy(inputs.cross_ranges)
    rows = [
        attention(query[b : b + 1].transpose(1, 2).flatten(2), key[b], value[b], ranges[b : b + 1])
        for b in range(len(query))
    ]
    output = torch.cat(rows).unflatten(-1, (heads, head_dim)).transpose(1, 2)
    return (torch.tanh(torch.from_numpy(inputs.gate).double()) * output).numpy()


def check(
    interpreter: ProcessPoolExecutor, inputs: Inputs, blocks: int | None = None, chunk: int | None = None
) -> None:
    output = interpreter.submit(interpreted.attention, *inputs, blocks, chunk).result()
    assert output.dtype == inputs.query.dtype
    np.testing.assert_allclose(output, oracle(inputs), rtol=0, atol=TOLERANCE[str(inputs.query.dtype)])
    empty = inputs.cross_ranges[..., 0] >= inputs.cross_ranges[..., 1]  # [B, S]
    assert (output.transpose(0, 2, 1, 3)[empty] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "batch", "tokens", "cross_tokens"),
    [
        (8, 1, 128, 2, 1, 150),  # a decoding step of one key head of the 72B model
        (7, 1, 128, 1, 3, 70),  # the 34B model's group, which does not divide a block of rows
        (4, 4, 64, 3, 1, 130),  # no grouping
        (14, 2, 64, 2, 9, 129),
        (6, 2, 80, 1, 11, 65),
        (4, 2, 96, 2, 10, 1),
        (4, 2, 32, 1, 9, 140),  # the tiny models' heads, of 128 keys at most in a block
        (40, 1, 64, 1, 2, 33),  # a group larger than a block of rows
    ],
)
def test_equals_reference(
    interpreter: ProcessPoolExecutor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    tokens: int,
    cross_tokens: int,
    dtype: str,
) -> None:
    ranges = random_ranges(batch, tokens, cross_tokens)
    ranges[-1, -1] = 0, cross_tokens
    check(interpreter, random_inputs(ranges, heads, kv_heads, head_dim, cross_tokens, dtype))


@pytest.mark.parametrize(
    ("blocks", "dtype"), [(n, dtype) for dtype, size in (("float32", 4), ("float16", 2)) for n in candidates(size)]
)
def test_every_block_size(interpreter: ProcessPoolExecutor, blocks: int, dtype: str) -> None:
    """A prompt: text, tags that read their tile, text that reads all; several blocks of rows and of keys."""
    ranges = [[(0, 0)] * 2 + [(40, 80)] * 5 + [(80, 120)] * 5 + [(200, 299)] + [(0, 300)] * 8]
    check(interpreter, random_inputs(ranges, 8, 2, 64, 301, dtype), blocks)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("cross_tokens", [64, 65, 130, 300])
def test_keys_in_chunks(interpreter: ProcessPoolExecutor, cross_tokens: int, dtype: str) -> None:
    """Ranges in one chunk, over several chunks, up to a chunk's end, and empty; chunks without a key of some rows."""
    ranges = [[(0, 64), (64, 128), (60, cross_tokens)], [(0, cross_tokens), (0, 0), (cross_tokens - 1, cross_tokens)]]
    check(interpreter, random_inputs(ranges, 6, 2, 64, cross_tokens, dtype), blocks=1, chunk=64)


def test_long_caches_are_read_in_chunks_when_decoding(interpreter: ProcessPoolExecutor) -> None:
    """The table's own choice: 16 rows, and more keys than a chunk has."""
    chunk = BLOCKS[2].chunk
    assert chunk is not None
    tokens = 2 * chunk + 40
    check(interpreter, random_inputs([[(5, tokens - 3)], [(0, 0)]], 4, 2, 64, tokens, "float16"))


@settings(max_examples=30)
@given(data=st.data())
def test_equals_reference_on_any_ranges(interpreter: ProcessPoolExecutor, data: st.DataObject) -> None:
    """Also ends before starts, beyond the last key and before the first: the kernel clips ranges."""
    cross_tokens = data.draw(st.integers(1, 90))
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    ends = st.integers(-3, cross_tokens + 3)
    pairs = st.lists(st.tuples(ends, ends), min_size=tokens, max_size=tokens)
    ranges = data.draw(st.lists(pairs, min_size=batch, max_size=batch))
    heads, kv_heads = data.draw(st.sampled_from([(2, 1), (3, 1), (4, 2), (2, 2)]))
    dtype = data.draw(st.sampled_from(["float32", "float16"]))
    gate = data.draw(st.floats(-4, 4, width=16))
    chunk = data.draw(st.sampled_from([None, 32, 64]))
    check(interpreter, random_inputs(ranges, heads, kv_heads, 64, cross_tokens, dtype, gate), 1, chunk)


def test_equals_onnx_function(interpreter: ProcessPoolExecutor) -> None:
    """ONNX Runtime computes the same for the same node."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24, "nvlm": 1}, name="attention")
    builder = GraphBuilder(graph)
    inputs = random_inputs(random_ranges(2, 5, 90), cross_tokens=90)
    values = [
        builder.input(name, ir.DataType.from_numpy(array.dtype), array.shape)
        for name, array in inputs._asdict().items()
    ]
    output = builder.call(gated_cross_attention(24), *values, **PLUGIN_ATTRIBUTES)
    output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape(inputs.query.shape)
    builder.add_output(output, "output")
    model: onnx.ModelProto = ir.to_proto(ir.Model(graph, ir_version=11, functions=list(builder.functions.values())))
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(["output"], inputs._asdict())
    output = interpreter.submit(interpreted.attention, *inputs).result()
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_loads_no_key_outside_the_ranges(interpreter: ProcessPoolExecutor, blocks: int) -> None:
    """The loads' addresses are those of the rows from the lowest start to the highest end."""
    inputs = random_inputs([[(0, 0), (150, 160), (155, 290), (7, 3)]], 2, 1, cross_tokens=400, dtype="float16")
    rows = interpreter.submit(interpreted.key_rows_loaded, *inputs, blocks).result()
    assert rows == set(range(150, 290))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_empty_ranges_give_exact_zero_whatever_the_cache_holds(interpreter: ProcessPoolExecutor, poison: float) -> None:
    inputs = random_inputs([[(0, 0), (4, 4)], [(9, 2), (0, 0)]])
    inputs.key[:], inputs.value[:] = poison, poison
    assert (interpreter.submit(interpreted.attention, *inputs).result() == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_keys_outside_the_ranges_change_no_bit(interpreter: ProcessPoolExecutor, dtype: str) -> None:
    inputs = random_inputs([[(0, 0), (35, 50), (40, 77)]], dtype=dtype)
    output = interpreter.submit(interpreted.attention, *inputs).result()
    for array in (inputs.key, inputs.value):
        array[:, :, :35], array[:, :, 77:] = np.nan, np.inf
    assert np.isfinite(output).all()
    assert np.array_equal(interpreter.submit(interpreted.attention, *inputs).result(), output)


def test_a_nan_that_is_read_shows(interpreter: ProcessPoolExecutor) -> None:
    inputs = random_inputs([[(0, 50), (50, 100)]])
    inputs.key[:, :, 60] = np.nan
    output = interpreter.submit(interpreted.attention, *inputs).result()
    assert np.isfinite(output[:, :, 0]).all()
    assert np.isnan(output[:, :, 1]).all()


@pytest.mark.parametrize("blocks", [1, 4])
def test_bits_do_not_depend_on_neighbours(interpreter: ProcessPoolExecutor, blocks: int) -> None:
    """The bits of a token depend neither on other sequences nor on other tokens, whatever these read."""
    ranges = random_ranges(3, 9, 200, seed=3)
    inputs = random_inputs(ranges, cross_tokens=200, dtype="float16" if blocks > 1 else "float32")
    together = interpreter.submit(interpreted.attention, *inputs, blocks).result()
    for b, s in ((0, 0), (1, 4), (2, 8)):
        alone = Inputs(
            np.ascontiguousarray(inputs.query[b : b + 1, :, s : s + 1]),
            inputs.key[b : b + 1],
            inputs.value[b : b + 1],
            np.array([[ranges[b, s]]], np.int32),
            inputs.gate,
        )
        output = interpreter.submit(interpreted.attention, *alone, blocks).result()
        assert np.array_equal(output[0, :, 0], together[b, :, s])


@pytest.mark.parametrize("gate", [0.0, 1e-30, -1e-6, 1e-3, 0.0999, 0.1001, -0.5, 3.0, -9.0, 100.0])
def test_gate(interpreter: ProcessPoolExecutor, gate: float) -> None:
    """A token that reads one key gets tanh(gate) * value, to 7 digits, also for small gates."""
    inputs = random_inputs([[(5, 6)]], gate=gate)
    output = interpreter.submit(interpreted.attention, *inputs).result()
    expected = np.tanh(inputs.gate.astype(np.float64)) * np.repeat(inputs.value[:, :, 5:6], 2, axis=1)
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=0)


def test_no_tokens(interpreter: ProcessPoolExecutor) -> None:
    inputs = random_inputs(np.zeros((2, 0, 2)))
    assert interpreter.submit(interpreted.attention, *inputs).result().shape == (2, 4, 0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((1, 4, 64), np.float32)}, r"query must be \[B, H, S, D\].*got query \[1, 4, 64\] float32"),
        ({"query": np.zeros((1, 3, 1, 64), np.float32)}, "heads must be a multiple"),
        ({"query": np.zeros((1, 4, 1, 80), np.float32)}, "query's batch and head size"),
        ({"query": np.zeros((1, 4, 1, 64), np.float64)}, "float16, bfloat16 or float32"),
        ({"value": np.zeros((1, 2, 7, 64), np.float32)}, "value must have the key's shape"),
        ({"value": np.zeros((1, 2, 100, 64), np.float16)}, "query's type"),
        ({"value": np.zeros((1, 2, 64, 100), np.float32).transpose(0, 1, 3, 2)}, "contiguous"),
        ({"cross_ranges": np.zeros((1, 1, 2), np.int64)}, r"\[B, S, 2\] int32"),
        ({"cross_ranges": np.zeros((1, 2, 2), np.int32)}, r"\[B, S, 2\] int32"),
        ({"gate": np.zeros(2, np.float32)}, "one floating-point number"),
        (
            {name: np.zeros((1, 4, n, 72), np.float32) for name, n in (("query", 1), ("key", 9), ("value", 9))},
            r"\(32, 64, 80, 96, 128\)",
        ),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, np.ndarray], message: str) -> None:
    pytest.importorskip("triton")
    from nvlm_trt.plugins.gated_cross_attention.launcher import gated_cross_attention as launch

    inputs = random_inputs([[(0, 3)]])._replace(**change)
    query, key, value, ranges, gate = map(torch.from_numpy, inputs)
    with pytest.raises(ValueError, match=message):
        launch(query, key, value, ranges, gate)
