"""Compares the planner of split engines with the table of the checkpoint writer, which knows nothing of the planner."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_trt.backends.table import find_backend
from nvlm_trt.builders.graphs.common import Unquantised
from nvlm_trt.builders.quantization.formats import Recipe
from nvlm_trt.builders.tensorrt_llm.layout import ITEM_BYTES, ffn_width, rank_layout
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm.quantization import LlmQuantization, llm_quantization
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.parallel import MOST_GPUS, check_parallel, pipeline_sizes, tensor_sizes
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.shards import StageShards

BACKEND = find_backend("tensorrt-llm")
SCALES = ("_scaling_factor",)


def quantization_of(precision: str, config: NvlmConfig) -> LlmQuantization:
    recipe = Recipe(BACKEND.precisions.parse(precision), Unquantised())
    return llm_quantization(config, Mapping(), recipe)


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(PRESETS)), precision=st.sampled_from(["bf16", "fp8", "int8"]), data=st.data())
def test_bytes_are_those_of_the_ranks_files(name: str, precision: str, data: st.DataObject) -> None:
    config = PRESETS[name]
    mapping = Mapping(
        data.draw(st.sampled_from(tensor_sizes(config))), data.draw(st.sampled_from(pipeline_sizes(config)))
    )
    stage = data.draw(st.integers(0, mapping.pp - 1))
    rank = mapping.rank(stage, data.draw(st.integers(0, mapping.tp - 1)))
    layout = rank_layout(config, mapping, quantization_of(precision, config), rank)
    written = {name: math.prod(spec.shape) * ITEM_BYTES[spec.dtype] for name, spec in layout.items()}
    precisions = BACKEND.precisions.parse(precision)
    shards = list(StageShards(config, precisions, mapping.tp, mapping.pp, stage))
    assert sum(shard.nbytes for shard in shards) == sum(written.values())
    # by name, scales with their weight
    names = {name.removeprefix("transformer.") for name in written if not name.endswith(SCALES) or "kv_cache" in name}
    assert {shard.name for shard in shards} == names


@pytest.mark.parametrize("precision", ["int8-weight-only", "int4-weight-only"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_weight_only_layers_have_the_writers_width(precision: str, tp: int) -> None:
    config, mapping = PRESETS["nvlm-d-72b"], Mapping(tp)
    width = ffn_width(config, mapping, quantization_of(precision, config)) // tp
    shards = {shard.name: shard for shard in StageShards(config, BACKEND.precisions.parse(precision), tp, 1, 0)}
    bits = {"int8-weight-only": 8, "int4-weight-only": 4}[precision]
    assert shards["layers.0.mlp.fc.weight"].nbytes == width * 8192 * bits // 8 + 2 * width


@given(name=st.sampled_from(sorted(PRESETS)), tp=st.integers(1, MOST_GPUS), pp=st.integers(1, MOST_GPUS))
def test_the_planner_and_the_writer_refuse_the_same_splits(name: str, tp: int, pp: int) -> None:
    config = PRESETS[name]
    try:
        Mapping(tp, pp).check(config)
    except EngineError:
        with pytest.raises(EngineError):
            check_parallel(config, tp, pp)
    else:
        check_parallel(config, tp, pp)
