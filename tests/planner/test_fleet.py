"""Tests the planner of engines on several GPUs against figures counted by hand, and by properties of the split."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_trt.backends.table import find_backend
from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.parallel import check_parallel, pipeline_sizes, stacked_layers, tensor_sizes
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.fleet import FleetPlan, plan_fleet, splits, what_fits
from nvlm_trt.planner.fleet_times import FleetTimes
from nvlm_trt.planner.gpus import GPUS, check_gpu, find_gpu
from nvlm_trt.planner.shards import Shard, StageShards
from nvlm_trt.planner.step_times import time_of_prompt

SPEC = find_backend("tensorrt-llm")
LIMITS = EngineLimits(max_slots=8, max_seq_len=4096, max_image_tokens=7168, max_tiles=6)
TAG_LENGTH = 1
models = st.sampled_from(sorted(PRESETS))
precisions_of = st.sampled_from(sorted(SPEC.precisions.names))


def design_of(name: str, precision: str, limits: EngineLimits = LIMITS) -> EngineDesign:
    return EngineDesign(PRESETS[name], limits, SPEC.precisions.parse(precision), SPEC, TAG_LENGTH)


def fleet(name: str, precision: str, tp: int, pp: int, limits: EngineLimits = LIMITS) -> FleetPlan:
    return plan_fleet(design_of(name, precision, limits), tp, pp)


def shards(config: NvlmConfig, precision: str, tp: int, pp: int) -> list[list[Shard]]:
    return [list(StageShards(config, SPEC.precisions.parse(precision), tp, pp, stage)) for stage in range(pp)]


# --- by hand -----------------------------------------------------------------------------------------------------


def test_weights_of_nvlm_d_72b_on_four_gpus() -> None:
    hidden, ffn, vocabulary, layers, heads, kv_heads, head = 8192, 29568, 152064, 80, 64, 8, 128
    qkv = (heads + 2 * kv_heads) * head
    layer = qkv * hidden + qkv + hidden * heads * head + 3 * hidden * ffn
    replicated = layers * 2 * hidden + hidden + vocabulary * hidden  # norms, and the embedding table
    (stage,) = fleet("nvlm-d-72b", "bf16", 4, 1).stages
    assert stage.weights == 2 * ((layers * layer + vocabulary * hidden) // 4 + replicated)
    assert stage.kv_per_request == 2 * 80 * 8 * 128 * 2 * 4096 // 4
    assert fleet("nvlm-d-72b", "fp8", 4, 1).stages[0].kv_per_request == 2 * 80 * 8 * 128 * 4096 // 4
    assert stage.prompt_table == 8 * 2 * 7 * 256 * hidden * 2  # 2 images of 7 tiles per request in 4096 tokens


def test_stages_of_nvlm_x_72b() -> None:
    """90 layers with the 10 blocks; the blocks stand at 0, 9, ..., 81, so 5 of them are in each half."""
    first, last = fleet("nvlm-x-72b", "bf16", 4, 2).stages
    assert (first.layers, last.layers) == (45, 45)
    assert first.kv_per_request == last.kv_per_request == 2 * 40 * 2 * 128 * 2 * 4096
    assert first.cross_kv_per_request == 2 * 5 * 2 * 128 * 2 * 7168
    assert first.prompt_table == last.vision_encoder == 0
    positions = [place for place, (kind, _) in enumerate(stacked_layers(PRESETS["nvlm-x-72b"])) if kind == "cross"]
    assert positions == list(range(0, 90, 9))


def test_bytes_of_quantised_weights() -> None:
    def nbytes(precision: str, name: str) -> int:
        (stage,) = shards(PRESETS["nvlm-d-72b"], precision, 4, 1)
        return next(shard.nbytes for shard in stage if shard.name == f"layers.0.mlp.{name}.weight")

    width, hidden = 29568 // 4, 8192
    padded = 29696 // 4
    assert nbytes("fp8", "fc") == width * hidden + 8
    assert nbytes("int8", "fc") == width * hidden + 4 * width + 4 + 2 * hidden
    assert nbytes("int8-weight-only", "fc") == padded * hidden + 2 * padded
    assert nbytes("int4-weight-only", "proj") == padded * hidden // 2 + 2 * hidden


def test_attention_of_a_block_is_not_quantised() -> None:
    (stage,) = shards(PRESETS["nvlm-x-tiny"], "fp8", 1, 1)
    kinds = Counter(
        ("cross_attention" in shard.name, "attention" in shard.name, shard.quantised)
        for shard in stage
        if shard.name.endswith(("qkv.weight", "fc.weight"))
    )
    assert kinds[True, True, False] == 3  # blocks
    assert kinds[False, True, True] == 6  # layers
    assert kinds[False, False, True] == 9  # FFNs


def test_a_decoding_step_on_one_gpu_reads_the_weights() -> None:
    time = FleetTimes(design_of("nvlm-d-72b", "bf16"), 1, 1, GPUS["h200"]).decode(1, 1000, 0)
    read = fleet("nvlm-d-72b", "bf16", 1, 1).stages[0].weights - 2 * 152064 * 8192  # embeddings are looked up
    assert time.memory == pytest.approx((read + 1000 * 2 * 80 * 8 * 128 * 2) / (0.75 * 4.8e12))
    assert time.communication == 0
    assert time.seconds == time.memory


def test_all_reduces() -> None:
    """Two per layer on 4 GPUs: 1.5 times [tokens, hidden] in bf16 over NVLink, and a latency."""
    time = FleetTimes(design_of("nvlm-d-72b", "bf16"), 4, 1, GPUS["h100"]).decode(8, 1000, 0)
    assert time.communication == pytest.approx(160 * (1.5 * 8 * 8192 * 2 / (0.7 * 450e9) + 10e-6))
    block = FleetTimes(design_of("nvlm-x-72b", "bf16"), 4, 1, GPUS["h100"]).decode(8, 1000, 0)
    assert block.communication == pytest.approx(180 / 160 * time.communication)


def test_quantised_layers_run_at_their_rate_and_others_in_bf16() -> None:
    """lm_head and attention stay in bf16: 2 multiply-adds per weight, 128 tokens, and 4 per pair, head and channel."""
    hidden, ffn, tokens = 8192, 29568, 128
    linear = 80 * (10240 * hidden + hidden * hidden + 3 * hidden * ffn)
    pairs = tokens * (tokens + 1) / 2
    others = 2 * 152064 * hidden + 80 * 4 * pairs * 64 * 128
    for precision, rate in (("bf16", 989.5e12), ("fp8", 1979e12), ("int8", 1979e12), ("int4-weight-only", 989.5e12)):
        time = time_of_prompt(FleetTimes(design_of("nvlm-d-72b", precision), 2, 1, GPUS["h100"]), tokens, 0)
        expected = (2 * tokens * linear / rate + others / 989.5e12) / 0.6 / 2
        assert time.products == pytest.approx(expected, 1e-6), precision


def test_transfers_between_stages() -> None:
    def messages(pp: int) -> float:
        return FleetTimes(design_of("nvlm-d-72b", "bf16"), 1, pp, GPUS["h100"]).decode(8, 1000, 0).communication

    nbytes = 8 * 8192 * 2
    assert messages(1) == 0
    assert messages(4) == pytest.approx(3 * (nbytes / (0.7 * 450e9) + 10e-6))
    assert messages(16) == pytest.approx(15 * (nbytes / (0.7 * 50e9) + 10e-6))  # over the network


# --- properties --------------------------------------------------------------------------------------------------


@given(name=models, data=st.data())
def test_ranks_together_have_the_whole_model(name: str, data: st.DataObject) -> None:
    """Split tensors add up over ranks and stages, others are whole in every stage that has them."""
    config = PRESETS[name]
    vocabulary, kv_heads = config.llm.vocab_size, config.llm.num_kv_heads
    tp = data.draw(st.sampled_from([t for t in tensor_sizes(config) if t <= kv_heads and vocabulary % t == 0]))
    pp = data.draw(st.sampled_from(pipeline_sizes(config)))
    layout = checkpoint_layout(config)
    whole = {name: math.prod(shape) for name, shape in layout.items() if name.startswith("language_model.")}
    stages = shards(config, "bf16", tp, pp)
    elements = sum(shard.elements * (tp if shard.split else 1) for stage in stages for shard in stage)
    tied = config.llm.tie_word_embeddings * vocabulary * config.llm.hidden_size  # TensorRT-LLM has both tables
    assert elements == sum(whole.values()) + tied


@settings(max_examples=50)
@given(name=models, precision=precisions_of, data=st.data())
def test_more_gpus_never_need_more_memory_each(name: str, precision: str, data: st.DataObject) -> None:
    config = PRESETS[name]
    pp = data.draw(st.sampled_from(pipeline_sizes(config)[:4]))
    few, many = sorted(data.draw(st.lists(st.sampled_from(tensor_sizes(config)), min_size=2, max_size=2)))
    pairs = zip(fleet(name, precision, few, pp).stages, fleet(name, precision, many, pp).stages, strict=True)
    for one, other in pairs:
        for field in dataclasses.fields(one):
            assert getattr(other, field.name) <= getattr(one, field.name), field.name


@settings(max_examples=20)
@given(name=models, gpu=st.sampled_from(sorted(GPUS)), share=st.floats(0.5, 1))
def test_what_fits_does_fit_and_is_the_smallest(name: str, gpu: str, share: float) -> None:
    config, device = PRESETS[name], GPUS[gpu]
    for choice in what_fits(design_of(name, "bf16"), device, share):
        plan = fleet(name, choice.precision, choice.tp, choice.pp)
        assert plan.requests_that_fit(device.memory.value, share) == choice.requests >= 1
        worst = max(stage.total(choice.requests) for stage in plan.stages)
        assert worst <= share * device.memory.value < max(stage.total(choice.requests + 1) for stage in plan.stages)
        if choice.tp > 1 and choice.tp // 2 in tensor_sizes(config):
            half = fleet(name, choice.precision, choice.tp // 2, choice.pp)
            assert half.requests_that_fit(device.memory.value, share) < 1


@given(name=models, tp=st.integers(1, 70), pp=st.integers(1, 100))
def test_a_split_that_is_not_even(name: str, tp: int, pp: int) -> None:
    config = PRESETS[name]
    layers = len(stacked_layers(config))
    if tp in tensor_sizes(config) and pp in pipeline_sizes(config):
        assert config.llm.num_heads % tp == 0
        assert layers % pp == 0
        check_parallel(config, tp, pp)
    else:
        wrong, sizes = ("--tp", tensor_sizes) if tp not in tensor_sizes(config) else ("--pp", pipeline_sizes)
        listed = ", ".join(map(str, sizes(config)))
        with pytest.raises(EngineError, match=rf"^{wrong} \d+ does not split .* evenly|equal stages; choose one of"):
            check_parallel(config, tp, pp)
        with pytest.raises(EngineError, match=f"choose one of {listed}$"):
            check_parallel(config, tp, pp)


# --- GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_figure_has_a_source(gpu: object) -> None:
    for name, figure in gpu.figures.items():  # type: ignore[attr-defined]
        assert figure.value > 0, name
        assert "https://" in figure.source, name
        assert "nvidia.com" in figure.source, name


def test_figures() -> None:
    """The ratios that NVIDIA's sheets have in common."""
    for gpu in GPUS.values():
        assert gpu.rate("int8") >= 2 * gpu.rate("bf16") - 1e13
        assert gpu.rate("int8-weight-only") == gpu.rate("bf16") == gpu.rate("fp16")
        assert ("fp8" in gpu.rates) == (gpu.capability >= 89)
    assert GPUS["h200"].rate("fp8") == 1979e12
    with pytest.raises(EngineError, match="'v100' is not one of: h100, h200"):
        find_gpu("v100")


