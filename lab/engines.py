"""Makes the checkpoints and engines that benchmarks measure, and keeps them below --work for runs of the same code."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path

from lab.code_state import PRODUCT, sources_digest
from lab.origin import machine, versions, without_load
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import CALIBRATION, Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.progress import Progress

BUILDERS = ("nvlm-trt", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "ml-dtypes", "torch")
ORIGIN = "origin.json"


def random_checkpoint(work: Path, preset: str) -> Path:
    checkpoint = work / "checkpoints" / preset
    if not checkpoint.exists():
        _say(f"writing {checkpoint}")
        init_checkpoint(checkpoint, preset, seed=0)
    return checkpoint


def random_engine(work: Path, preset: str, precision: str) -> Engine:
    """Builds the engine of a random checkpoint, calibrated with few samples: speed does not depend on the scales."""
    return built_engine(work, random_checkpoint(work, preset), precision, calibration_samples=14)  # one of each task


def built_engine(
    work: Path,
    checkpoint: Path,
    precision: str,
    calibration_samples: int | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Builds an engine in WORK/engines, or opens the one there; all precisions of a checkpoint share one calibration.

    No gate judges the engine: the benchmarks measure it. `calibration_samples`: None for the product's default."""
    folder = engines_folder(work)
    name = f"{checkpoint.name}-{checkpoint_digest(checkpoint)[:12]}"
    output = folder / f"{name}-{precision.replace('=', '-').replace(',', '+')}"
    if not output.exists():
        _say(f"building {output}")
        saved = folder / f"{name}.{CALIBRATION}"
        options = (
            QuantizationOptions(calibration=saved, gate=None)
            if saved.exists()
            else QuantizationOptions(calibration_samples=calibration_samples, gate=None)
        )
        build_engine(checkpoint, output, precision=precision, quantization=options, progress=progress)
        if (output / CALIBRATION).exists() and not saved.exists():
            saved.write_bytes((output / CALIBRATION).read_bytes())
    return Engine.open(output)


@functools.lru_cache
def checkpoint_digest(checkpoint: Path) -> str:
    with Checkpoint.open(checkpoint) as source:
        return source.digest


def engines_folder(work: Path) -> Path:
    """Returns WORK/engines, emptied if other sources, another machine or other versions built its engines.

    Raises EngineError for a folder that this function did not make."""
    folder, mark = work / "engines", work / "engines" / ORIGIN
    here = {
        "sources": sources_digest(folders=PRODUCT),
        "machine": without_load(machine()),
        "versions": versions(BUILDERS),
    }
    if folder.exists() and not mark.exists():
        raise EngineError(f"{folder} was not made by lab; choose another --work or remove that folder")
    if folder.exists() and json.loads(mark.read_text(encoding="utf-8")) != here:
        _say(f"removing {folder}: other code, another machine or other versions built it")
        shutil.rmtree(folder)
    if not folder.exists():
        folder.mkdir(parents=True)
        mark.write_text(json.dumps(here, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return folder


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
