"""config.json <-> NvlmConfig: presets, NVLM-D-72B as published, keys that are refused, malformed files."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nvlm_trt.errors import ConfigError
from nvlm_trt.model.config import CrossAttentionConfig
from nvlm_trt.model.hf_config import config_from_hf, config_to_hf, read_config
from nvlm_trt.model.presets import PRESETS

# The values of nvidia/NVLM-D-72B's config.json, without the generation defaults that transformers 4 wrote into it.
PUBLISHED_D_72B: dict[str, Any] = {
    "architectures": ["NVLM_D"],
    "auto_map": {"AutoConfig": "configuration_nvlm_d.NVLM_D_Config", "AutoModel": "modeling_nvlm_d.NVLM_D_Model"},
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "llm_config": {
        "_name_or_path": "Qwen/Qwen2-72B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 8192,
        "initializer_range": 0.02,
        "intermediate_size": 29568,
        "max_position_embeddings": 32768,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 3.0, "type": "dynamic"},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 152064,
    },
    "max_dynamic_patch": 6,
    "min_dynamic_patch": 1,
    "model_type": "NVLM_D",
    "ps_version": "v2",
    "select_layer": -1,
    "template": "chatml",
    "torch_dtype": "bfloat16",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 3200,
        "image_size": 448,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "intermediate_size": 12800,
        "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b",
        "norm_type": "rms_norm",
        "num_attention_heads": 25,
        "num_channels": 3,
        "num_hidden_layers": 45,
        "patch_size": 14,
        "qk_normalization": True,
        "qkv_bias": False,
        "use_flash_attn": True,
    },
}


def changed(path: str, value: Any, raw: dict[str, Any] = PUBLISHED_D_72B) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    section: Any = raw
    *parents, key = path.split(".")
    for parent in parents:
        section = section[parent]
    section[key] = value
    return raw


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name: str) -> None:
    config = replace(PRESETS[name], image_token_id=7, pixel_shuffle="v1", projector_hidden_size=None)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_options_survive_a_round_trip() -> None:
    tiny = PRESETS["nvlm-h-tiny"]
    assert tiny.cross_attention is not None
    config = replace(
        tiny,
        vision=replace(tiny.vision, norm_type="layer_norm", qk_norm=False, qkv_bias=True, norm_eps=1e-5),
        llm=replace(tiny.llm, family="llama", head_dim=64, tie_word_embeddings=True),
        cross_attention=replace(tiny.cross_attention, ffn=False, qk_norm=True),
        projector_hidden_size=96,
        max_tiles=12,
    )
    assert config_from_hf(config_to_hf(config)) == config


def test_nvlm_d_72b_as_published() -> None:
    config = config_from_hf(PUBLISHED_D_72B, name="nvlm-d-72b")
    assert config == PRESETS["nvlm-d-72b"]
    assert (config.tokens_per_tile, config.shuffled_size, config.projector_width) == (256, 12800, 29568)
    assert (config.vision.head_dim, config.llm.head_dim, config.tiles_per_image) == (128, 128, 7)


def test_cross_attention_of_the_papers_models() -> None:
    """10 gated blocks, one every 8 (72B) or 6 (34B) layers."""
    assert PRESETS["nvlm-x-72b"].cross_layers == tuple(range(0, 80, 8))
    assert PRESETS["nvlm-h-34b"].cross_layers == tuple(range(0, 60, 6))
    assert PRESETS["nvlm-x-72b"].projector_width is None
    assert PRESETS["nvlm-x-72b"].cross_tokens_per_tile(5) == 256
    assert PRESETS["nvlm-h-72b"].cross_tokens_per_tile(5) == 261


def test_the_llms_model_type_is_not_trusted() -> None:
    assert config_from_hf(PUBLISHED_D_72B).llm.qkv_bias
    llama = changed("llm_config.architectures", ["LlamaForCausalLM"], changed("llm_config.attention_bias", False))
    assert not config_from_hf(llama).llm.qkv_bias


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("downsample_ratio", 0.25),
        ("select_layer", -4),
        ("template", "vicuna"),
        ("ps_version", "v3"),
        ("use_thumbnail", False),
        ("dynamic_image_size", False),
        ("min_dynamic_patch", 2),
        ("pad2square", True),
        ("use_backbone_lora", 16),
        ("use_llm_lora", 16),
        ("quantization_config", {"quant_method": "awq"}),
        ("vision_config.hidden_act", "quick_gelu"),
        ("vision_config.norm_type", "batch_norm"),
        ("vision_config.num_channels", 1),
        ("vision_config.use_absolute_position_embeddings", False),
        ("llm_config.hidden_act", "gelu"),
        ("llm_config.rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("llm_config.use_sliding_window", True),
        ("llm_config.mlp_bias", True),
        ("llm_config.norm_type", "layer_norm"),
        ("llm_config.partial_rotary_factor", 0.5),
        ("llm_config.final_logit_softcapping", 30.0),
        ("llm_config.attn_logit_softcapping", 50.0),
        ("llm_config.num_experts", 8),
        ("llm_config.quantization_config", {"bits": 4}),
        ("llm_config.layer_types", ["full_attention", "sliding_attention"]),
        ("llm_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
        ("llm_config.rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}),
        ("llm_config.rope_parameters.partial_rotary_factor", 0.5),
        ("llm_config.architectures", ["MistralForCausalLM"]),
        ("force_image_size", 224),
        ("model_type", "llava"),
        ("cross_attention_config", {"interval": 8}),
    ],
)
def test_a_key_that_changes_the_maths_is_refused_by_name(path: str, value: Any) -> None:
    raw = copy.deepcopy(PUBLISHED_D_72B)
    raw["llm_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(ConfigError) as caught:
        config_from_hf(changed(path, value, raw))
    assert path.rsplit(".", 1)[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


REQUIRED = {
    "": "model_type vision_config llm_config",
    "vision_config.": "hidden_size num_hidden_layers num_attention_heads intermediate_size norm_type qk_normalization "
    "qkv_bias",
    "llm_config.": "architectures hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size "
    "rope_theta",
}


@pytest.mark.parametrize("path", [where + key for where, keys in REQUIRED.items() for key in keys.split()])
def test_a_missing_key_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        config_from_hf(changed(path, None))


@pytest.mark.parametrize(
    "path",
    [
        "max_dynamic_patch",
        "image_token_id",
        "projector_hidden_size",
        "vision_config.num_hidden_layers",
        "vision_config.patch_size",
        "vision_config.layer_norm_eps",
        "vision_config.qkv_bias",
        "vision_config.qk_normalization",
        "llm_config",
        "llm_config.architectures",
        "llm_config.hidden_size",
        "llm_config.num_attention_heads",
        "llm_config.num_key_value_heads",
        "llm_config.rope_theta",
        "llm_config.rope_parameters",
        "llm_config.tie_word_embeddings",
        "llm_config.layer_types",
        "llm_config.head_dim",
    ],
)
@pytest.mark.parametrize("value", ["8", [8], {"a": 8}, -1, -0.5, float("nan"), float("inf")])
def test_a_value_of_the_wrong_kind_is_a_config_error(path: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        config_from_hf(changed(path, value))


def test_true_is_not_a_number() -> None:
    with pytest.raises(ConfigError, match=r"llm_config.num_hidden_layers = True: .*; correct config.json"):
        config_from_hf(changed("llm_config.num_hidden_layers", True))


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_a_config_that_transformers_5_writes(kind: type[Qwen2Config] | type[LlamaConfig]) -> None:
    theirs = kind(
        architectures=["Qwen2ForCausalLM" if kind is Qwen2Config else "LlamaForCausalLM"],
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
    )
    raw = changed("llm_config", json.loads(theirs.to_json_string(use_diff=False)))
    ours = config_from_hf(changed("image_token_id", 3, raw)).llm
    assert (ours.rope_theta, ours.head_dim, ours.num_kv_heads) == (12345.0, 16, 2)
    assert ours.qkv_bias == (kind is Qwen2Config)


def test_attention_bias_is_refused_for_llama_alone() -> None:
    """transformers' Qwen2 ignores the key and has q, k and v biases; its Llama also adds a bias to o_proj."""
    assert config_from_hf(changed("llm_config.attention_bias", True)).llm.qkv_bias
    with pytest.raises(ConfigError, match="attention_bias"):
        config_from_hf(changed("llm_config.architectures", ["LlamaForCausalLM"]))


