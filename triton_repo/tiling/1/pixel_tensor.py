"""Tiles in the type that the vision encoder takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils


def pixel_tensor(pixels: npt.NDArray[np.float32], image_type: str) -> Any:
    """pixels [n, 3, E, E] as the tensor `pixel_values` of TYPE_FP32, TYPE_FP16 or TYPE_BF16."""
    if image_type == "TYPE_BF16":  # which numpy does not have
        import torch

        tensor = torch.from_numpy(pixels).to(torch.bfloat16)
        return pb_utils.Tensor.from_dlpack("pixel_values", torch.utils.dlpack.to_dlpack(tensor))
    dtype = np.float16 if image_type == "TYPE_FP16" else np.float32
    return pb_utils.Tensor("pixel_values", pixels.astype(dtype, copy=False))
