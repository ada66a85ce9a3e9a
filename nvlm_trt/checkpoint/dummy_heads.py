"""Dummy attention heads: nvidia/NVLM-D-72B stores InternViT's 25 heads padded to 32, which tensor parallelism divides.

Dummy heads follow the real ones in each of q, k and v, in the qk-norms' weights and in the input of `proj`. The norms
take the variance of the real heads alone, and dummy heads add nothing to the output, so a reader cuts them off
(`num_dummy_heads` in modeling_intern_vit.py of nvidia/NVLM-D-72B and in vLLM).
"""

from __future__ import annotations

import re

import numpy as np

from nvlm_trt.checkpoint.safetensors_file import FloatArray

PROJECTION = re.compile(r"(vision_model\.encoder\.layers\.\d+\.attn)\.proj\.weight")
_PADDED = re.compile(
    r"vision_model\.encoder\.layers\.\d+\.attn\.(?P<part>qkv|proj|q_norm|k_norm)\.(?P<kind>weight|bias)"
)


def padded_shape(name: str, shape: tuple[int, ...], padding: int) -> tuple[int, ...]:
    """Returns the stored shape of a tensor when q, k and v each have `padding` more channels."""
    match = _PADDED.fullmatch(name)
    if match is None or (match["part"], match["kind"]) == ("proj", "bias"):
        return shape
    if match["part"] == "proj":
        return (shape[0], shape[1] + padding)
    return (shape[0] + padding * (3 if match["part"] == "qkv" else 1), *shape[1:])


def real_heads(name: str, stored: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Cuts a tensor of `padded_shape` down to `shape`."""
    if ".attn.qkv." in name:
        parts = stored.reshape(3, -1, *shape[1:])[:, : shape[0] // 3]  # q, k, v
        return np.ascontiguousarray(parts).reshape(shape)
    return np.ascontiguousarray(stored[tuple(slice(size) for size in shape)])
