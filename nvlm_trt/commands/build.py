"""Implements `nvlm-trt build`: builds an engine from a checkpoint, quantises and measures it, and publishes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nvlm_trt import terminal
from nvlm_trt.backends.table import DEFAULT_BACKEND, backend_names, backend_summaries, find_backend, precision_summaries
from nvlm_trt.commands.shared_options import OverwriteOption
from nvlm_trt.errors import NvlmError
from nvlm_trt.extras import require
from nvlm_trt.model.precision import COMPONENTS, needs_calibration, quantised_components

if TYPE_CHECKING:
    from nvlm_trt.builders.engine_build import QuantizationOptions
    from nvlm_trt.engine import Engine

_MOST_SAMPLES = 1_000_000


def build(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Engine directory to publish.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint directory in HF layout.")] = None,
    lora: Annotated[
        Path | None, typer.Option(help="LoRA adapter of PEFT, merged into the checkpoint's weights.")
    ] = None,
    continued: Annotated[
        Path | None,
        typer.Option("--continue", help="Instead: complete an engine that was built with --checkpoint-only."),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help=f"Runs the engine: {backend_summaries()}."),
    ] = DEFAULT_BACKEND,
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"{precision_summaries()} For single components: component=NAME,... ({', '.join(COMPONENTS)}) "
            "(docs/quantization.md)."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="For int8 and fp8: JSONL of {image, prompt, answer}, or the calibration.json of an earlier build "
            "[the document tasks, generated here]."
        ),
    ] = None,
    calibration_samples: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MOST_SAMPLES, help="Most samples to calibrate on [all of a file, 128 of the document tasks]."
        ),
    ] = None,
    calibrate_by: Annotated[
        str | None,
        typer.Option(
            metavar="[layer|layer-on-gpu|model]",
            help="Load one layer at a time for the calibration, or the whole model in fp32 "
            "[model if the memory holds it].",
        ),
    ] = None,
    activation_range: Annotated[
        float | None,
        typer.Option(
            help="For fp8, in place of a calibration: the magnitude at which all activations saturate; 448 is scale 1."
        ),
    ] = None,
    smoothquant_alpha: Annotated[
        float | None, typer.Option(help="For int8: how far outliers move into the weights, 0 (off) to 1 [0.5].")
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option(help="JSONL that judges a quantised engine [the document tasks' validation split]."),
    ] = None,
    gate_samples: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MOST_SAMPLES, help="Most samples to judge by [all of a file, 500 of the document tasks]."
        ),
    ] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Points that a quantised engine may score below the unquantised one [1].")
    ] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Publish a quantised engine without measuring it.")
    ] = False,
    max_slots: Annotated[int | None, typer.Option(help="Requests decoded at once [8].")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer in the LLM [4096].")] = None,
    max_image_tokens: Annotated[
        int | None, typer.Option(help="Cross-attended tokens per request (X, H) [four images' worth].")
    ] = None,
    strip_weights: Annotated[
        bool,
        typer.Option("--strip-weights", help="tensorrt: plans without weights, which they take from ONNX files."),
    ] = False,
    weight_streaming: Annotated[
        bool,
        typer.Option(
            "--weight-streaming",
            help="tensorrt, tensorrt-rtx: weights that do not fit on the GPU stay in host memory.",
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(help="tensorrt-rtx: GPUs that the plans run on, such as sm86,sm89,sm120 [8.0 and later]."),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="tensorrt-llm: GPUs that share each layer (tensor parallelism) [1].")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, help="tensorrt-llm: GPU groups that share the layers (pipeline) [1].")
    ] = None,
    checkpoint_only: Annotated[
        bool,
        typer.Option(
            "--checkpoint-only", help="tensorrt-llm: stop before trtllm-build, which needs NVIDIA's container."
        ),
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Build an engine from a checkpoint, generate a few tokens with it, and publish it.

    A quantised engine (--precision) is published only if it answers as well as the unquantised one.
    A build that was stopped goes on where it stopped when the same command runs again.

    Example: nvlm-trt build --checkpoint checkpoints/nvlm-h --output engines/nvlm-h --precision int8
    """
    if (checkpoint is None) == (continued is None):
        raise NvlmError("name what to build from: either --checkpoint DIR, or --continue ENGINE")
    if continued is not None:
        _refuse_others(context, "continued", "output", "overwrite")
        _complete(continued, output, overwrite)
        return
    assert checkpoint is not None
    spec = find_backend(backend)
    precisions = spec.precisions.parse(precision)
    options = {
        "strip_weights": strip_weights or None,
        "weight_streaming": weight_streaming or None,
        "target": target,
        "tp": tp,
        "pp": pp,
        "checkpoint_only": checkpoint_only or None,
    }
    for name in _given(options):
        if name not in spec.build_options:
            owners = " and ".join(other for other in backend_names() if name in find_backend(other).build_options)
            raise NvlmError(f"{_dashed(name)} belongs to the backend {owners}, not to {spec.name}; leave it out")
    require("build", "building an engine")
    from nvlm_trt.builders.engine_build import build_engine
    from nvlm_trt.builders.quantization.gate import AccuracyError

    judging = {"samples": gate, "count": gate_samples, "max_drop": max_accuracy_drop}
    calibrating = {
        "calibration": calibration,
        "calibration_samples": calibration_samples,
        "calibrate_by": calibrate_by,
        "activation_range": activation_range,
        "smoothquant_alpha": smoothquant_alpha,
    }
    if no_gate and _given(judging):
        raise NvlmError("--no-gate measures nothing; leave out --gate, --gate-samples and --max-accuracy-drop")
    if _given(judging) and not spec.runs_here({**spec.build_options, **_given(options)}):
        raise NvlmError(
            f"--{_option(judging)} judges an engine that runs on this machine; leave it out with --checkpoint-only"
        )
    if _given(judging) and not quantised_components(precisions):
        given = _option(judging)
        raise NvlmError(f"an unquantised engine passes no gate, but --{given} was given; choose a --precision")
    if _given(calibrating) and not needs_calibration(precisions):
        raise NvlmError(f"only int8 and fp8 are calibrated, but --{_option(calibrating)} was given; choose one of them")
    if quantised_components(precisions) and not no_gate:
        require("eval", "measuring a quantised engine")
    limits = {"max_slots": max_slots, "max_seq_len": max_seq_len, "max_image_tokens": max_image_tokens}
    try:
        with terminal.progress() as progress:
            engine = build_engine(
                checkpoint,
                output,
                overrides=_given(limits),
                overwrite=overwrite,
                progress=progress,
                precision=precision,
                quantization=_options(calibrating, judging, no_gate),
                backend=backend,
                options=_given(options),
                lora=lora,
                tell=terminal.note,
            )
    except AccuracyError as error:
        for cost in error.costs:
            terminal.note(str(cost))
        raise
    _note_engine(engine, output)


