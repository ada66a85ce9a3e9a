"""Which ranks hold what: heads, layers, and the splits that do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from split_models import CONFIGS, VARIANTS

from nvlm_trt.builders.tensorrt_llm.mapping import Mapping, combined_layers
from nvlm_trt.builders.tensorrt_llm.quantization import LlmQuantization
from nvlm_trt.builders.tensorrt_llm.shards import FloatTensor, stage_tensors
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import CrossAttentionConfig, LlmConfig, NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, checkpoint_layout, cross_layout, llm_layout
from nvlm_trt.model.presets import PRESETS


def with_llm(config: NvlmConfig, **changes: object) -> NvlmConfig:
    return replace(config, llm=replace(config.llm, **changes))


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (3, 1, "--tp 3 does not split 64 heads, .*; choose one of 1, 2, 4, 8, 16, 32, 64$"),
        (128, 1, "--tp 128 does not split"),
        (1, 3, r"--pp 3 does not split 80 layers into equal stages; choose one of 1, 2, 4, 5, 8, 10, 16, 20, 40$"),
    ],
)
def test_a_split_that_does_not_fit_names_those_that_do(tp: int, pp: int, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Mapping(tp, pp).check(PRESETS["nvlm-d-72b"])


def test_blocks_count_among_the_layers() -> None:
    config = PRESETS["nvlm-x-72b"]
    with pytest.raises(EngineError, match="80 layers and 10 cross-attention blocks into .*; choose one of 1, 2, 3, 5"):
        Mapping(1, 4).check(config)
    Mapping(1, 3).check(config)


def test_key_value_heads_and_ffn_have_to_divide() -> None:
    llm = {"num_heads": 12, "num_kv_heads": 6, "head_dim": 32, "intermediate_size": 96}
    with pytest.raises(EngineError, match="6 key-value heads"):
        Mapping(4, 1).check(with_llm(CONFIGS["D"], **llm))
    with pytest.raises(EngineError, match="FFN of 90 evenly; choose one of 1, 2, 3, 6"):
        Mapping(12, 1).check(with_llm(CONFIGS["D"], **{**llm, "intermediate_size": 90}))


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (-2, 1)])
def test_a_split_is_of_one_gpu_or_more(arguments: tuple[int, int]) -> None:
    with pytest.raises(EngineError, match="give 1 or more"):
        Mapping(*arguments)


def test_ranks_of_a_stage_follow_each_other() -> None:
    mapping = Mapping(4, 2)
    ranks = [mapping.rank(stage, t) for stage in range(2) for t in range(4)]
    assert ranks == list(range(mapping.world_size))
    assert [mapping.stage(rank) for rank in ranks] == [0] * 4 + [1] * 4


@given(layers=st.integers(1, 40), interval=st.integers(1, 12))
def test_block_j_is_number_j_times_interval_plus_1(layers: int, interval: int) -> None:
    config = replace(with_llm(CONFIGS["X"], num_layers=layers), cross_attention=CrossAttentionConfig(interval=interval))
    combined = combined_layers(config)
    places = [i for i, layer in enumerate(combined) if layer.is_cross]
    assert places == [j * (interval + 1) for j in range(len(config.cross_layers))]
    others = [layer.source for layer in combined if not layer.is_cross]
    assert others == [f"language_model.model.layers.{i}" for i in range(layers)]


@pytest.mark.parametrize("config", [*CONFIGS.values(), *VARIANTS.values()], ids=lambda c: c.name)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_every_tensor_of_the_llm_is_used(config: NvlmConfig, tp: int, pp: int) -> None:
    """Once, but for tied embeddings, which are two tensors of the ranks; every row and column has its place."""
    mapping = Mapping(tp, pp)
    try:
        mapping.check(config)
    except EngineError:
        mapping = Mapping(tp, 1)
    used: dict[str, int] = {}
    for stage in range(mapping.pp):
        for tensor in stage_tensors(config, mapping, LlmQuantization(), stage):
            assert isinstance(tensor, FloatTensor)
            for part in tensor.parts:
                used[part.source] = used.get(part.source, 0) + 1
                shape = checkpoint_layout(config)[part.source]
                assert set().union(*(piece.rows for piece in part.pieces)) == set(range(shape[0]))
                columns = [piece.columns for piece in part.pieces if piece.columns is not None]
                assert not columns or set().union(*columns) == set(range(shape[1]))
    expected = dict.fromkeys(llm_layout(config) | cross_layout(config), 1)
    if config.llm.tie_word_embeddings:
        expected[EMBEDDING] = 2
    assert used == expected


@given(
    kv_heads=st.integers(1, 12),
    shared=st.integers(1, 8),
    tp=st.integers(1, 24),
    head_dim=st.sampled_from([2, 6]),
)
def test_a_query_head_meets_its_key_value_head(kv_heads: int, shared: int, tp: int, head_dim: int) -> None:
    """Query head g of the model reads key/value head g // shared; on a rank, local head h reads h // (local shared)."""
    heads = kv_heads * shared
    llm = LlmConfig(
        family="qwen2", hidden_size=8, num_layers=1, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=24 * tp,
        vocab_size=4, rope_theta=1e4, head_dim=head_dim,
    )  # fmt: skip
    config = replace(CONFIGS["D"], llm=llm, image_token_id=None)
    mapping = Mapping(tp, 1)
    try:
        mapping.check(config)
    except EngineError:
        assume(False)
    (qkv,) = [t for t in stage_tensors(config, mapping, LlmQuantization(), 0) if t.name.endswith("qkv.weight")]
    assert isinstance(qkv, FloatTensor)
    query, key, value = qkv.parts
    for t in range(tp):
        of_query, of_key, of_value = (part.pieces[t] for part in (query, key, value))
        local, local_kv = len(of_query.rows) // head_dim, len(of_key.rows) // head_dim
        assert of_key.rows == of_value.rows
        assert (of_query.first, of_key.first, of_value.first) == (
            0,
            local * head_dim,
            (local + local_kv) * head_dim,
        )
        for h in range(local):
            read = of_key.rows.start // head_dim + h // (local // local_kv)
            assert read == (of_query.rows.start // head_dim + h) // shared
