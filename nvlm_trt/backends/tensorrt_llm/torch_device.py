"""Imports torch, which every container of TensorRT-LLM has, and finds the GPU of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvlm_trt.errors import EngineError

if TYPE_CHECKING:
    import torch

_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's name of an engine's floating-point type."""
    import torch

    found: torch.dtype = getattr(torch, _NAMES[dtype])
    return found


def check_device(device: str) -> None:
    """Raise EngineError if torch is missing, or has no GPU to compute on."""
    try:
        import torch
    except ImportError:
        raise EngineError("images are encoded with torch, which is not installed; `pip install torch`") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(
            "TensorRT-LLM needs an NVIDIA GPU, and none can be used here (see nvidia-smi); `--backend onnxruntime` "
            "serves on the CPU meanwhile"
        )


def wait_for(device: str) -> None:
    """Wait until this thread's work on the device is done: the executor and other threads have streams of their own."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.current_stream(device).synchronize()
