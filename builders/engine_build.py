"""A checkpoint -> an engine for ONNX Runtime: calibrate, write, try it, measure what quantising costs, publish."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nvlm_trt.builders.engine_writer import EngineWriter
from nvlm_trt.builders.quantization.calibrate import calibrate, document_samples, read_first_samples
from nvlm_trt.builders.quantization.calibration import Calibration, is_calibration, read_calibration
from nvlm_trt.builders.quantization.formats import OBSERVING, quantised
from nvlm_trt.builders.quantization.gate import NOT_MEASURED, AccuracyGate, GateOptions
from nvlm_trt.builders.smoke_test import SmokeTest
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import CALIBRATION, Engine, Manifest, publish, save_manifest, temporary_sibling
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import (
    components_of,
    needs_calibration,
    parse_precision,
    quantised_components,
)
from nvlm_trt.progress import Progress, no_progress

CALIBRATION_SAMPLES = 128  # of the document tasks
SMOOTHQUANT_ALPHA = 0.5


@dataclass(frozen=True)
class QuantizationOptions:
    """What a quantised build measures before it publishes; ignored by an fp32 one."""

    calibration: Path | None = None  # JSONL of samples or a saved calibration.json; None: the document tasks
    calibration_samples: int | None = None  # None: all of a file, CALIBRATION_SAMPLES of the document tasks
    smoothquant_alpha: float = SMOOTHQUANT_ALPHA  # 0: no migration
    gate: GateOptions | None = field(default_factory=GateOptions)  # None: published unmeasured

    def __post_init__(self) -> None:
        if not 0 <= self.smoothquant_alpha <= 1:
            raise EngineError(
                f"--smoothquant-alpha {self.smoothquant_alpha} is not from 0 (off) to 1; the default is "
                f"{SMOOTHQUANT_ALPHA}"
            )


def build_engine(
    checkpoint_dir: Path | str,
    output: Path | str,
    overrides: Mapping[str, int] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    smoke_test: bool = True,
    precision: str = "fp32",
    quantization: QuantizationOptions | None = None,
) -> Engine:
    """Publish the engine of a checkpoint as the directory `output`; on any failure nothing is left there.

    `overrides` replaces fields of `default_limits`; `precision` is what `parse_precision` reads. Memory does not grow
    with the model, save for the smoke test, the calibration and the gate, which load an engine each.
    Raises CheckpointError, ConfigError for the checkpoint; EngineError for precision, limits, an existing `output`, a
    full disk, a calibration that does not fit or an engine that speaks nonsense; AccuracyError if the gate refuses it;
    RequestError, ImageError for samples."""
    progress = progress or no_progress
    options = quantization or QuantizationOptions(gate=None)
    precisions = parse_precision(precision)
    with publish(output, overwrite) as staging:
        writer = EngineWriter(checkpoint_dir, overrides or {})
        precisions = {name: precisions[name] for name in components_of(writer.config)}
        trial = SmokeTest(writer.prompts, writer.limits, writer.config)
        builder = _Builder(writer, options, staging, progress)
        is_quantised = bool(quantised_components(precisions))
        gate = None
        if options.gate and is_quantised:
            gate = AccuracyGate(options.gate, builder.write, staging, progress)
        manifest = builder.write(precisions, staging)
        if smoke_test:
            progress("smoke test", 0, 1)
            trial.run(Engine.open(staging))
            progress("smoke test", 1, 1)
        if is_quantised:
            manifest.accuracy_gate = gate.check(staging, precisions) if gate else NOT_MEASURED
            save_manifest(staging, manifest)
    return Engine.open(output)


@dataclass
class _Builder:
    """Engines of one checkpoint in any precision, all from one calibration, which is made when it is first needed."""

    writer: EngineWriter
    options: QuantizationOptions
    beside: Path  # temporary engines are its siblings
    progress: Progress

    def write(self, precisions: Mapping[str, str], directory: Path) -> Manifest:
        calibration = self.calibration if needs_calibration(precisions) else None
        if calibration:
            calibration.save(directory / CALIBRATION)
        with Checkpoint.open(self.writer.checkpoint_dir) as checkpoint:
            recipe = quantised(checkpoint, precisions, calibration, self.options.smoothquant_alpha)
        return self.writer.write(directory, recipe, self.progress)

    @functools.cached_property
    def calibration(self) -> Calibration:
        return make_calibration(self.writer, self.options, self.beside, self.progress)


def make_calibration(
    writer: EngineWriter, options: QuantizationOptions, beside: Path, progress: Progress
) -> Calibration:
    """Read the calibration that `options` names, or measure one with an engine that is a temporary sibling of `beside`.

    Raises EngineError for one that does not fit; RequestError, ImageError for samples."""
    source, count = options.calibration, options.calibration_samples
    if source and is_calibration(source):
        calibration = read_calibration(source)
        calibration.check_checkpoint(writer.digest, source)
        return calibration
    if source:
        samples = read_first_samples(source, count)
    else:
        samples = document_samples("train", count or CALIBRATION_SAMPLES, progress)
    with temporary_sibling(beside) as directory:
        writer.write(directory, OBSERVING, progress)
        return calibrate(directory, samples, progress)
