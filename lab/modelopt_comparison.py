"""Compares our int8 and fp8 with NVIDIA ModelOpt's on the same vision encoder: the distance of each to fp32.

    pip install --no-deps nvidia-modelopt onnx_graphsurgeon onnxslim onnxconverter-common polygraphy ninja omegaconf \
        antlr4-python3-runtime==4.9.3 PyYAML nvidia-ml-py 'pulp<4' cppimport lief
    python -m lab.modelopt_comparison --work WORK checkpoints/nvlm-d-tiny

ModelOpt quantises the fp32 engine's vision_encoder.onnx, projector included, calibrated on the tiles of the samples
that calibrate ours. ModelOpt itself chooses the tensors that it quantises and how it calibrates; its default for these
modes is the largest magnitude. ONNX Runtime's CPU kernels run both results. Without ModelOpt the command says so and
stops.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from lab.common import parser, run
from lab.engines import built_engine, checkpoint_digest
from lab.origin import PACKAGES
from lab.rounds import Contender, Rounds
from nvlm_trt.builders.quantization.build_samples import document_samples
from nvlm_trt.engine import Engine
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import tile_image
from nvlm_trt.progress import no_progress

RESULT = "modelopt.json"
Encoder = Callable[[np.ndarray], np.ndarray]  # pixel values [tiles, 3, E, E] -> image tokens [tiles, T, hidden]
MODES = ("int8", "fp8")
MODEL = "vision_encoder.onnx"
CALIBRATION_SAMPLES, COMPARED_SAMPLES = 128, 56


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("checkpoint", type=Path)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    try:
        import modelopt.onnx.quantization  # noqa: F401
    except ImportError as error:
        print(f"skipped: NVIDIA ModelOpt is not installed ({error}); see --help for how")
        raise SystemExit from None
    work, checkpoint, threads = arguments.work, arguments.checkpoint, arguments.threads
    full = built_engine(work, checkpoint, "fp32")
    tiles = pixels(full, "train", CALIBRATION_SAMPLES)
    compared = pixels(full, "validation", COMPARED_SAMPLES)
    expected = encoder(full.path / MODEL, threads)(compared)

    def contender(quantise: Callable[[], Path]) -> Contender:
        return lambda: distance(expected, encoder(quantise(), threads)(compared))

    contenders: dict[str, Contender] = {}
    for mode in MODES:
        contenders[f"{mode} nvlm-trt"] = contender(partial(quantised_by_us, work, checkpoint, mode))
        theirs = work / f"modelopt-{mode}" / MODEL
        contenders[f"{mode} ModelOpt"] = contender(
            partial(quantised_by_modelopt, full.path / MODEL, theirs, mode, tiles)
        )
    rounds.add_versions({checkpoint.name: checkpoint_digest(checkpoint)[:12]})
    # a warm-up would quantise everything twice
    rounds.run(contenders, arguments.rounds, warm_up=False)
    encoders = {name: {metric: values[0] for metric, values in of.items()} for name, of in rounds.values.items()}
    rounds.report(checkpoint=checkpoint.name, encoders=encoders)
    for name, numbers in encoders.items():
        print(f"{name:16} cosine {numbers['cosine']:.6f}, relative error {numbers['relative_error']:.4f}")


def quantised_by_us(work: Path, checkpoint: Path, mode: str) -> Path:
    precision = f"vision_encoder={mode},projector={mode}"
    return built_engine(work, checkpoint, precision, calibration_samples=CALIBRATION_SAMPLES).path / MODEL


def quantised_by_modelopt(source: Path, target: Path, mode: str, tiles: np.ndarray) -> Path:
    """Calibrates with `tiles` [tiles, 3, E, E] and returns `target`."""
    from modelopt.onnx.quantization import quantize

    target.parent.mkdir(parents=True, exist_ok=True)
    quantize(
        onnx_path=str(source),
        quantize_mode=mode,
        calibration_data={"pixel_values": tiles},
        calibration_method="max",
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(target),
    )
    return target


def pixels(engine: Engine, split: str, count: int) -> np.ndarray:
    """Tiles the images of `count` samples of the document tasks: [tiles, 3, E, E]."""
    edge, most = engine.config.vision.image_size, engine.limits.max_tiles
    samples = document_samples(split, count, no_progress)  # type: ignore[arg-type]  # one of its splits
    return np.concatenate([tile_image(load_image(data), edge, most) for sample in samples for data in sample.images])


def encoder(path: Path, threads: int) -> Encoder:
    """Opens an ONNX file that takes two tiles at a time, as the backend runs it."""
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])

    def encode(tiles: np.ndarray) -> np.ndarray:
        parts = [session.run(None, {"pixel_values": tiles[i : i + 2]})[0] for i in range(0, len(tiles), 2)]
        return np.concatenate(parts)

    return encode


def distance(expected: np.ndarray, actual: np.ndarray) -> Mapping[str, float]:
    a, b = expected.reshape(-1).astype(np.float64), actual.reshape(-1).astype(np.float64)
    assert np.isfinite(b).all(), "image tokens must be finite"
    return {
        "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        "relative_error": float(np.linalg.norm(a - b) / np.linalg.norm(a)),
    }


if __name__ == "__main__":
    run(options(), measure, RESULT, (*PACKAGES, "nvidia-modelopt"))
