"""Makes the scales of fp8 without a calibration: one magnitude at which the activations of all layers saturate."""

from __future__ import annotations

import math

from nvlm_trt.builders.quantization.calibration import Calibration, LinearInput
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, checkpoint_layout


def check_range(largest: float) -> None:
    """Raise EngineError for a magnitude that gives no scale."""
    if not (math.isfinite(largest) and largest > 0):
        raise EngineError(f"--activation-range {largest} is no magnitude; 448 gives fp8 activations the scale 1")


def fixed_calibration(config: NvlmConfig, checkpoint_digest: str, largest: float) -> Calibration:
    """Return a calibration in which the inputs of every linear layer reach `largest` in each channel."""
    linears = {}
    for name, shape in checkpoint_layout(config).items():
        is_linear = name.endswith(".weight") and len(shape) > 1
        if is_linear and (name != EMBEDDING or config.llm.tie_word_embeddings):
            # the graphs compute a decoder layer's q, k and v as one product
            layer = name.removesuffix(".weight").replace("self_attn.q_proj", "self_attn.qkv_proj")
            if not layer.endswith(("self_attn.k_proj", "self_attn.v_proj")):
                channels = [largest] * math.prod(shape[1:])
                linears[layer] = LinearInput(abs_max=largest, clip=largest, channels=channels)
    return Calibration(checkpoint_digest=checkpoint_digest, samples={"activation_range": largest}, linears=linears)
