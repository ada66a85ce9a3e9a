"""Our int8 and fp8 against NVIDIA ModelOpt's on the same vision encoder: how far each is from fp32.

    pip install --no-deps nvidia-modelopt onnx_graphsurgeon onnxslim onnxconverter-common polygraphy ninja omegaconf \
        antlr4-python3-runtime==4.9.3 PyYAML nvidia-ml-py 'pulp<4' cppimport lief
    python lab/modelopt_comparison.py --work /tmp/nvlm-modelopt checkpoints/nvlm-d-tiny

ModelOpt quantises the fp32 engine's vision_encoder.onnx, projector included, calibrated on the tiles of the same
samples that ours is. It chooses by itself what it quantises and how it calibrates; its default for these modes is the
largest magnitude. Both results run on ONNX Runtime's CPU kernels. Without ModelOpt the script says so and stops.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.calibrate import document_samples
from nvlm_trt.engine import CALIBRATION, Engine
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import tile_image
from nvlm_trt.progress import no_progress

Encoder = Callable[[np.ndarray], np.ndarray]  # pixel values [tiles, 3, E, E] -> image tokens [tiles, T, hidden]
MODES = ("int8", "fp8")
MODEL = "vision_encoder.onnx"
CALIBRATION_SAMPLES, COMPARED_SAMPLES = 128, 56


def main() -> None:
    arguments = parse_arguments()
    try:
        from modelopt.onnx.quantization import quantize
    except ImportError as error:
        print(f"skipped: NVIDIA ModelOpt is not installed ({error}); see --help for how")
        return
    work, checkpoint = arguments.work, arguments.checkpoint
    full = engine(work, checkpoint, "fp32", None)
    tiles = pixels(full, "train", CALIBRATION_SAMPLES)
    compared = pixels(full, "validation", COMPARED_SAMPLES)
    expected = encoder(full.path / MODEL)(compared)
    saved = None
    result: dict[str, dict[str, float]] = {}
    for mode in MODES:
        ours = engine(work, checkpoint, f"vision_encoder={mode},projector={mode}", saved)
        saved = ours.path / CALIBRATION
        theirs = work / f"modelopt-{mode}" / MODEL
        theirs.parent.mkdir(parents=True, exist_ok=True)
        quantize(
            onnx_path=str(full.path / MODEL),
            quantize_mode=mode,
            calibration_data={"pixel_values": tiles},
            calibration_method="max",
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(theirs),
        )
        for who, path in (("nvlm-trt", ours.path / MODEL), ("ModelOpt", theirs)):
            result[f"{mode} {who}"] = distance(expected, encoder(path)(compared))
    for name, numbers in result.items():
        print(f"{name:16} cosine {numbers['cosine']:.6f}, relative error {numbers['relative_error']:.4f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"checkpoint": checkpoint.name, "encoders": result}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="keeps the engines between runs")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser.parse_args()


def engine(work: Path, checkpoint: Path, precision: str, calibration: Path | None) -> Engine:
    output = work / precision.replace("=", "-").replace(",", "+")
    if not output.exists():
        options = QuantizationOptions(
            calibration=calibration,
            calibration_samples=None if calibration else CALIBRATION_SAMPLES,
            gate=None,
        )
        build_engine(checkpoint, output, precision=precision, quantization=options)
    return Engine.open(output)


def pixels(engine: Engine, split: str, count: int) -> np.ndarray:
    """[tiles, 3, E, E] of the pictures among `count` samples of the document tasks."""
    edge, most = engine.config.vision.image_size, engine.limits.max_tiles
    samples = document_samples(split, count, no_progress)  # type: ignore[arg-type]  # one of its splits
    return np.concatenate([tile_image(load_image(data), edge, most) for sample in samples for data in sample.images])


def encoder(path: Path) -> Encoder:
    """Two tiles at a time, as the backend runs it."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(tiles: np.ndarray) -> np.ndarray:
        parts = [session.run(None, {"pixel_values": tiles[i : i + 2]})[0] for i in range(0, len(tiles), 2)]
        return np.concatenate(parts)

    return run


def distance(expected: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    a, b = expected.reshape(-1).astype(np.float64), actual.reshape(-1).astype(np.float64)
    assert np.isfinite(b).all(), "image tokens must be finite"
    return {
        "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        "relative_error": float(np.linalg.norm(a - b) / np.linalg.norm(a)),
    }


if __name__ == "__main__":
    main()
