"""Reads the input tensors of a Triton request."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt


def input_array(pb_utils: Any, request: Any, name: str) -> npt.NDArray[Any] | None:
    """Read an input tensor in host memory; None if the request lacks it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
