"""Says which part of the model a tensor of a checkpoint belongs to: the one table of names for parts."""

from __future__ import annotations

# Prefixes of tensor names by part, in the order of the data's way through NVLM-D; the first that fits counts. `decoder`
# has the final norm too; `cross_attention` is the gated blocks with their keys and values.
_PREFIXES = {
    "vision_encoder": "vision_model.",
    "projector": "mlp1.",
    "embedding": "language_model.model.embed_tokens.",
    "decoder": "language_model.model.",
    "lm_head": "language_model.lm_head.",
    "cross_attention": "language_model.cross_layers.",
}
PARTS = tuple(_PREFIXES)
OTHER = "other"


def part_of(tensor: str) -> str:
    """Returns which of PARTS a tensor is of, given its name or that of its layer; OTHER for a name of no NVLM model."""
    return next((part for part, prefix in _PREFIXES.items() if f"{tensor}.".startswith(prefix)), OTHER)
