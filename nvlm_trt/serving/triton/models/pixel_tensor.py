"""Makes the tensor that the model `vision_encoder` takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvlm_trt.backends.base import FloatArray


def pixel_tensor(pb_utils: Any, pixel_values: FloatArray, image_type: str) -> Any:
    """Make the tensor `pixel_values` [n, 3, E, E] in the type that the vision encoder takes, TYPE_BF16 for example."""
    if image_type == "TYPE_BF16":  # NumPy has no bfloat16
        import torch

        tensor = torch.from_numpy(pixel_values).to(torch.bfloat16)
        return pb_utils.Tensor.from_dlpack("pixel_values", torch.utils.dlpack.to_dlpack(tensor))
    dtype = np.float16 if image_type == "TYPE_FP16" else np.float32
    return pb_utils.Tensor("pixel_values", pixel_values.astype(dtype, copy=False))