@pytest.mark.parametrize(
    ("gpu", "precision", "split", "message"),
    [
        ("a100", "fp8", True, "8.9 or newer.*choose int8 or bf16"),
        ("a100", "fp8", False, "8.9 or newer"),
        ("b200", "int8", True, "no kernels for int8 on B200.*choose fp8 or bf16"),
        ("b200", "int8-weight-only", True, "no kernels for int8-weight-only"),
        ("b200", "bf16,decoder=int4-weight-only", True, "no kernels for int4-weight-only"),
        ("b200", "int8", False, None),
        ("b200", "fp8", True, None),
        ("rtx-5090", "int4-weight-only", True, None),
        ("l40s", "fp8", True, None),
        ("a100", "int8", True, None),
    ],
)
def test_precisions_that_a_gpu_refuses(gpu: str, precision: str, split: bool, message: str | None) -> None:
    precisions = SPEC.precisions.parse(precision)
    if message is None:
        check_gpu(GPUS[gpu], precisions, split, crosses=False)
    else:
        with pytest.raises(EngineError, match=message):
            check_gpu(GPUS[gpu], precisions, split, crosses=False)


@pytest.mark.parametrize(("gpu", "runs"), [("h100", True), ("l40s", True), ("b200", False), ("rtx-5090", False)])
def test_gpus_without_masked_cross_attention(gpu: str, runs: bool) -> None:
    precisions = SPEC.precisions.parse("bf16")
    check_gpu(GPUS[gpu], precisions, split=True, crosses=False)
    check_gpu(GPUS[gpu], precisions, split=False, crosses=True)
    if runs:
        check_gpu(GPUS[gpu], precisions, split=True, crosses=True)
    else:
        with pytest.raises(EngineError, match="masks no cross-attention on .*; choose h100"):
            check_gpu(GPUS[gpu], precisions, split=True, crosses=True)


def test_a_backend_with_the_options_is_split() -> None:
    assert splits(SPEC)
    assert not splits(dataclasses.replace(SPEC, build_options={}))
