"""Weights to start from: attention heads begin by looking for image tokens that show what a word or letter means.

A query that equals a key's projection matches tokens of the same content, which is what finding the asked-for thing on
a page comes down to; from random projections that skill appears late or not at all in a short run. After "Mimetic
Initialization of Self-Attention Layers" (Trockman and Kolter 2023, arXiv 2305.09828). Between query and key stand the
rotations in which an image token holds its parts (`training/rotations.py`), so that a word matches the picture of its
thing and not itself.
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm_trt.reference.cross_attention import CrossAttention, GatedCrossAttentionBlock
from nvlm_trt.reference.decoder import SelfAttention
from nvlm_trt.reference.model import ReferenceModel
from training.rotations import Rotations

_EMBEDDING_STD = 0.1
_LIKENESS = 1.6  # of a query to its key: a word's score with a token that shows it and three things more is about 4
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
    """Key/value head 0 finds things and letters of the left column, head 1 letters of the right column."""
    dim = attention.head_dim
    hidden = attention.k_proj.in_features
    group = attention.q_proj.out_features // attention.k_proj.out_features  # query heads to a key/value head
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        nn.init.normal_(projection.weight, std=hidden**-0.5)
    rotations = Rotations(hidden)
    for number, column in enumerate((rotations.left, rotations.right)):
        rows = slice(number * dim, (number + 1) * dim)
        key, value = attention.k_proj.weight[rows], attention.v_proj.weight[rows]  # [head_dim, hidden]
        # [hidden, head_dim]: back to what the value kept, and on to the words and letters for it
        copied = (rotations.thing.T + column.letter.T) @ torch.linalg.pinv(value)
        for head in range(number * group, (number + 1) * group):
            rows = slice(head * dim, (head + 1) * dim)
            likeness = key @ column.previous
            attention.q_proj.weight[rows] = _LIKENESS * likeness + _CHANCE * attention.q_proj.weight[rows]
            attention.o_proj.weight[:, rows] += _COPYING / group * copied