def test_dynamic_rope_scaling_changes_nothing_within_max_position_embeddings() -> None:
    """So the key may be dropped. Compares transformers' own tables, with and without it, at the longest sequence."""
    arguments = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    ropes = [{"rope_type": "default"}, {"rope_type": "dynamic", "factor": 3.0}]
    tables = []
    for rope in ropes:
        theirs = LlamaConfig(**arguments, rope_parameters=rope | {"rope_theta": 1e6})
        tables.append(LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(512)[None]))
    assert all(torch.equal(plain, dynamic) for plain, dynamic in zip(*tables, strict=True))
    version_5 = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e6}
    raw = changed("llm_config.rope_scaling", None)
    assert config_from_hf(changed("llm_config.rope_parameters", version_5, raw)) == config_from_hf(PUBLISHED_D_72B)


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "default"}, {"type": "default"}, {"rope_type": "default", "type": "default"}]
)
def test_default_rope_scaling_is_none(scaling: dict[str, str] | None) -> None:
    assert config_from_hf(changed("llm_config.rope_scaling", scaling)) == config_from_hf(PUBLISHED_D_72B)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "type": "yarn"},
        {"rope_type": "default", "mrope_section": [16, 24, 24]},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": ["default"]},
    ],
)
def test_other_rope_scaling_is_refused(scaling: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rope_scaling"):
        config_from_hf(changed("llm_config.rope_scaling", scaling))


def test_x_and_h_need_a_cross_attention_config() -> None:
    raw = config_to_hf(PRESETS["nvlm-x-tiny"])
    for section, word in [(None, "cross_attention_config"), ({}, "interval"), ({"interval": 2, "gate": 1}, "gate")]:
        with pytest.raises(ConfigError, match=word):
            config_from_hf(changed("cross_attention_config", section, raw))
    for section in [{"interval": "2"}, {"interval": 2, "ffn": "no"}]:
        with pytest.raises(ConfigError):
            config_from_hf(changed("cross_attention_config", section, raw))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_config.num_attention_heads", 24),
        ("vision_config.patch_size", 15),
        ("llm_config.num_attention_heads", 60),
        ("llm_config.num_key_value_heads", 7),
        ("llm_config.head_dim", 65),
        ("image_token_id", 152064),
    ],
)
def test_sizes_that_do_not_fit_together(path: str, value: int) -> None:
    with pytest.raises(ConfigError, match=str(value)):
        config_from_hf(changed(path, value))


