"""Weights to start from: half of the attention heads begin by looking for image tokens that show what a word means.

A query that equals a key's projection matches tokens of the same content, which is what finding the asked-for thing on
a page comes down to; from random projections that skill appears late or not at all in a short run. After "Mimetic
Initialization of Self-Attention Layers" (Trockman and Kolter 2023, arXiv 2305.09828). Between query and key stands the
rotation in which an image token holds what it shows (`training/rotations.py`), so that a word matches the picture of
its thing and not itself.
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm_trt.reference.cross_attention import CrossAttention, GatedCrossAttentionBlock
from nvlm_trt.reference.decoder import SelfAttention
from nvlm_trt.reference.model import ReferenceModel
from training.rotations import Rotations

_EMBEDDING_STD = 0.1
_LIKENESS = 0.7  # of a query to its key; a sharper start (1.6) learned to read letters sooner and all else later
_CHANCE = 0.3  # of what a query would be otherwise
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
    group = attention.q_proj.out_features // attention.k_proj.out_features  # query heads to a key/value head
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        nn.init.normal_(projection.weight, std=hidden**-0.5)
    thing = Rotations(hidden).thing
    key, value = attention.k_proj.weight[:dim], attention.v_proj.weight[:dim]  # [head_dim, hidden]
    for head in range(group):
        rows = slice(head * dim, (head + 1) * dim)
        attention.q_proj.weight[rows] = _LIKENESS * key @ thing + _CHANCE * attention.q_proj.weight[rows]
        # [hidden, head_dim]: back to what the value kept, and on to the words for it
        attention.o_proj.weight[:, rows] += _COPYING / group * thing.T @ torch.linalg.pinv(value)
