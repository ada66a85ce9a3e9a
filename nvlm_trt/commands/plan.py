"""Implements `nvlm-trt plan`: memory, times, the cost of a build, and replicas, of an engine that need not exist."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_trt import terminal
from nvlm_trt.backends.table import backend_names, default_precisions
from nvlm_trt.bounds import MAX_SLOTS, MAX_TOKENS
from nvlm_trt.errors import NvlmError
from nvlm_trt.model.preset_names import PRESET_NAMES
from nvlm_trt.planner.gpus import GPUS

if TYPE_CHECKING:
    from nvlm_trt.commands.plan_device import Device
    from nvlm_trt.commands.plan_load import Load
    from nvlm_trt.commands.plan_model import PlannedModel
    from nvlm_trt.commands.plan_sections import Section
    from nvlm_trt.planner.design import EngineDesign
    from nvlm_trt.planner.step_times import StepTimes


def plan(
    engine: Annotated[Path | None, typer.Argument(help="Engine directory that was built already.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint directory in HF layout.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Instead of a checkpoint: {', '.join(PRESET_NAMES)}.")] = None,
    backend: Annotated[str | None, typer.Option(help=f"{' or '.join(backend_names())} [{backend_names()[0]}].")] = None,
    precision: Annotated[str | None, typer.Option(help=f"As for `nvlm-trt build` [{default_precisions()}].")] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", "--max-slots", min=1, max=MAX_SLOTS, help="Requests decoded at once [8]."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", "--max-seq-len", min=1, max=MAX_TOKENS, help="Tokens of prompt and answer [4096]."),
    ] = None,
    max_image_tokens: Annotated[
        int | None, typer.Option(min=0, help="Cross-attended tokens per request (X, H) [four images' worth].")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Text tokens of the prompt.")] = 128,
    tiles: Annotated[
        int | None,
        typer.Option(min=0, help="Tiles of the prompt's image, thumbnail included [the most that fit]; 0: no image."),
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of an answer (--fleet).")] = 128,
    gpu: Annotated[str | None, typer.Option(help=f"The GPU: auto (nvidia-smi names it), {', '.join(GPUS)}.")] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_SLOTS,
            help="GPUs: tensorrt-llm splits one engine over them, others have an engine on each [1].",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Instead of --gpu, the device's memory bandwidth in GB/s, with --tflops.")
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="10^12 operations per second in this precision.")] = None,
    memory: Annotated[
        float | None, typer.Option(help="The device's memory in GB [--gpu's; on the CPU this machine's].")
    ] = None,
    memory_share: Annotated[float, typer.Option(help="Share of the memory for the engine.")] = 0.9,
    tp: Annotated[int | None, typer.Option(min=1, help="Instead of --gpus: GPUs that share every layer.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="With --tp: pipeline stages.")] = None,
    disk_bandwidth: Annotated[float, typer.Option(help="GB/s of the disk, for the time of the build.")] = 1.0,
    fleet: Annotated[
        float | None, typer.Option(help="Requests per second: simulates how many replicas they need.")
    ] = None,
    slo_ttft: Annotated[
        float | None, typer.Option(help="Most milliseconds to the first token [2000 without --slo-itl].")
    ] = None,
    slo_itl: Annotated[
        float | None, typer.Option(help="Most milliseconds per later token [100 without --slo-ttft].")
    ] = None,
    step_times: Annotated[
        Path | None, typer.Option(help="JSON of measured step times (docs/plan.md) instead of planned ones.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Plan an engine: memory and slots, times of a request, the cost of the build, replicas for a rate of requests.

    Example: nvlm-trt plan --preset nvlm-d-72b --backend tensorrt-llm --precision fp8 --gpu h100 --gpus 4 --fleet 5
    """
    from nvlm_trt.commands.plan_device import find_device
    from nvlm_trt.commands.plan_load import Load
    from nvlm_trt.commands.plan_model import find_model
    from nvlm_trt.planner.fleet import splits
    from nvlm_trt.planner.gpus import check_gpu

    limits = {"max_slots": concurrency, "max_seq_len": context, "max_image_tokens": max_image_tokens}
    model = find_model(engine, checkpoint, preset, backend, precision, limits)
    design = model.design
    split = splits(design.backend)
    device = find_device(design.backend, gpu, bandwidth, tflops, memory)
    on_cpu = design.backend.memory.device == "host"
    several = {"--tp": tp, "--pp": pp, **({"--gpus": gpus} if on_cpu else {})}
    _check_options(design, split, several, bandwidth, memory_share, disk_bandwidth)
    if device.gpu is not None:
        check_gpu(device.gpu, design.precisions, split, crosses=bool(design.config.cross_layers))
    load = Load.of(design, text_tokens, tiles, model.concurrency)
    degrees = _degrees(model, gpus, tp, pp, device) if split else (1, 1)
    times = _times(design, device, degrees, split)
    sections = list(_sections(model, device, degrees, split, load, times, gpus or 1, memory_share, disk_bandwidth))
    if fleet is not None:
        from nvlm_trt.commands.plan_replicas import ReplicasSection, find_steps, find_traffic, slo_of

        sections.append(
            ReplicasSection.of(
                design.with_limits(max_slots=model.concurrency),
                find_steps(times, step_times),
                find_traffic(design, load, output_tokens),
                fleet,
                slo_of(slo_ttft, slo_itl),
                gpus=0 if on_cpu else degrees[0] * degrees[1],
            )
        )
    elif step_times is not None or slo_ttft is not None or slo_itl is not None:
        raise NvlmError("--step-times, --slo-ttft and --slo-itl are about a rate of requests; give --fleet, too")
    if as_json:
        record = {
            "model": design.config.name,
            "engine": None if engine is None else str(engine),
            "backend": design.backend.name,
            "precision": dict(design.precisions),
            "limits": design.limits.model_dump(),
            "prompt": {"text_tokens": text_tokens, "tiles": load.tiles},
            "device": device.to_dict(),
        }
        for section in sections:
            record |= section.to_dict()
        print(json.dumps(record, indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    shown = " ".join(f"{name}={value}" for name, value in design.limits.model_dump().items())
    on = f", tp={degrees[0]} pp={degrees[1]}" if split else ""
    title = f"{design.config.name}, {model.precision}, {design.backend.name}: {shown}{on}"
    console.print(title, markup=False, soft_wrap=True)
    for section in sections:
        section.show(console)
    if design.backend.memory.whole_cross_cache and design.config.cross_layers:
        terminal.note(
            f"{design.backend.name} reads all {design.limits.max_image_tokens} cross-attended tokens of a slot at "
            "every token, used or not: choose --max-image-tokens for the images of one request"
        )


def _check_options(
    design: EngineDesign,
    split: bool,
    several: dict[str, int | None],
    bandwidth: float | None,
    share: float,
    disk_bandwidth: float,
) -> None:
    given = [name for name, value in several.items() if value is not None]
    if given and not split:
        raise NvlmError(f"{given[0]}: an engine of {design.backend.name} runs on one device; leave it out")
    if split and bandwidth is not None:
        raise NvlmError(f"the times of {design.backend.name} depend on the links between GPUs too; give --gpu instead")
    if not 0 < share <= 1:
        raise NvlmError(f"--memory-share {share:g} is not a share of the memory; give a number above 0, at most 1")
    if not 1e-6 <= disk_bandwidth <= 1e6:
        raise NvlmError(f"--disk-bandwidth {disk_bandwidth:g} is not a speed in GB/s; give 1 for example")


def _degrees(model: PlannedModel, gpus: int | None, tp: int | None, pp: int | None, device: Device) -> tuple[int, int]:
    from nvlm_trt.commands.plan_fleet import choose_split

    if model.engine is not None:
        if (tp, pp) != (None, None) or gpus not in (None, model.tp * model.pp):
            raise NvlmError(
                f"the engine {model.engine} was built for tp={model.tp} pp={model.pp}; leave out --tp, --pp and --gpus"
            )
        return model.tp, model.pp
    return choose_split(model.design.config, gpus, tp, pp, device.gpu)


def _times(design: EngineDesign, device: Device, degrees: tuple[int, int], split: bool) -> StepTimes | None:
    if split:
        from nvlm_trt.planner.fleet import check_parallel
        from nvlm_trt.planner.fleet_times import FleetTimes

        check_parallel(design.config, *degrees)
        return FleetTimes(design, *degrees, device.gpu) if device.gpu else None
    if device.bandwidth is None or device.rate is None:
        return None
    from nvlm_trt.planner.step_times import DeviceTimes

    return DeviceTimes(design, device.bandwidth, device.rate)


def _sections(
    model: PlannedModel,
    device: Device,
    degrees: tuple[int, int],
    split: bool,
    load: Load,
    times: StepTimes | None,
    engines: int,
    share: float,
    disk_bandwidth: float,
) -> Iterator[Section]:
    from nvlm_trt.commands.plan_sections import BuildSection, Calibration, MemorySection, TimesSection
    from nvlm_trt.planner.build_cost import build_cost
    from nvlm_trt.planner.fit import find_fit
    from nvlm_trt.planner.memory import plan_engine

    design = model.design
    planned = plan_engine(design, model.checkpoint_bytes)
    if split:
        from nvlm_trt.commands.plan_fleet import FleetSection
        from nvlm_trt.planner import fleet_times

        yield FleetSection.of(design, *degrees, device.gpu, share)
        others = {
            "link efficiency": fleet_times.LINK_EFFICIENCY,
            "seconds per message": fleet_times.MESSAGE_SECONDS,
        }
        engines = 1
    else:
        fit = find_fit(design, device.memory, share, device.gpu) if device.memory else None
        yield MemorySection(planned, fit, device.title, model.engine is not None)
        others = {}
    if times is not None:
        yield TimesSection.of(times, load, engines, others)
    if model.engine is None:
        yield BuildSection(build_cost(design, planned), disk_bandwidth * 1e9, Calibration.of(design, load))
