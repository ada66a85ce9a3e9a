"""How Triton runs an engine for TensorRT: vision_encoder is a plan, whose image tokens stay on the GPU."""

from __future__ import annotations

from pathlib import Path

from nvlm_trt.engine import Engine, TensorRtRecord
from nvlm_trt.errors import ServerError

_TYPES = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16", "bf16": "TYPE_BF16"}


def placement(engine: Engine) -> dict[str, str]:
    """Values of the templates that depend on where the engine runs: types, devices, CUDA graphs."""
    record = engine.manifest.tensorrt
    if record is None:
        return {"image_type": "TYPE_FP32", "decoder_kind": "KIND_CPU", "cpu_only_inputs": "yes", "graph_specs": ""}
    shape = ", ".join(map(str, _pixels(record)[-1][1:]))
    pixels = f'input {{ key: "pixel_values" value {{ dim: [ {shape} ] }} }}'
    specs = [f"graph_spec {{ batch_size: {tiles} {pixels} }}" for tiles in range(1, most_tiles(record) + 1)]
    return {
        "image_type": _TYPES[record.dtype],
        "decoder_kind": "KIND_GPU",
        "cpu_only_inputs": "no",
        "graph_specs": " ".join(specs),
    }


def most_tiles(record: TensorRtRecord) -> int:
    """Tiles that the plan of vision_encoder was built for."""
    return _pixels(record)[-1][0]


def link_plan(engine: Engine, version: Path) -> None:
    """Put the plan of vision_encoder where Triton looks for it. Raises ServerError for one without weights."""
    assert engine.manifest.tensorrt is not None, "an engine for TensorRT has a record"
    if engine.manifest.tensorrt.stripped:
        raise ServerError(
            f"engine {engine.path} has plans without weights, which Triton cannot refit; rebuild it without "
            "--strip-weights"
        )
    (version / "model.plan").symlink_to(engine.path.absolute() / "vision_encoder.plan")


def check_backend(engine: Engine, backends: Path) -> None:
    """Raises ServerError, naming the container, if this tritonserver cannot run plans."""
    record = engine.manifest.tensorrt
    if record is not None and not (backends / "tensorrt").is_dir():
        raise ServerError(
            f"engine {engine.path} is for TensorRT, whose backend this tritonserver lacks ({backends}); serve it in "
            f"{record.container}, or build one with `--backend onnxruntime`"
        )


def _pixels(record: TensorRtRecord) -> list[list[int]]:
    """Smallest, usual and largest shape [tiles, 3, E, E]."""
    return record.profiles["vision_encoder"][0]["pixel_values"]