def _refuse_others(context: typer.Context, *allowed: str) -> None:
    """Raise NvlmError for an option that the user gave beside the allowed ones."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source.name == "COMMANDLINE":
            raise NvlmError(
                f"--continue takes what the engine was built with, but {_dashed(name)} was given; leave it out, or "
                "build from a checkpoint"
            )


def _complete(continued: Path, output: Path, overwrite: bool) -> None:
    from nvlm_trt.backends.opening import backend_of
    from nvlm_trt.engine import Engine

    engine = Engine.open(continued, full_check=True)
    spec = backend_of(engine)
    if spec.complete is None:
        raise NvlmError(f"engine {continued} is complete; serve it with `nvlm-trt serve {continued}`")
    spec.probe()
    with terminal.progress() as progress:
        _note_engine(spec.complete(engine, output, overwrite, progress), output)


def _note_engine(engine: Engine, output: Path) -> None:
    from nvlm_trt.backends.opening import backend_of

    if engine.manifest.calibration:
        _note_calibration(engine.manifest.calibration["samples"])
    _note_gate(engine.manifest.accuracy_gate)
    for line in backend_of(engine).describe(engine):
        terminal.note(line)
    size = sum(record.size for record in engine.manifest.files.values())
    shown = " ".join(f"{name}={value}" for name, value in engine.limits.model_dump().items())
    terminal.note(f"published {output} (NVLM-{engine.config.architecture}, {size / 1e6:.1f} MB, {shown})")


def _options(calibrating: dict[str, Any], judging: dict[str, Any], no_gate: bool) -> QuantizationOptions:
    from nvlm_trt.builders.engine_build import QuantizationOptions
    from nvlm_trt.builders.quantization.gate import GateOptions

    return QuantizationOptions(**_given(calibrating), gate=None if no_gate else GateOptions(**_given(judging)))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the user gave. For the others, the called function has defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(options: dict[str, Any]) -> str:
    """Return the name of the first option that the user gave, without dashes."""
    typed = {"samples": "gate", "count": "gate-samples", "max_drop": "max-accuracy-drop"}
    name = next(iter(_given(options)))
    return typed.get(name, name.replace("_", "-"))


def _note_calibration(samples: dict[str, Any]) -> None:
    if "source" in samples:
        terminal.note(f"calibration: {samples['source']}")
    if "activation_range" in samples:
        terminal.note(f"calibration: none; all activations saturate at {samples['activation_range']:g}")
    if "of" in samples:  # a calibration.json of an earlier version does not say it
        stopped = "; more moved no scale" if samples["count"] < samples["of"] else ""
        terminal.note(f"calibration: {_used(samples)}{stopped}")


def _note_gate(record: dict[str, Any] | None) -> None:
    if record is None:
        return
    if record["result"] == "not measured":
        terminal.note("accuracy gate: not measured")
        return
    unquantised, samples = record["unquantised"], record["samples"]
    scores = f"{100 * record['score']:.2f} points against {100 * record['fp32_score']:.2f} in {unquantised}"
    equal = f"{100 * record['equal_answers']:.1f} % of the answers are the same"
    asked = f"{_used(samples)}{', which leave no doubt' if samples['count'] < samples['of'] else ''}"
    if record["result"] == "meaningless":
        terminal.note(
            f"warning: the accuracy gate says nothing, the {unquantised} engine knows too little ({scores}; {equal}; "
            f"{asked})"
        )
    else:
        terminal.note(f"accuracy gate: passed ({scores}; {equal}; {asked})")


def _used(samples: dict[str, Any]) -> str:
    """Say how many samples were used, from the record of a calibration or a gate."""
    count, of = samples["count"], samples["of"]
    return f"{count} samples" if count == of else f"{count} of {of} samples"
