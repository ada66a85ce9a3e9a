"""Tells Triton how to run an engine for TensorRT: vision_encoder is a plan, and its image tokens stay on the GPU."""

from __future__ import annotations

from nvlm_trt.backends.spec import TritonPlacement
from nvlm_trt.backends.tensorrt.record import record_of
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ServerError

_TYPES = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16", "bf16": "TYPE_BF16"}


def placement(engine: Engine) -> TritonPlacement:
    """Return the placement of an engine. Raises ServerError for plans without weights, and EngineError for an engine
    without a record."""
    record = record_of(engine)
    if record.stripped:
        raise ServerError(
            f"engine {engine.path} has plans without weights, which Triton cannot refit; rebuild it without "
            "--strip-weights"
        )
    most, *tile = record.profiles["vision_encoder"][0]["pixel_values"][-1]  # [tiles, 3, E, E]
    pixels = f'input {{ key: "pixel_values" value {{ dim: [ {", ".join(map(str, tile))} ] }} }}'
    specs = [f"graph_spec {{ batch_size: {tiles} {pixels} }}" for tiles in range(1, most + 1)]
    return TritonPlacement(
        vision_model="vision_encoder_tensorrt",
        image_type=_TYPES[record.dtype],
        decoder_kind="KIND_GPU",
        graph_specs=" ".join(specs),
        max_tiles=most,
        files={"model.plan": engine.path.absolute() / "vision_encoder.plan"},
        needs_backend="tensorrt",
        remedy=f"serve it in {record.container}, or build one with `--backend onnxruntime`",
    )