def test_a_choice_that_there_is_not() -> None:
    """Also for a config made in Python: code that branches on "rms_norm" would treat "rmsnorm" as "layer_norm"."""
    tiny = PRESETS["nvlm-d-tiny"]
    with pytest.raises(ConfigError, match=r"vision_config.norm_type = 'rmsnorm': .*'rms_norm' or 'layer_norm'"):
        replace(tiny.vision, norm_type="rmsnorm")
    with pytest.raises(ConfigError, match=r"llm_config.family = 'qwen3': .*'qwen2' or 'llama'"):
        replace(tiny.llm, family="qwen3")
    with pytest.raises(ConfigError, match=r"ps_version = 'v3': .*'v1' or 'v2'"):
        replace(tiny, pixel_shuffle="v3")
    with pytest.raises(ConfigError, match=r"architecture = 'E': .*'D', 'X' or 'H'"):
        replace(tiny, architecture="E")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("max_dynamic_patch", 0, "max_dynamic_patch = 0: input should be greater than 0; correct config.json"),
        ("projector_hidden_size", "8", "projector_hidden_size = '8': input should be a valid integer; correct"),
        ("vision_config.layer_norm_eps", -1e-6, "vision_config.layer_norm_eps = -1e-06: input should be greater than"),
        ("vision_config.qk_normalization", 1, "vision_config.qk_normalization = 1: input should be a valid boolean"),
        ("llm_config.rms_norm_eps", float("nan"), "llm_config.rms_norm_eps = nan: input should be a finite number"),
        ("llm_config.num_key_value_heads", 8.0, "llm_config.num_key_value_heads = 8.0: input should be a valid int"),
        ("llm_config.head_dim", -2, "llm_config.head_dim = -2: input should be greater than or equal to 0; correct"),
    ],
)
def test_an_error_names_section_key_value_and_remedy(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_hf(changed(path, value))
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("; correct config.json")


def test_an_integer_stays_an_integer() -> None:
    """A checkpoint's digest covers its config: 1000000 and 1000000.0 are two digests."""
    raw = config_to_hf(config_from_hf(changed("llm_config.rope_theta", 1000000)))
    assert json.dumps(raw["llm_config"]["rope_theta"]) == "1000000"
    assert json.dumps(config_to_hf(config_from_hf(PUBLISHED_D_72B))["llm_config"]["rope_theta"]) == "1000000.0"


def test_a_config_made_in_python_is_frozen_and_complete() -> None:
    tiny = PRESETS["nvlm-d-tiny"]
    with pytest.raises(FrozenInstanceError):
        tiny.max_tiles = 7  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"cross_attention_config.interval: missing"):
        CrossAttentionConfig()  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"vision_config.width: unknown key"):
        replace(tiny.vision, width=8)  # type: ignore[call-arg]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PATHS = [key for key, value in PUBLISHED_D_72B.items()] + [
    f"{section}.{key}" for section in ("vision_config", "llm_config") for key in PUBLISHED_D_72B[section]
]


