"""The pinned table against tables written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from split_models import CONFIGS, VARIANTS

from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.tensorrt_llm.layout import checkpoint_config, rank_layout
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm.quantization import LlmQuantization
from nvlm_trt.errors import EngineError
from nvlm_trt.model.presets import PRESETS

CALIBRATION = Calibration(checkpoint_digest="", samples={}, linears={})
FP8 = LlmQuantization("FP8", "FP8", calibration=CALIBRATION)
INT8 = LlmQuantization("W8A8_SQ_PER_CHANNEL", calibration=CALIBRATION)
QWEN2_72B = {
    "architecture": "Qwen2ForCausalLM",
    "dtype": "bfloat16",
    "logits_dtype": "float32",
    "vocab_size": 152064,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_size": 128,
    "intermediate_size": 29568,
    "hidden_act": "silu",
    "norm_epsilon": 1e-6,
    "position_embedding_type": "rope_gpt_neox",
    "rotary_base": 1000000.0,
    "max_position_embeddings": 32768,
    "qwen_type": "qwen2",
    "seq_length": 32768,
    "attn_bias": True,
    "mlp_bias": False,
    "use_logn_attn": False,
    "tie_word_embeddings": False,
    "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
    "quantization": {
        "quant_algo": None,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["*lm_head", "*vocab_embedding"],
    },
}


def test_config_of_nvlm_d_72b() -> None:
    made = checkpoint_config(PRESETS["nvlm-d-72b"], Mapping(2, 2), LlmQuantization(), 0, "bf16")
    assert made == QWEN2_72B
    assert isinstance(made["rotary_base"], float)


@pytest.mark.parametrize("letter", ["X", "H"])
def test_config_of_nvlm_x_and_h_72b(letter: str) -> None:
    made = checkpoint_config(PRESETS[f"nvlm-{letter.lower()}-72b"], Mapping(8, 1), FP8, 12345, "fp16")
    cross = [0, 9, 18, 27, 36, 45, 54, 63, 72, 81]
    assert made == {
        **QWEN2_72B,
        "architecture": f"NVLM_{letter}",
        "dtype": "float16",
        "num_hidden_layers": 90,
        "cross_attention": True,
        "skip_cross_attn_blocks": True,
        "cross_attention_layers": cross,
        "num_kv_heads_per_layer": [0 if i in cross else 8 for i in range(90)],
        "num_kv_heads_per_cross_attn_layer": [8 if i in cross else 0 for i in range(90)],
        "cross_attention_ffn": True,
        "cross_attention_qk_norm": False,
        "max_encoder_input_len": 12345,
        "mapping": {"world_size": 8, "tp_size": 8, "pp_size": 1},
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["*lm_head", "*vocab_embedding", "*cross_attention*"],
        },
    }


def test_config_of_a_llama() -> None:
    made = checkpoint_config(VARIANTS["Llama, tied"], Mapping(), LlmQuantization(), 0, "bf16")
    assert made["architecture"] == "LlamaForCausalLM"
    assert not {"qwen_type", "seq_length", "use_logn_attn"} & made.keys()
    assert made["attn_bias"] is False
    assert made["tie_word_embeddings"] is False  # lm_head is a tensor of its own


@pytest.mark.parametrize(("tp", "width"), [(1, 29568), (2, 29568), (4, 29696), (8, 29696)])
def test_weight_only_widens_the_ffn(tp: int, width: int) -> None:
    config, mapping, quantization = PRESETS["nvlm-d-72b"], Mapping(tp), LlmQuantization("W4A16")
    assert checkpoint_config(config, mapping, quantization, 0, "bf16")["intermediate_size"] == width
    layout = rank_layout(config, mapping, quantization, 0)
    assert layout["transformer.layers.79.mlp.fc.weight"] == ((width // tp, 8192), "BF16")
    assert layout["transformer.layers.79.mlp.proj.weight"] == ((8192, width // tp), "BF16")


def test_weight_only_refuses_narrow_layers() -> None:
    with pytest.raises(EngineError, match="multiples of 128 channels, the LLM's hidden size has 192"):
        checkpoint_config(PRESETS["nvlm-d-tiny"], Mapping(2), LlmQuantization("W8A16"), 0, "bf16")


def test_qk_norm_needs_shared_key_heads() -> None:
    config = VARIANTS["X without FFN, with qk-norm"]
    checkpoint_config(config, Mapping(4), LlmQuantization(), 1, "bf16")
    with pytest.raises(EngineError, match="--tp 8 leaves a rank as many key heads as query heads"):
        checkpoint_config(config, Mapping(8), LlmQuantization(), 1, "bf16")


def test_blocks_need_an_image() -> None:
    with pytest.raises(EngineError, match="0 cross-attended tokens"):
        checkpoint_config(CONFIGS["X"], Mapping(), LlmQuantization(), 0, "bf16")


# X at --tp 4 --pp 2: hidden 256, 8 heads and 2 key/value heads of 32, FFN 320, vocabulary 514, blocks at 0 and 4 of 6
PLAIN_LAYER = {
    "input_layernorm.weight": ((256,), "BF16"),
    "attention.qkv.weight": ((128, 256), "BF16"),
    "attention.qkv.bias": ((128,), "BF16"),
    "attention.dense.weight": ((256, 64), "BF16"),
    "post_layernorm.weight": ((256,), "BF16"),
    "mlp.fc.weight": ((80, 256), "BF16"),
    "mlp.gate.weight": ((80, 256), "BF16"),
    "mlp.proj.weight": ((256, 80), "BF16"),
}
PLAIN_BLOCK = {
    "input_layernorm.weight": ((256,), "BF16"),
    "cross_attention.qkv.weight": ((128, 256), "BF16"),
    "cross_attention.dense.weight": ((256, 64), "BF16"),
    "gate_attn": ((1,), "BF16"),
    "post_layernorm.weight": ((256,), "BF16"),
    "mlp.fc.weight": ((80, 256), "BF16"),
    "mlp.gate.weight": ((80, 256), "BF16"),
    "mlp.proj.weight": ((256, 80), "BF16"),
    "gate_ffwd": ((1,), "BF16"),
}
FP8_MLP = {
    "mlp.fc.weight": ((80, 256), "F8_E4M3"),
    "mlp.fc.activation_scaling_factor": ((1,), "F32"),
    "mlp.fc.weights_scaling_factor": ((1,), "F32"),
    "mlp.gate.weight": ((80, 256), "F8_E4M3"),
    "mlp.gate.activation_scaling_factor": ((1,), "F32"),
    "mlp.gate.weights_scaling_factor": ((1,), "F32"),
    "mlp.proj.weight": ((256, 80), "F8_E4M3"),
    "mlp.proj.activation_scaling_factor": ((1,), "F32"),
    "mlp.proj.weights_scaling_factor": ((1,), "F32"),
}
FP8_LAYER = {
    **PLAIN_LAYER,
    **FP8_MLP,
    "attention.qkv.weight": ((128, 256), "F8_E4M3"),
    "attention.qkv.activation_scaling_factor": ((1,), "F32"),
    "attention.qkv.weights_scaling_factor": ((1,), "F32"),
    "attention.dense.weight": ((256, 64), "F8_E4M3"),
    "attention.dense.activation_scaling_factor": ((1,), "F32"),
    "attention.dense.weights_scaling_factor": ((1,), "F32"),
    "attention.kv_cache_scaling_factor": ((1,), "F32"),
}
FP8_BLOCK = {**PLAIN_BLOCK, **FP8_MLP, "cross_attention.kv_cache_scaling_factor": ((1,), "F32")}
INT8_MLP = {
    "mlp.fc.weight": ((80, 256), "I8"),
    "mlp.fc.activation_scaling_factor": ((1,), "F32"),
    "mlp.fc.weights_scaling_factor": ((80,), "F32"),
    "mlp.fc.prequant_scaling_factor": ((256,), "BF16"),
    "mlp.gate.weight": ((80, 256), "I8"),
    "mlp.gate.activation_scaling_factor": ((1,), "F32"),
    "mlp.gate.weights_scaling_factor": ((80,), "F32"),
    "mlp.gate.prequant_scaling_factor": ((256,), "BF16"),
    "mlp.proj.weight": ((256, 80), "I8"),
    "mlp.proj.activation_scaling_factor": ((1,), "F32"),
    "mlp.proj.weights_scaling_factor": ((256,), "F32"),
    "mlp.proj.prequant_scaling_factor": ((80,), "BF16"),
}
INT8_LAYER = {
    **PLAIN_LAYER,
    **INT8_MLP,
    "attention.qkv.weight": ((128, 256), "I8"),
    "attention.qkv.activation_scaling_factor": ((1,), "F32"),
    "attention.qkv.weights_scaling_factor": ((128,), "F32"),
    "attention.qkv.prequant_scaling_factor": ((256,), "BF16"),
    "attention.dense.weight": ((256, 64), "I8"),
    "attention.dense.activation_scaling_factor": ((1,), "F32"),
    "attention.dense.weights_scaling_factor": ((256,), "F32"),
    "attention.dense.prequant_scaling_factor": ((64,), "BF16"),
}


@pytest.mark.parametrize(
    ("quantization", "layer", "block"),
    [
        (LlmQuantization(), PLAIN_LAYER, PLAIN_BLOCK),
        (FP8, FP8_LAYER, FP8_BLOCK),
        (INT8, INT8_LAYER, {**PLAIN_BLOCK, **INT8_MLP}),
    ],
    ids=["bf16", "fp8", "int8"],
)
def test_tensors_of_a_rank(quantization: LlmQuantization, layer: dict[str, object], block: dict[str, object]) -> None:
    """The first stage is block, layer, layer; the second is layer, block, layer."""
    for rank in range(8):
        first = rank < 4
        kinds = (block, layer, layer) if first else (layer, block, layer)
        expected = {
            f"transformer.layers.{i}.{name}": spec for i, kind in enumerate(kinds) for name, spec in kind.items()
        }
        if first:
            expected["transformer.vocab_embedding.weight"] = ((514, 256), "BF16")
        else:
            expected["transformer.ln_f.weight"] = ((256,), "BF16")
            expected["lm_head.weight"] = ((129, 256), "BF16")
        assert rank_layout(CONFIGS["X"], Mapping(4, 2), quantization, rank) == expected


def test_the_floating_type_is_that_of_all_unquantised_tensors() -> None:
    plain = rank_layout(CONFIGS["X"], Mapping(), FP8, 0, "bf16")
    half = rank_layout(CONFIGS["X"], Mapping(), FP8, 0, "fp16")
    assert half == {name: spec._replace(dtype="F16") if spec.dtype == "BF16" else spec for name, spec in plain.items()}


def test_a_block_without_ffn_and_with_qk_norm() -> None:
    layout = rank_layout(VARIANTS["X without FFN, with qk-norm"], Mapping(), LlmQuantization(), 0)
    names = {name.removeprefix("transformer.layers.0.") for name in layout if ".layers.0." in name}
    assert names == {
        "input_layernorm.weight",
        "cross_attention.qkv.weight",
        "cross_attention.dense.weight",
        "cross_attention.q_layernorm.weight",
        "cross_attention.k_layernorm.weight",
        "gate_attn",
    }
    assert layout["transformer.layers.0.cross_attention.q_layernorm.weight"] == ((32,), "BF16")


def test_excluded_modules_stay_as_they_are() -> None:
    without = replace(FP8, exclude_modules=("*layers.0.mlp*",))
    layout = rank_layout(CONFIGS["X"], Mapping(4, 1), without, 0)
    block = {name.removeprefix("transformer.layers.0.") for name in layout if ".layers.0." in name}
    assert block == PLAIN_BLOCK.keys() | {"cross_attention.kv_cache_scaling_factor"}
    assert layout["transformer.layers.1.mlp.fc.weight"].dtype == "F8_E4M3"
