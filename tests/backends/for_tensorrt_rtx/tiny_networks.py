"""Writes the graphs of random tiny models for TensorRT, with the inputs of the stages before the decoder."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from decoder_scenario import LIMITS, Scenario
from layer_reading import Array
from parsed_network import ParsedNetwork
from stages import ReferenceWeights, random_reference, tiny_config

from nvlm_trt.backends.plans.graphs import DTYPES
from nvlm_trt.builders.graphs.common import WeightFormat
from nvlm_trt.builders.graphs.cross_attention import CrossAttention, GatedFunction, MaskedAttention
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import TensorRtAttention
from nvlm_trt.builders.graphs.vision_attention import tensorrt_vision_attention
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization.blocked_weights import BlockedWeights
from nvlm_trt.builders.quantization.calibration import LinearInput
from nvlm_trt.builders.quantization.fp8 import Fp8
from nvlm_trt.builders.quantization.int8 import Int8
from nvlm_trt.reference.model import ReferenceModel

NUMPY = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}
CROSS: dict[str, type[CrossAttention]] = {"function": GatedFunction, "masked": MaskedAttention}
TAG_LENGTH = 5


class Everywhere:
    """Replaces a calibration: the inputs of every linear layer are at most 6."""

    def of(self, name: str, inputs: int) -> LinearInput:
        return LinearInput(abs_max=6.0, clip=6.0, channels=[6.0] * inputs)


FORMATS: dict[str, WeightFormat | None] = {
    "unquantised": None,
    "int8": Int8(Everywhere()),
    "fp8": Fp8(Everywhere(), fold_weights=False),
    "int8-weight-only": BlockedWeights(8),
    "int4-weight-only": BlockedWeights(4),
}
QUANTISED = [name for name, weight_format in FORMATS.items() if weight_format]


class Variant(NamedTuple):
    """One set of graphs."""

    architecture: str
    cross: str = "function"  # a key of CROSS; NVLM-D has no cross-attention
    dtype: str = "fp32"
    weight_format: str = "unquantised"

    def __str__(self) -> str:
        return "-".join(self)


FORMS = [Variant("D"), *(Variant(architecture, cross) for architecture in "XH" for cross in CROSS)]
# The tiny decoders of NVLM-X and NVLM-H are one graph, so in every precision each form needs only one of them.
FEWER_FORMS = [Variant("D"), Variant("X", "function"), Variant("H", "masked")]


def variants(dtypes: Iterable[str], weight_formats: Iterable[str]) -> list[Variant]:
    return [
        form._replace(dtype=dtype, weight_format=weight_format)
        for weight_format in weight_formats
        for dtype in dtypes
        for form in FEWER_FORMS
    ]


@cache
def reference(architecture: Any) -> ReferenceModel:
    return random_reference(tiny_config(architecture, llm={"num_layers": 4}, vision={"num_layers": 2}))


@cache
def scenario(architecture: str) -> Scenario:
    return Scenario(reference(architecture))


def tag_ids() -> Array:
    """Make the tokens of NVLM-H's tile tags: [6, TAG_LENGTH]."""
    return np.random.default_rng(3).integers(0, 256, (6, TAG_LENGTH))


def write_stage(variant: Variant, stage: str, directory: Path) -> Path:
    """Write the ONNX file of a stage."""
    model = reference(variant.architecture)
    config, weights = model.config, ReferenceWeights(model)
    weight_format, dtype = FORMATS[variant.weight_format], DTYPES[variant.dtype]
    if stage == "vision_encoder":
        graph = vision_encoder_graph(config, weights, weight_format, tensorrt_vision_attention, dtype)
    elif stage == "cross_kv":
        table = model.language_model.model.embed_tokens.weight.numpy()
        tags = table[tag_ids()] if variant.architecture == "H" else None
        graph = cross_kv_graph(config, weights, tags, weight_format, dtype)
    else:
        assert stage == "decoder"
        cross = CROSS[variant.cross]
        graph = decoder_graph(config, weights, LIMITS, weight_format, TensorRtAttention, cross, dtype=dtype)
    path = directory / f"{variant}-{stage}.onnx"
    save_model(graph, path, lambda *_: None)
    return path


def stages(architecture: str) -> list[str]:
    return ["vision_encoder", "decoder"] if architecture == "D" else ["vision_encoder", "cross_kv", "decoder"]


def parsed_stage(variant: Variant, stage: str, directory: Path) -> ParsedNetwork:
    return ParsedNetwork.parse(write_stage(variant, stage, directory))


def pixels(architecture: str, tiles: int = 3) -> Array:
    edge = reference(architecture).config.vision.image_size
    return np.random.default_rng(0).standard_normal((tiles, 3, edge, edge), dtype=np.float32)


def image_tokens(architecture: str, tiles: int = 3) -> Array:
    config = reference(architecture).config
    shape = (tiles, config.tokens_per_tile, config.llm.hidden_size)
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