@given(path=st.sampled_from(PATHS), value=json_values)
def test_any_value_of_any_key_is_read_or_refused(path: str, value: Any) -> None:
    try:
        config = config_from_hf(changed(path, value))
    except ConfigError:
        return
    assert config_from_hf(config_to_hf(config)) == config


class TestReadConfig:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(changed("image_token_id", None)))
        tokens = [{"id": 5, "content": "<|im_end|>"}, {"id": 9, "content": "<|vision_pad|>"}]
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
        return tmp_path

    def test_the_image_token_comes_from_the_tokenizer(self, directory: Path) -> None:
        assert read_config(directory).image_token_id == 9

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
    @pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]", b"7"])
    def test_a_file_that_is_missing_or_malformed_is_named(
        self, directory: Path, name: str, content: bytes | None
    ) -> None:
        (directory / name).unlink()
        if content is not None:
            (directory / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            read_config(directory)

    @pytest.mark.parametrize(
        ("content", "word"), [('{"added_tokens": []}', "vision_pad"), ('{"added_tokens": [{}]}', "tokenizer")]
    )
    def test_a_tokenizer_without_the_image_token(self, directory: Path, content: str, word: str) -> None:
        (directory / "tokenizer.json").write_text(content)
        with pytest.raises(ConfigError, match=word):
            read_config(directory)

    def test_a_file_is_not_a_directory(self, directory: Path) -> None:
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_config(directory / "tokenizer.json")


NUMBERS = [
    *("max_dynamic_patch", "image_token_id", "projector_hidden_size", "cross_attention_config.interval"),
    *(f"vision_config.{key}" for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")),
    *(f"vision_config.{key}" for key in ("intermediate_size", "image_size", "patch_size", "layer_norm_eps")),
    *(f"llm_config.{key}" for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")),
    *(f"llm_config.{key}" for key in ("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")),
    *(f"llm_config.{key}" for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings")),
]


@pytest.mark.parametrize("value", [10**9, 10**30, 1e30, float("inf")])
@pytest.mark.parametrize("path", NUMBERS)
def test_a_number_beyond_every_model_is_refused_by_name(path: str, value: float) -> None:
    if path == "llm_config.rope_theta" and value == 10**9:
        return  # Llama 3.1 has 500000, and longer contexts have more
    raw = config_to_hf(replace(PRESETS["nvlm-x-tiny"], image_token_id=3))
    raw["force_image_size"] = value if path == "vision_config.image_size" else raw["force_image_size"]
    with pytest.raises(ConfigError, match=path) as caught:
        config_from_hf(changed(path, value, raw))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_tile_has_few_enough_patches() -> None:
    vision = PRESETS["nvlm-d-72b"].vision
    with pytest.raises(ConfigError, match="292 patches of patch_size 14"):
        replace(vision, image_size=14 * 292)


def test_every_preset_is_within_the_bounds() -> None:
    for preset in PRESETS.values():
        assert replace(preset, max_tiles=64).max_tiles == 64
        with pytest.raises(ConfigError, match="max_dynamic_patch = 65"):
            replace(preset, max_tiles=65)
