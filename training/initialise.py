"""Sets the weights to start from: half of the attention heads match a word with image tokens that show its meaning.

If a query equals a key's projection, tokens of the same content match: so a model finds the named thing on a page. From
random projections this skill appears late in a short run, or not at all. Follows "Mimetic Initialization of
Self-Attention Layers" (Trockman and Kolter 2023, arXiv 2305.09828). The query is also turned by the rotation in which
an image token holds the word (`training/rotations.py`), so that a word matches an image of its thing and not itself.
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm_trt.reference.cross_attention import CrossAttention, GatedCrossAttentionBlock
from nvlm_trt.reference.decoder import SelfAttention
from nvlm_trt.reference.model import ReferenceModel
from training.rotations import Rotations

_EMBEDDING_STD = 0.1
_LIKENESS = 0.7  # share of the key in a query; a sharper start (1.6) learned letters sooner and all else later
_CHANCE = 0.3  # share of the random query
_COPYING = 0.5  # share of an attended token's content that is added to the reader
_ATTENTION_GATE = 0.5  # at 0, attention would learn only as the gate opens
_FFN_GATE = 0.1


def initialise(model: ReferenceModel) -> None:
    """Sets a new model's weights in place, except those of the vision encoder."""
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
    """Sets the query heads of key/value head 0; the other heads stay random, to learn positions and all else."""
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
        # [hidden, head_dim]: undoes the value projection, then the rotation
        attention.o_proj.weight[:, rows] += _COPYING / group * thing.T @ torch.linalg.pinv(value)
