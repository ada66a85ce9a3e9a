"""The tensors of a checkpoint, by name and shape: the table that reader, writer, PyTorch reference and graphs share.

NVLM-D is the published layout of nvidia/NVLM-D-72B. The `language_model.cross_layers` of X and H are ours.
"""

from __future__ import annotations

import re

from nvlm_trt.model.config import NvlmConfig

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"

# Some exports carry these tensors; no NVLM model reads them.
IGNORED = re.compile(r"vision_model\.(pooler|head|post_layernorm)\..*|.*\.rotary_emb\.inv_freq|.*\.position_ids")


def checkpoint_layout(config: NvlmConfig) -> Shapes:
    """Lists every tensor of a checkpoint of `config`, in the order in which a model reads them."""
    return {**vision_layout(config), **projector_layout(config), **cross_layout(config), **llm_layout(config)}


def vision_layout(config: NvlmConfig) -> Shapes:
    """Lists InternViT: embeddings, then its layers."""
    vision = config.vision
    width, mlp = vision.hidden_size, vision.intermediate_size
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, vision.patch_size, vision.patch_size),
        "vision_model.embeddings.patch_embedding.bias": (width,),
        "vision_model.embeddings.position_embedding": (1, vision.grid**2 + 1, width),
    }
    for i in range(vision.num_layers):
        layer = f"vision_model.encoder.layers.{i}"
        for norm in ("norm1", "norm2"):
            shapes[f"{layer}.{norm}.weight"] = (width,)
            if vision.norm_type == "layer_norm":
                shapes[f"{layer}.{norm}.bias"] = (width,)
        shapes[f"{layer}.ls1"] = shapes[f"{layer}.ls2"] = (width,)
        shapes[f"{layer}.attn.qkv.weight"] = (3 * width, width)
        if vision.qkv_bias:
            shapes[f"{layer}.attn.qkv.bias"] = (3 * width,)
        if vision.qk_norm:
            shapes[f"{layer}.attn.q_norm.weight"] = shapes[f"{layer}.attn.k_norm.weight"] = (width,)
        shapes |= _linear(f"{layer}.attn.proj", width, width, bias=True)
        shapes |= _linear(f"{layer}.mlp.fc1", width, mlp, bias=True)
        shapes |= _linear(f"{layer}.mlp.fc2", mlp, width, bias=True)
    return shapes


def projector_layout(config: NvlmConfig) -> Shapes:
    """Lists mlp1: LayerNorm -> Linear (X), or LayerNorm -> Linear -> GELU -> Linear (D, H), as nn.Sequential counts."""
    size, hidden, width = config.shuffled_size, config.llm.hidden_size, config.projector_width
    shapes: Shapes = {"mlp1.0.weight": (size,), "mlp1.0.bias": (size,)}
    if width is None:
        return shapes | _linear("mlp1.1", size, hidden)
    return shapes | _linear("mlp1.1", size, width) | _linear("mlp1.3", width, hidden)


def llm_layout(config: NvlmConfig) -> Shapes:
    """Lists the LLM: embeddings, layers, final norm, and lm_head unless it is tied to the embeddings."""
    llm = config.llm
    hidden = llm.hidden_size
    shapes: Shapes = {EMBEDDING: (llm.vocab_size, hidden)}
    for i in range(llm.num_layers):
        layer = f"language_model.model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes |= _linear(f"{layer}.self_attn.q_proj", hidden, llm.num_heads * llm.head_dim, llm.qkv_bias)
        shapes |= _linear(f"{layer}.self_attn.k_proj", hidden, llm.num_kv_heads * llm.head_dim, llm.qkv_bias)
        shapes |= _linear(f"{layer}.self_attn.v_proj", hidden, llm.num_kv_heads * llm.head_dim, llm.qkv_bias)
        shapes |= _linear(f"{layer}.self_attn.o_proj", llm.num_heads * llm.head_dim, hidden)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes |= _swiglu(f"{layer}.mlp", hidden, llm.intermediate_size)
    shapes["language_model.model.norm.weight"] = (hidden,)
    if not llm.tie_word_embeddings:
        shapes |= _linear("language_model.lm_head", hidden, llm.vocab_size)
    return shapes


def cross_layout(config: NvlmConfig) -> Shapes:
    """Lists the gated cross-attention blocks of X and H, whose keys and values come from tokens of the LLM's width."""
    cross, llm = config.cross_attention, config.llm
    shapes: Shapes = {}
    if cross is None:
        return shapes
    hidden = llm.hidden_size
    for j in range(len(config.cross_layers)):
        block = f"language_model.cross_layers.{j}"
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
        shapes |= _linear(f"{block}.attn.q_proj", hidden, llm.num_heads * llm.head_dim)
        shapes |= _linear(f"{block}.attn.k_proj", hidden, llm.num_kv_heads * llm.head_dim)
        shapes |= _linear(f"{block}.attn.v_proj", hidden, llm.num_kv_heads * llm.head_dim)
        if cross.qk_norm:
            shapes[f"{block}.attn.q_norm.weight"] = shapes[f"{block}.attn.k_norm.weight"] = (llm.head_dim,)
        shapes |= _linear(f"{block}.attn.o_proj", llm.num_heads * llm.head_dim, hidden)
        shapes[f"{block}.attn_gate"] = (1,)
        if cross.ffn:
            shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
            shapes |= _swiglu(f"{block}.mlp", hidden, llm.intermediate_size)
            shapes[f"{block}.mlp_gate"] = (1,)
    return shapes


def _linear(name: str, inputs: int, outputs: int, bias: bool = False) -> Shapes:
    """Lists a torch.nn.Linear: weight [outputs, inputs], bias [outputs]."""
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    if bias:
        shapes[f"{name}.bias"] = (outputs,)
    return shapes


def _swiglu(name: str, hidden: int, width: int) -> Shapes:
    return (
        _linear(f"{name}.gate_proj", hidden, width)
        | _linear(f"{name}.up_proj", hidden, width)
        | _linear(f"{name}.down_proj", width, hidden)
    )
