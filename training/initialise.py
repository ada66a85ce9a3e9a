"""Weights to start from. Half of the attention heads begin by looking for what they are like.

A query that equals a key's projection matches tokens of the same content, which is what finding the asked-for thing on
a page comes down to; from random projections that skill appears late or not at all in a short run. After "Mimetic
Initialization of Self-Attention Layers" (Trockman and Kolter 2023, arXiv 2305.09828), for one of the key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvlm_trt.reference.cross_attention import CrossAttention, GatedCrossAttentionBlock
from nvlm_trt.reference.decoder import SelfAttention
from nvlm_trt.reference.model import ReferenceModel

_EMBEDDING_STD = 0.1
_LIKENESS = 0.7  # of a query to its key: a token's score with its like is about 4
_COPYING = 0.5  # of what an attended token holds, how much is added to the reader
_ATTENTION_GATE = 0.5  # from 0, attention starts to learn only as the gate opens
_FFN_GATE = 0.1


def initialise(model: ReferenceModel) -> None:
    """Set a new model's weights in place, the vision encoder's excepted."""
    nn.init.normal_(model.language_model.model.embed_tokens.weight, std=_EMBEDDING_STD)
    for module in model.language_model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            _look_for_likeness(module)
        if isinstance(module, GatedCrossAttentionBlock):
            nn.init.constant_(module.attn_gate, _ATTENTION_GATE)
            if module.ffn:
                nn.init.constant_(module.mlp_gate, _FFN_GATE)


@torch.no_grad()
def _look_for_likeness(attention: SelfAttention | CrossAttention) -> None:
    """The query heads of key/value head 0; the other heads stay random, for positions and all else."""
    dim = attention.head_dim
    hidden = attention.k_proj.in_features
    heads, kv_heads = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        nn.init.normal_(projection.weight, std=hidden**-0.5)
    group = heads // kv_heads
    key, value = attention.k_proj.weight[:dim], attention.v_proj.weight[:dim]  # [head_dim, hidden]
    for head in range(group):
        rows = slice(head * dim, (head + 1) * dim)
        attention.q_proj.weight[rows] = _LIKENESS * key + (1 - _LIKENESS) * attention.q_proj.weight[rows]
        attention.o_proj.weight[:, rows] += _COPYING / group * _pseudo_inverse(value)


def _pseudo_inverse(value: Tensor) -> Tensor:
    """[head_dim, hidden] -> [hidden, head_dim] that gives back what `value` kept."""
    return torch.linalg.pinv(value)
