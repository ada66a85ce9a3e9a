"""Pins the checkpoint format of TensorRT-LLM 1.2.1: config.json, and names, shapes and dtypes of the tensors of a rank.

How sure each part is, by the mark beside it:
  RAN    loaded by the real Python classes of an earlier version (0.17), which refuse missing names and other shapes
  READ   read in the source of versions 1.0 to 1.2
  U      unconfirmed
TensorRT-LLM accepts extra names and other dtypes in silence (RAN), so this table is the only guard against these.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from nvlm_trt.builders.tensorrt_llm.mapping import Layer, Mapping, combined_layers, kv_heads_per_rank
from nvlm_trt.builders.tensorrt_llm.quantization import STATIC, WEIGHT_ONLY, LlmQuantization
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig

VERSION: Final = "1.2.1"
CONFIG_FILE: Final = "config.json"
DTYPES: Final = {"bf16": "BF16", "fp16": "F16"}  # our name -> safetensors' name
CONFIG_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16"}
_WEIGHT_DTYPES: Final = {"FP8": "F8_E4M3", "W8A8_SQ_PER_CHANNEL": "I8"}
ITEM_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "F8_E4M3": 1}
_WEIGHT_ONLY_MULTIPLE = 64  # of the inputs and outputs that a rank has of a linear layer


class TensorSpec(NamedTuple):
    shape: tuple[int, ...]
    dtype: str  # safetensors' name


Layout = dict[str, TensorSpec]


def rank_file(rank: int) -> str:
    """Return the name of the file that holds the tensors of a rank."""
    return f"rank{rank}.safetensors"


def checkpoint_config(
    config: NvlmConfig, mapping: Mapping, quantization: LlmQuantization, max_encoder_len: int, dtype: str
) -> dict[str, Any]:
    """Make the config.json that trtllm-build reads.

    `dtype`: bf16 or fp16. `max_encoder_len`: the most cross-attended tokens of a request (X, H). Raises EngineError for
    sizes that `mapping` or `quantization` cannot divide."""
    check_layout(config, mapping, quantization)
    if config.cross_layers and max_encoder_len < 1:
        raise EngineError(f"a request of {max_encoder_len} cross-attended tokens has no image; allow 1 or more")
    llm = config.llm
    layers = combined_layers(config)
    settings: dict[str, Any] = {
        # D: RAN for Qwen2ForCausalLM, U for LlamaForCausalLM. X, H: our model class.
        "architecture": _architecture(config),
        "dtype": CONFIG_DTYPES[dtype],
        "logits_dtype": "float32",
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": llm.num_heads,
        # the defaults of the next keys are wrong for Qwen2 (READ)
        "num_key_value_heads": llm.num_kv_heads,
        "head_size": llm.head_dim,
        "intermediate_size": ffn_width(config, mapping, quantization),
        "hidden_act": "silu",
        "norm_epsilon": llm.norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": float(llm.rope_theta),
        "max_position_embeddings": llm.max_position_embeddings,
        "attn_bias": llm.qkv_bias,
        "mlp_bias": False,
        "tie_word_embeddings": False,  # lm_head is always written
    }
    if llm.family == "qwen2" or config.cross_layers:  # our model class is built of Qwen2's layers, with or without bias
        settings |= {"qwen_type": "qwen2", "seq_length": llm.max_position_embeddings, "use_logn_attn": False}
    if config.cross_attention is not None:
        kv_heads = llm.num_kv_heads
        settings |= {
            "cross_attention": True,
            "skip_cross_attn_blocks": True,
            "cross_attention_layers": [i for i, layer in enumerate(layers) if layer.is_cross],
            "num_kv_heads_per_layer": [0 if layer.is_cross else kv_heads for layer in layers],
            "num_kv_heads_per_cross_attn_layer": [kv_heads if layer.is_cross else 0 for layer in layers],
            "cross_attention_ffn": config.cross_attention.ffn,
            "cross_attention_qk_norm": config.cross_attention.qk_norm,
            "max_encoder_input_len": max_encoder_len,
        }
    settings["mapping"] = {"world_size": mapping.world_size, "tp_size": mapping.tp, "pp_size": mapping.pp}
    settings["quantization"] = {
        "quant_algo": quantization.algo,
        "kv_cache_quant_algo": quantization.kv_cache,
        "exclude_modules": list(quantization.excluded(config)),
    }
    return settings


def rank_layout(
    config: NvlmConfig, mapping: Mapping, quantization: LlmQuantization, rank: int, dtype: str = "bf16"
) -> Layout:
    """List the tensors of a rank's file. A layer's number counts from 0 in the rank's stage."""
    stage = mapping.stage(rank)
    table = _Table(config, mapping, quantization, DTYPES[dtype])
    llm = config.llm
    if stage == 0:
        table.plain("transformer.vocab_embedding.weight", llm.vocab_size, llm.hidden_size)  # not padded (RAN)
    for i, layer in enumerate(mapping.layers(config, stage)):
        table.layer(f"transformer.layers.{i}", layer)
    if stage == mapping.pp - 1:
        table.plain("transformer.ln_f.weight", llm.hidden_size)
        # zero rows fill up the last rank's part (RAN)
        table.plain("lm_head.weight", padded_vocabulary(config, mapping) // mapping.tp, llm.hidden_size)
    return table.layout


def padded_vocabulary(config: NvlmConfig, mapping: Mapping) -> int:
    """Return the rows of lm_head over all ranks of a stage: the next multiple of tp."""
    return -(-config.llm.vocab_size // mapping.tp) * mapping.tp


def ffn_width(config: NvlmConfig, mapping: Mapping, quantization: LlmQuantization) -> int:
    """Return the FFN's width in TensorRT-LLM.

    Its weight-only kernels take multiples of 64 on every rank (READ). Channels of zeros fill up the FFN: silu(0) * 0
    is 0, so they add nothing."""
    if quantization.algo not in WEIGHT_ONLY:
        return config.llm.intermediate_size
    multiple = _WEIGHT_ONLY_MULTIPLE * mapping.tp
    return -(-config.llm.intermediate_size // multiple) * multiple


def check_layout(config: NvlmConfig, mapping: Mapping, quantization: LlmQuantization) -> None:
    """Raise EngineError for sizes that `mapping` cannot divide, or that TensorRT-LLM's kernels do not take."""
    mapping.check(config)
    llm = config.llm
    key_heads = kv_heads_per_rank(llm, mapping.tp)
    qk_norm = config.cross_attention is not None and config.cross_attention.qk_norm
    if qk_norm and key_heads == llm.num_heads // mapping.tp:
        # with qk-norm, its attention then wants q, k and v of one head after the other (READ)
        raise EngineError(
            f"--tp {mapping.tp} leaves a rank as many key heads as query heads, which TensorRT-LLM's cross-attention "
            "with qk-norm does not take; choose a smaller --tp"
        )
    if quantization.algo not in WEIGHT_ONLY:
        return
    multiple = _WEIGHT_ONLY_MULTIPLE * mapping.tp
    sizes = {
        "hidden size": llm.hidden_size,
        "query": llm.num_heads * llm.head_dim,
        "query with keys and values": (llm.num_heads + 2 * key_heads * mapping.tp) * llm.head_dim,
    }
    for name, size in sizes.items():
        if size % multiple:
            raise EngineError(
                f"{quantization.algo} with --tp {mapping.tp} needs multiples of {multiple} channels, the LLM's {name} "
                f"has {size}; choose another precision or a smaller --tp"
            )


def _architecture(config: NvlmConfig) -> str:
    if config.cross_layers:
        return f"NVLM_{config.architecture}"
    return {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[config.llm.family]


class _Table:
    """Collects the tensors of one rank: those of all ranks of a stage are the same in name, shape and dtype."""

    def __init__(self, config: NvlmConfig, mapping: Mapping, quantization: LlmQuantization, dtype: str) -> None:
        self.layout: Layout = {}
        self._config, self._quantization, self._dtype = config, quantization, dtype
        self._query = config.llm.num_heads // mapping.tp * config.llm.head_dim
        self._key = kv_heads_per_rank(config.llm, mapping.tp) * config.llm.head_dim
        self._ffn = ffn_width(config, mapping, quantization) // mapping.tp

    def plain(self, name: str, *shape: int, dtype: str | None = None) -> None:
        self.layout[name] = TensorSpec(shape, dtype or self._dtype)

    def layer(self, name: str, layer: Layer) -> None:
        """Add a layer of the LLM (RAN) or a cross-attention block (RAN, with a model class of ours)."""
        hidden = self._config.llm.hidden_size
        attention = f"{name}.{'cross_attention' if layer.is_cross else 'attention'}"
        cross = self._config.cross_attention if layer.is_cross else None
        self.plain(f"{name}.input_layernorm.weight", hidden)
        bias = self._config.llm.qkv_bias and not layer.is_cross
        self.linear(f"{attention}.qkv", self._query + 2 * self._key, hidden, bias)
        self.linear(f"{attention}.dense", hidden, self._query)
        if cross is not None:
            if cross.qk_norm:  # U
                self.plain(f"{attention}.q_layernorm.weight", self._config.llm.head_dim)
                self.plain(f"{attention}.k_layernorm.weight", self._config.llm.head_dim)
            self.plain(f"{name}.gate_attn", 1)
        if self._quantization.kv_cache is not None:
            # TensorRT-LLM adds the reciprocal itself. It gives scales to the attention of every layer, and does not ask
            # exclude_modules (READ).
            self.plain(f"{attention}.kv_cache_scaling_factor", 1, dtype="F32")
        if cross is None or cross.ffn:
            self.plain(f"{name}.post_layernorm.weight", hidden)
            self.linear(f"{name}.mlp.fc", self._ffn, hidden)  # gate_proj (RAN)
            self.linear(f"{name}.mlp.gate", self._ffn, hidden)  # up_proj (RAN)
            self.linear(f"{name}.mlp.proj", hidden, self._ffn)
        if cross is not None and cross.ffn:
            self.plain(f"{name}.gate_ffwd", 1)

    def linear(self, name: str, outputs: int, inputs: int, bias: bool = False) -> None:
        """Add a linear layer: weight [outputs, inputs], and the scales of the algorithm (names and shapes RAN)."""
        algo = self._quantization.algo
        if algo is None or algo not in STATIC or not self._quantization.covers(name, self._config):
            self.plain(f"{name}.weight", outputs, inputs)
        else:
            self.plain(f"{name}.weight", outputs, inputs, dtype=_WEIGHT_DTYPES[algo])
            self.plain(f"{name}.activation_scaling_factor", 1, dtype="F32")
            self.plain(f"{name}.weights_scaling_factor", 1 if algo == "FP8" else outputs, dtype="F32")
            if algo != "FP8":
                self.plain(f"{name}.prequant_scaling_factor", inputs)
        if bias:
            self.plain(f"{name}.bias", outputs)
