"""Reads the safetensors files of an engine onto the device, and checks what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_trt.errors import EngineError

if TYPE_CHECKING:
    import torch


def load_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    """Load exactly the tensors that `shapes` names. Raises EngineError for a file that cannot be read, for missing and
    extra tensors, and for other shapes or types."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    remedy = "rebuild the engine with `nvlm-trt build`"
    try:
        tensors: dict[str, torch.Tensor] = load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"engine file {path} cannot be read ({error}); {remedy}") from None
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise EngineError(f"engine file {path} lacks {missing[0]} and {len(missing) - 1} others; {remedy}")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise EngineError(f"engine file {path} has the unknown tensor {extra[0]}; {remedy}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise EngineError(
                f"engine file {path}: {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}; "
                f"{remedy}"
            )
    return tensors
