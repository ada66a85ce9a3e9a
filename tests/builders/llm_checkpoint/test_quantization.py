"""Scales of the ranks' tensors, what is excluded, and precisions that one checkpoint cannot combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from split_models import CONFIGS, SplitModel

from nvlm_trt.builders.quantization.smoothquant import Factors
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm_checkpoint import LlmQuantization, llm_quantization
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import CrossAttentionConfig
from nvlm_trt.model.precision import COMPONENTS

Models = Callable[[str], SplitModel]
PLAIN = dict.fromkeys(COMPONENTS, "bf16")


def choose(model: SplitModel, mapping: Mapping | None = None, **precisions: str) -> LlmQuantization:
    return llm_quantization(model.config, mapping or Mapping(), model.recipe({**PLAIN, **precisions}, 0.5))


def test_algorithms(split_model: Models) -> None:
    model = split_model("D")
    found = {
        name: choose(model, decoder=name)
        for name in ("bf16", "fp16", "fp8", "int8", "int8-weight-only", "int4-weight-only")
    }
    assert {name: (each.algo, each.kv_cache) for name, each in found.items()} == {
        "bf16": (None, None),
        "fp16": (None, None),
        "fp8": ("FP8", "FP8"),
        "int8": ("W8A8_SQ_PER_CHANNEL", None),
        "int8-weight-only": ("W8A16", None),
        "int4-weight-only": ("W4A16", None),
    }
    assert [name for name, each in found.items() if each.factors] == ["int8"]
    for crossing in ("X", "H"):
        assert choose(split_model(crossing), decoder="fp8", cross_attention="fp8").kv_cache is None


@pytest.mark.parametrize("component", ["vision_encoder", "projector", "lm_head"])
def test_other_components_stay_in_floating_point(split_model: Models, component: str) -> None:
    with pytest.raises(EngineError, match=f"{component}=fp8: TensorRT-LLM engines compute {component} in floating"):
        choose(split_model("D"), decoder="fp8", **{component: "fp8"})


def test_one_algorithm_for_all_layers(split_model: Models) -> None:
    with pytest.raises(EngineError, match="cross_attention=int8 with decoder=fp8: TensorRT-LLM has one algorithm"):
        choose(split_model("X"), decoder="fp8", cross_attention="int8")
    assert choose(split_model("D"), decoder="fp8", cross_attention="int8").algo == "FP8"  # D has no such component


def test_blocks_are_excluded_by_their_place_in_every_stage(split_model: Models) -> None:
    """Interval 2 puts blocks at 0 and 3 of 6 layers: at 0 of both stages. Interval 3 puts them at 0 and 4."""
    model = split_model("X")
    even = replace(model.config, cross_attention=CrossAttentionConfig(interval=2))
    recipe = model.recipe({**PLAIN, "decoder": "int8-weight-only"})
    made = llm_quantization(even, Mapping(1, 2), recipe)
    assert made.excluded(even) == ("*lm_head", "*vocab_embedding", "*cross_attention*", "*layers.0.mlp*")
    assert not made.covers("transformer.layers.0.mlp.fc", even)
    assert made.covers("transformer.layers.1.mlp.fc", even)
    with pytest.raises(EngineError, match="--pp 2 puts cross-attention blocks at other places"):
        llm_quantization(model.config, Mapping(1, 2), recipe)


def test_names_of_two_digits_are_not_mixed_up() -> None:
    quantization = LlmQuantization("W8A16", exclude_modules=("*layers.1.mlp*",))
    assert not quantization.covers("transformer.layers.1.mlp.fc", CONFIGS["X"])
    assert quantization.covers("transformer.layers.11.mlp.fc", CONFIGS["X"])
    assert not quantization.covers("transformer.layers.11.cross_attention.qkv", CONFIGS["X"])


def test_smoothquant_leaves_the_blocks_attention_alone(split_model: Models) -> None:
    factors = choose(split_model("X"), decoder="int8", cross_attention="int8").factors
    of_blocks = {name.split(".", 3)[3] for name in factors if "cross_layers" in name}
    assert of_blocks == {
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }


def test_fp8_has_one_scale_for_qkv_and_one_for_fc_and_gate(tmp_path: Path, split_model: Models) -> None:
    model, mapping = split_model("D"), Mapping(4, 1)
    model.write(tmp_path, model.quantization("fp8", mapping), mapping)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(4)]
    weights = model.reference.state_dict()
    layer = "language_model.model.layers.2"
    for ours, parts in {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.gate": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.proj": ("mlp.down_proj",),
    }.items():
        largest = max(float(weights[f"{layer}.{part}.weight"].abs().max()) for part in parts)
        for rank in ranks:
            scale = rank[f"transformer.layers.2.{ours}.weights_scaling_factor"]
            torch.testing.assert_close(scale, torch.tensor([largest / 448]), rtol=1e-6, atol=0)
            assert torch.equal(rank["transformer.layers.2.attention.kv_cache_scaling_factor"], torch.ones(1))
    whole = max(float(rank["transformer.layers.2.mlp.proj.weight"].float().abs().max()) for rank in ranks)
    assert whole == 448


def test_values_beyond_fp16_are_an_error(tmp_path: Path, split_model: Models) -> None:
    """bfloat16 reaches 3e38, float16 65504."""
    model = split_model("D")
    factors = {"language_model.model.layers.1.input_layernorm.weight": Factors(rows=np.full(256, 1e-6, np.float32))}
    name = r"language_model\.model\.layers\.1\.input_layernorm\.weight"
    with pytest.raises(EngineError, match=name + r" has -?\d.* at \[0\], and fp16 ends at 65504; choose bf16"):
        model.write(tmp_path, LlmQuantization(factors=factors), Mapping(), dtype="fp16")
    model.write(tmp_path, LlmQuantization(factors=factors), Mapping(), dtype="bf16")


def test_a_calibration_without_a_layer_names_the_layer(tmp_path: Path, split_model: Models) -> None:
    model = split_model("X")
    linears = dict(model.calibration.linears)
    del linears["language_model.cross_layers.1.mlp.down_proj"]
    short = model.calibration.model_copy(update={"linears": linears})
    with pytest.raises(EngineError, match=r"lacks the linear layer language_model\.cross_layers\.1\.mlp\.down_proj"):
        model.write(tmp_path, LlmQuantization("FP8", "FP8", calibration=short), Mapping())


def test_a_weight_of_zeros_has_a_scale(tmp_path: Path, split_model: Models) -> None:
    """A scale of 0 would divide by 0."""
    model = split_model("D")
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    factors = {name: Factors(columns=np.zeros(320, np.float32))}
    for algo in ("FP8", "W8A8_SQ_PER_CHANNEL"):
        quantization = LlmQuantization(algo, calibration=model.calibration, factors=factors)
        model.write(tmp_path, quantization, Mapping())
        rank = load_file(tmp_path / "rank0.safetensors")
        assert (rank["transformer.layers.0.mlp.proj.weights_scaling_factor"] == 1).all()
        assert not rank["transformer.layers.0.mlp.proj.weight"].float().any()
