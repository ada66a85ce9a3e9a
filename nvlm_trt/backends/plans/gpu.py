"""Imports torch, which holds the buffers of plans on the GPU."""

from __future__ import annotations

from typing import Any

from nvlm_trt.errors import EngineError

MEANWHILE = "`--backend onnxruntime` serves on the CPU meanwhile"


def import_torch() -> Any:
    """Import torch. Raises EngineError without torch or without a GPU."""
    try:
        import torch
    except ImportError:
        raise EngineError(
            f"buffers on the GPU are torch's, which is not installed; `pip install torch`; {MEANWHILE}"
        ) from None
    if not torch.cuda.is_available():
        raise EngineError(f"TensorRT needs an NVIDIA GPU, and none can be used here (see nvidia-smi); {MEANWHILE}")
    return torch
