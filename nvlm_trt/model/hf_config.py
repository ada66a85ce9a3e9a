"""Reads and writes config.json in HF layout.

NVLM-D is read as nvidia/NVLM-D-72B publishes it. The key of NVLM-X and NVLM-H, `cross_attention_config`, is ours:
no checkpoint of either was published. A key that would change the maths and is not implemented is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nvlm_trt.errors import ConfigError
from nvlm_trt.model.added_tokens import TOKENIZER_JSON, added_tokens
from nvlm_trt.model.config import (
    IMAGE_TOKEN,
    Architecture,
    CrossAttentionConfig,
    LlmConfig,
    LlmFamily,
    NvlmConfig,
    VisionConfig,
)
from nvlm_trt.model.json_file import read_json_object
from nvlm_trt.model.quantised_source import read_scheme

_MODEL_TYPES: dict[str, Architecture] = {"NVLM_D": "D", "NVLM_X": "X", "NVLM_H": "H"}
_LLM_ARCHITECTURES: dict[LlmFamily, str] = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}

# Keys that change the maths, with the values that the graphs implement (absent keys mean the first value).
_TOP_LEVEL_MATHS: dict[str, tuple[Any, ...]] = {
    "downsample_ratio": (0.5,),
    "select_layer": (-1,),
    "template": ("chatml",),
    "ps_version": ("v1", "v2"),
    "use_thumbnail": (True,),
    "dynamic_image_size": (True,),
    "min_dynamic_patch": (1,),
    "pad2square": (False,),
    "use_backbone_lora": (0, False, None),
    "use_llm_lora": (0, False, None),
}
_VISION_MATHS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "norm_type": ("rms_norm", "layer_norm"),
    "num_channels": (3,),
    "use_absolute_position_embeddings": (True,),
}
_LLM_MATHS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
    "mlp_bias": (False, None),
    "norm_type": ("rms_norm",),
    "partial_rotary_factor": (1, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "num_experts": (None, 0),
}


def read_config(directory: Path) -> NvlmConfig:
    """Reads DIR/config.json; takes the image placeholder's id from DIR/tokenizer.json if the config has none.

    Raises ConfigError for a file that is missing, malformed or asks for something that is not supported."""
    return config_in(Path(directory), read_raw_config(directory))


def config_in(directory: Path, raw: Mapping[str, Any]) -> NvlmConfig:
    """Translates `raw`, the config.json of a directory, as `read_config` does."""
    config = config_from_hf(raw, name=directory.resolve().name)
    if config.image_token_id is None:
        config = replace(config, image_token_id=_image_token_from_tokenizer(directory))
    return config


def read_raw_config(directory: Path) -> dict[str, Any]:
    """Reads the JSON object DIR/config.json. Raises ConfigError for a file that is missing or malformed."""
    raw = read_json_object(Path(directory) / "config.json")
    if raw is None:
        raise ConfigError(f"no config.json in {directory}; name a checkpoint directory in HF layout")
    return raw


def config_from_hf(raw: Mapping[str, Any], name: str = "nvlm") -> NvlmConfig:
    """Translates a config.json of HF layout. Raises ConfigError naming the key that is missing or unsupported."""
    model_type = str(_require(raw, "model_type", ""))
    architecture = _MODEL_TYPES.get(model_type.upper())
    if architecture is None:
        raise ConfigError(f"model_type {model_type!r} is not one of {', '.join(_MODEL_TYPES)}; name an NVLM checkpoint")
    _refuse_unsupported(raw, _TOP_LEVEL_MATHS, "")
    read_scheme(raw)  # refuses those that cannot be read
    vision = _vision_from_hf(_section(raw, "vision_config"), raw)
    llm = _llm_from_hf(_section(raw, "llm_config"), raw)
    cross = None
    if architecture != "D":
        cross = CrossAttentionConfig(**_section(raw, "cross_attention_config"))
    elif "cross_attention_config" in raw:
        raise ConfigError("cross_attention_config stands in an NVLM-D config; remove it or set model_type")
    return NvlmConfig(
        name=str(raw.get("name", name)),
        architecture=architecture,
        vision=vision,
        llm=llm,
        cross_attention=cross,
        max_tiles=raw.get("max_dynamic_patch", 6),
        pixel_shuffle=raw.get("ps_version", "v1"),
        image_token_id=raw.get("image_token_id"),
        projector_hidden_size=raw.get("projector_hidden_size"),
    )


def config_to_hf(config: NvlmConfig) -> dict[str, Any]:
    """Makes the config.json of a model; `config_from_hf` reads it back to an equal config."""
    vision, llm = config.vision, config.llm
    raw: dict[str, Any] = {
        "name": config.name,
        "architectures": [f"NVLM_{config.architecture}"],
        "model_type": f"NVLM_{config.architecture}",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size,
        "max_dynamic_patch": config.max_tiles,
        "min_dynamic_patch": 1,
        "ps_version": config.pixel_shuffle,
        "select_layer": -1,
        "template": "chatml",
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.norm_eps,
            "qk_normalization": vision.qk_norm,
            "qkv_bias": vision.qkv_bias,
            "hidden_act": "gelu",
        },
        "llm_config": {
            "architectures": [_LLM_ARCHITECTURES[llm.family]],
            "model_type": llm.family,
            "hidden_size": llm.hidden_size,
            "num_hidden_layers": llm.num_layers,
            "num_attention_heads": llm.num_heads,
            "num_key_value_heads": llm.num_kv_heads,
            "head_dim": llm.head_dim,
            "intermediate_size": llm.intermediate_size,
            "vocab_size": llm.vocab_size,
            "rope_theta": llm.rope_theta,
            "rms_norm_eps": llm.norm_eps,
            "max_position_embeddings": llm.max_position_embeddings,
            "tie_word_embeddings": llm.tie_word_embeddings,
            "hidden_act": "silu",
            "use_sliding_window": False,
        },
    }
    if config.cross_attention is not None:
        raw["cross_attention_config"] = asdict(config.cross_attention)
    if config.image_token_id is not None:
        raw["image_token_id"] = config.image_token_id
    if config.projector_hidden_size is not None:
        raw["projector_hidden_size"] = config.projector_hidden_size
    return raw


def _vision_from_hf(section: Mapping[str, Any], raw: Mapping[str, Any]) -> VisionConfig:
    _refuse_unsupported(section, _VISION_MATHS, "vision_config.")
    image_size = section.get("image_size", 448)
    if raw.get("force_image_size", image_size) != image_size:
        raise ConfigError(
            f"force_image_size {raw['force_image_size']} differs from vision_config.image_size {image_size}; "
            "resizing position embeddings is not supported, make them equal"
        )
    where = "vision_config."
    return VisionConfig(
        hidden_size=_require(section, "hidden_size", where),
        num_layers=_require(section, "num_hidden_layers", where),
        num_heads=_require(section, "num_attention_heads", where),
        intermediate_size=_require(section, "intermediate_size", where),
        image_size=image_size,
        patch_size=section.get("patch_size", 14),
        norm_type=_require(section, "norm_type", where),
        norm_eps=section.get("layer_norm_eps", 1e-6),
        qk_norm=_require(section, "qk_normalization", where),
        qkv_bias=_require(section, "qkv_bias", where),
    )


def _llm_from_hf(section: Mapping[str, Any], raw: Mapping[str, Any]) -> LlmConfig:
    where = "llm_config."
    names = _require(section, "architectures", where)
    if not isinstance(names, list):
        raise ConfigError(f"llm_config.architectures {names!r} is not a list; restore config.json from the checkpoint")
    families = [family for family, name in _LLM_ARCHITECTURES.items() if name in names]
    if len(families) != 1:
        # not model_type: that of NVLM-D-72B is "llama", its LLM is Qwen2
        supported = ", ".join(_LLM_ARCHITECTURES.values())
        raise ConfigError(f"llm_config.architectures {names} is not supported; this version implements {supported}")
    section = _plain_rope(section)
    _refuse_unsupported(section, _LLM_MATHS, where)
    if families[0] == "llama" and section.get("attention_bias"):  # Qwen2 does not read it: q, k and v have biases
        raise ConfigError("llm_config.attention_bias is not supported for LlamaForCausalLM; only false is")
    kinds = section.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError("llm_config.layer_types: only 'full_attention' is supported in every layer")
    num_heads = _require(section, "num_attention_heads", where)
    num_kv_heads = section.get("num_key_value_heads")
    return LlmConfig(
        family=families[0],
        hidden_size=_require(section, "hidden_size", where),
        num_layers=_require(section, "num_hidden_layers", where),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        intermediate_size=_require(section, "intermediate_size", where),
        vocab_size=_require(section, "vocab_size", where),
        rope_theta=_require(section, "rope_theta", where),
        norm_eps=section.get("rms_norm_eps", 1e-6),
        max_position_embeddings=section.get("max_position_embeddings", 32768),
        # transformers keeps the key of some models at the top alone
        tie_word_embeddings=section.get("tie_word_embeddings", raw.get("tie_word_embeddings", False)),
        head_dim=section.get("head_dim") or 0,
    )


def _plain_rope(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """Turns rope_parameters {rope_type, rope_theta, ...} of transformers 5 into the keys that version 4 writes.

    Drops dynamic NTK scaling, which NVLM-D-72B's config names: it changes nothing up to max_position_embeddings, and no
    engine is built for longer sequences."""
    flat = {key: value for key, value in section.items() if key != "rope_parameters"}
    scaling = section.get("rope_scaling")
    if isinstance(scaling, Mapping):
        kinds = {scaling[key] for key in ("rope_type", "type") if isinstance(scaling.get(key), str)}
        if kinds == {"dynamic"} or (kinds == {"default"} and scaling.keys() <= {"rope_type", "type"}):
            flat["rope_scaling"] = None
    rope = section.get("rope_parameters")
    if rope is None:
        return flat
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else None
    if kind not in ("default", "dynamic") or set(rope) - known - ({"factor"} if kind == "dynamic" else set()):
        raise ConfigError(f"llm_config.rope_parameters {rope} is not supported; only rope_type 'default' is")
    return flat | {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}


def _refuse_unsupported(section: Mapping[str, Any], maths: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in maths.items():
        if key in section and section[key] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed if value is not None) or "its absence"
            raise ConfigError(f"{where}{key} = {section[key]!r} is not supported; this version implements {wanted}")


def _require(section: Mapping[str, Any], key: str, where: str) -> Any:
    if section.get(key) is None:
        raise ConfigError(f"config.json has no {where}{key}; restore it from the checkpoint")
    return section[key]


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = _require(raw, key, "")
    if not isinstance(section, Mapping):
        raise ConfigError(f"config.json: {key} is not an object; restore it from the checkpoint")
    return section


def _image_token_from_tokenizer(directory: Path) -> int:
    found = added_tokens(directory)
    if IMAGE_TOKEN in found:
        return found[IMAGE_TOKEN].token_id
    if not found and not (directory / TOKENIZER_JSON).is_file():
        raise ConfigError(f"no {TOKENIZER_JSON} in {directory}; copy the one the model was trained with")
    raise ConfigError(
        f"the tokenizer of {directory} has no added token {IMAGE_TOKEN}; set image_token_id in config.json"
    )
