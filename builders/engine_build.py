"""Builds an engine from a checkpoint: calibrates, writes, runs the smoke test, measures the accuracy, publishes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from nvlm_trt.backends.spec import BackendSpec
from nvlm_trt.backends.table import DEFAULT_BACKEND, find_backend
from nvlm_trt.builders.build_identity import identity
from nvlm_trt.builders.build_steps import BuildJob, BuildSteps, Precisions
from nvlm_trt.builders.quantization.build_samples import document_samples, read_first_samples
from nvlm_trt.builders.quantization.calibration import Calibration, is_calibration, read_calibration
from nvlm_trt.builders.quantization.calibration_memory import CalibrateBy
from nvlm_trt.builders.quantization.fixed_range import check_range, fixed_calibration
from nvlm_trt.builders.quantization.formats import Recipe, quantised
from nvlm_trt.builders.quantization.gate import NOT_MEASURED, AccuracyGate, GateOptions
from nvlm_trt.builders.quantization.part_store import remove_calibration
from nvlm_trt.builders.quantization.source_scales import source_calibration
from nvlm_trt.builders.smoke_test import SmokeTest
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.builders.unfinished_build import Tell, UnfinishedBuild, tell_nobody, unfinished_build
from nvlm_trt.engine import CALIBRATION, Engine, Manifest, save_manifest, tool_versions, write_manifest
from nvlm_trt.errors import DeviceMemoryError, EngineError
from nvlm_trt.machine import available_memory
from nvlm_trt.model.precision import components_of, needs_calibration, quantised_components
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.disk import check_disk, disk_of_build
from nvlm_trt.planner.gate_memory import check_gate_memory
from nvlm_trt.planner.memory import plan_engine
from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.staging import temporary_sibling

CALIBRATION_SAMPLES = 128  # drawn from the document tasks
SMOOTHQUANT_ALPHA = 0.5


@dataclass(frozen=True)
class QuantizationOptions:
    """Chooses what a quantised build measures before it publishes. An unquantised build ignores these options."""

    calibration: Path | None = None  # JSONL of samples or a saved calibration.json; None: the document tasks
    calibration_samples: int | None = None  # None: all of a file, CALIBRATION_SAMPLES of the document tasks
    calibrate_by: CalibrateBy | None = None  # None: the whole model if the memory of this machine holds it
    activation_range: float | None = None  # for fp8, in place of a calibration: where all activations saturate
    smoothquant_alpha: float = SMOOTHQUANT_ALPHA  # 0: no migration
    gate: GateOptions | None = field(default_factory=GateOptions)  # None: the engine is published without a gate

    def __post_init__(self) -> None:
        if self.calibrate_by not in (None, *get_args(CalibrateBy)):
            raise EngineError(f"--calibrate-by {self.calibrate_by} is not one of {', '.join(get_args(CalibrateBy))}")
        if self.activation_range is not None:
            check_range(self.activation_range)
            if self.calibration or self.calibration_samples or self.calibrate_by:
                raise EngineError("--activation-range stands for a calibration; leave out the other options of one")
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
    precision: str | None = None,
    quantization: QuantizationOptions | None = None,
    backend: str = DEFAULT_BACKEND,
    options: Mapping[str, Any] | None = None,
    lora: Path | None = None,
    tell: Tell = tell_nobody,
) -> Engine:
    """Publish the engine of a checkpoint as the directory `output`. A failed build leaves nothing there; what it has
    calibrated layer by layer stays in a hidden folder beside `output`, and the next build goes on from it.

    A build that was stopped after it had written much leaves a folder beside `output`, with which the next build of the
    same checkpoint, options and versions goes on. `tell` gets lines about it for the user.

    `overrides` replaces fields of `default_limits`; `precision` is text for the backend's PrecisionTable, None for the
    table's default; `options` are the options that only this backend has; `lora` is an adapter that is merged into the
    weights. Memory does not grow with the model, except
    in the gate, which loads an engine, and where the whole model fits: in its calibration and in the smoke test.
    Raises CheckpointError and ConfigError for the checkpoint; EngineError for backend, precision, limits, an existing
    `output`, a full disk, a calibration that does not fit or an engine whose results are not finite; AccuracyError if
    the gate refuses the engine; RequestError and ImageError for samples."""
    spec = find_backend(backend)
    chosen = spec.precisions.parse(precision)
    all_options = {**spec.build_options, **(options or {})}
    spec.check_options(all_options, chosen)
    runs_here = spec.runs_here(all_options)
    if runs_here:
        spec.probe()
    progress = progress or no_progress
    quantization = quantization or QuantizationOptions(gate=None)
    with unfinished_build(Path(output), overwrite, tell) as unfinished:
        staging = unfinished.staging
        source = EngineSource(checkpoint_dir, overrides or {}, lora)
        precisions = {name: chosen[name] for name in components_of(source.config)}
        smoke = SmokeTest(source.prompts, source.limits, source.config)
        spec.check_limits(source.config, source.limits, precisions)
        if quantization.activation_range is not None and "int8" in precisions.values():
            raise EngineError("--activation-range is for fp8; int8 needs a calibration, so leave it out")
        job = BuildJob(
            source,
            all_options,
            Path(output).absolute(),
            staging,
            progress,
            unfinished,
            calibrate_by=quantization.calibrate_by,
        )
        steps = spec.build(job)
        builder = _Builder(spec, source, steps, quantization, progress, precisions, unfinished)
        is_quantised = bool(quantised_components(precisions))
        smoke_test = smoke_test and runs_here
        gate = builder.accuracy_gate(quantization.gate) if quantization.gate and is_quantised and runs_here else None
        unfinished.open(identity(source, spec.name, all_options, precisions, quantization, steps.tools))
        disk = disk_of_build(
            builder.design,
            calibrates=builder.must_calibrate and job.calibrates_by == "model",
            tries_another=steps.trial is not None and (smoke_test or gate is not None),
            unquantised=gate.floating if gate else None,
        )
        check_disk(unfinished.folder, disk, unfinished.nbytes)
        unfinished.start()
        manifest = builder.write(precisions, staging)
        with builder.trial_engine(precisions, staging, wanted=smoke_test or gate is not None) as directory:
            if smoke_test:
                builder.try_out(smoke, directory)
            if is_quantised:
                manifest.accuracy_gate = gate.check(directory, precisions) if gate else NOT_MEASURED
        source.check_unchanged()
        save_manifest(staging, manifest)
        engine = Engine.open(staging)  # opened before other builds can replace it
    remove_calibration(Path(output).absolute())
    return replace(engine, path=Path(output))


@dataclass
class _Builder:
    """Writes engines of one checkpoint in any precision, all with one calibration, measured when it is first needed."""

    spec: BackendSpec
    source: EngineSource
    steps: BuildSteps
    quantization: QuantizationOptions
    progress: Progress
    precisions: Precisions  # of the engine that will be published
    unfinished: UnfinishedBuild

    def write(self, chosen: Precisions, directory: Path) -> Manifest:
        """Write an engine into an empty directory."""
        return self._write(chosen, directory, self.steps)

    def write_trial(self, chosen: Precisions, directory: Path) -> Manifest:
        """Write an engine that this machine can run into an empty directory."""
        return self._write(chosen, directory, self.steps.trial or self.steps)

    @contextlib.contextmanager
    def trial_engine(self, precisions: Precisions, built: Path, wanted: bool) -> Iterator[Path]:
        """Yield the directory of an engine to try: `built`, or an engine in its place for as long as the context lasts.

        `wanted` False: nothing will be tried, so nothing is written."""
        if self.steps.trial is None or not wanted:
            yield built
            return
        with temporary_sibling(built) as directory:
            self.write_trial(precisions, directory)
            yield directory

    def _write(self, chosen: Precisions, directory: Path, steps: BuildSteps) -> Manifest:
        precisions = {name: chosen[name] for name in components_of(self.source.config)}
        recipe = self._recipe(precisions, directory)
        runtimes = self.spec.runtimes_of(precisions)
        return write_engine(
            self.source,
            directory,
            recipe,
            self.spec.name,
            steps.tools,
            steps.write_stages,
            runtimes,
            self.progress,
        )

    @property
    def must_calibrate(self) -> bool:
        """Tell whether the build needs a calibration that neither the user nor an interrupted build has."""
        path = self.quantization.calibration
        has_one = path is not None and is_calibration(path)
        if not needs_calibration(self.precisions) or has_one or self.quantization.activation_range is not None:
            return False
        return self.unfinished.reached(self.unfinished.staging / CALIBRATION) is None

    @property
    def design(self) -> EngineDesign:
        return self.source.design(self.spec, self.precisions)

    def accuracy_gate(self, options: GateOptions) -> AccuracyGate:
        """Prepare the gate of this build. Raises EngineError if this machine does not hold its engines, RequestError
        and ImageError for faulty samples."""
        unquantised = self.steps.unquantised(self.precisions)
        tried = replace(self.design, backend=find_backend(DEFAULT_BACKEND)) if self.steps.trial else self.design
        check_gate_memory(tried, unquantised, available_memory())
        parsed = self.spec.precisions.parse(unquantised)
        floating = {name: parsed[name] for name in self.precisions}
        staging = self.unfinished.staging
        return AccuracyGate(options, self.write_trial, staging, self.progress, unquantised, floating)

    def try_out(self, smoke: SmokeTest, directory: Path) -> None:
        try:
            smoke.run(Engine.open(directory), self.progress)
        except DeviceMemoryError as error:
            planned = plan_engine(self.design)
            raise EngineError(
                f"{error}. The whole engine was expected to take {planned.peak_building / 1e9:.2f} GB on the GPU"
            ) from error

    def _recipe(self, precisions: Precisions, directory: Path) -> Recipe:
        calibration = self._calibration if needs_calibration(precisions) else None
        if calibration and directory != self.unfinished.staging:
            calibration.save(directory / CALIBRATION)
        with self.source.open_checkpoint() as checkpoint:
            alpha = self.quantization.smoothquant_alpha
            return quantised(checkpoint, precisions, calibration, alpha, self.steps.weight_form)

    @functools.cached_property
    def _calibration(self) -> Calibration:
        """Return the calibration of this build, which an interrupted build may have finished."""
        finished = self.unfinished.staging / CALIBRATION
        if self.unfinished.reached(finished) is not None and finished.is_file():
            return read_calibration(finished)
        calibration = self._new_calibration()
        calibration.save(finished)
        self.unfinished.note_whole(finished)
        return calibration

    def _new_calibration(self) -> Calibration:
        """Read the calibration, take it over from the checkpoint, or measure it.

        Raises EngineError for a saved calibration that does not fit; RequestError and ImageError for samples."""
        if self.quantization.activation_range is not None:
            return fixed_calibration(self.source.config, self.source.digest, self.quantization.activation_range)
        path, count = self.quantization.calibration, self.quantization.calibration_samples
        if path and is_calibration(path):
            calibration = read_calibration(path)
            calibration.check_checkpoint(self.source.digest, path)
            return calibration
        if path is None and count is None:
            with self.source.open_checkpoint() as checkpoint:
                scales = source_calibration(checkpoint, self.precisions)
            if scales is not None:
                return scales
        if path:
            samples = read_first_samples(path, count)
        else:
            samples = document_samples("train", count or CALIBRATION_SAMPLES, self.progress)
        return self.steps.calibrate(samples)


def write_engine(
    source: EngineSource,
    directory: Path,
    recipe: Recipe,
    backend: str,
    tools: Sequence[str],
    write_stages: Callable[[Path, Recipe], dict[str, Any] | None],
    runtimes: Mapping[str, str] | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write config, tokenizer, stages and manifest into an empty directory. Memory does not grow with the model.

    `runtimes`: those of single stages, for the manifest. `progress`: of hashing the files. Raises EngineError for
    a full disk."""
    source.write_model_files(directory)
    record = write_stages(directory, recipe)
    manifest = Manifest(
        model_name=source.config.name,
        architecture=source.config.architecture,
        backend=backend,
        runtimes=dict(runtimes or {}),
        precision={component: recipe.precisions[component] for component in components_of(source.config)},
        limits=source.limits,
        checkpoint_digest=source.digest,
        tool_versions=tool_versions(*tools),
        calibration=recipe.calibration,
        backend_record=record,
    )
    write_manifest(directory, manifest, progress)
    return manifest
