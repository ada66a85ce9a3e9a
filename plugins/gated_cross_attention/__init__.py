"""Gated cross-attention over ranges of image tokens: the one operator of NVLM-X and -H that no runtime has built in."""

# Keys are read in blocks of this many. A cache whose length is a multiple gives every sequence the same bits whatever
# its neighbours read: ONNX Runtime's matrix-vector kernel sums 4 keys at a time, and the last keys in another order.
KEY_BLOCK = 16


def cache_length(max_image_tokens: int) -> int:
    """Of a cross-attention cache that holds so many tokens of each request: a multiple of KEY_BLOCK."""
    return -(-max_image_tokens // KEY_BLOCK) * KEY_BLOCK
