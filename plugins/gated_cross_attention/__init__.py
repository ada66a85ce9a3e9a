"""Gated cross-attention over ranges of image tokens: the one operator of NVLM-X and -H that no runtime has built in.

The product uses the ONNX function (onnx_function.py) in every decoder of NVLM-X and -H, the cache length below, and, to
build for TensorRT, the plugin (tensorrt_plugin.py, with kernel.py, blocks.py and ahead_of_time.py). Nothing in the
product imports the launcher on torch tensors (launcher.py) or the kernels that only the launcher starts
(split_kernel.py, hopper/): lab/gpu_check and the tests do. A backend that runs the decoder in torch would call the
launcher.
"""

# The keys in a block. If the length of a cache is a multiple of KEY_BLOCK, the bits of a sequence do not depend on the
# keys that other sequences read: ONNX Runtime's matrix-vector kernel sums 4 keys at a time, and the last keys in
# another order.
KEY_BLOCK = 16


def cache_length(max_image_tokens: int) -> int:
    """Return the length of a cross-attention cache for `max_image_tokens` per request: a multiple of KEY_BLOCK."""
    return -(-max_image_tokens // KEY_BLOCK) * KEY_BLOCK
