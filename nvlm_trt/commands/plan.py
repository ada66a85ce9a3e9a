"""Implements `nvlm-trt plan`: memory and least times of an engine before it is built."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_trt import terminal
from nvlm_trt.backends.table import DEFAULT_BACKEND, backend_names, default_precisions, find_backend
from nvlm_trt.bounds import MAX_TOKENS
from nvlm_trt.errors import EngineError, NvlmError
from nvlm_trt.model.preset_names import PRESET_NAMES
from nvlm_trt.planner.gpus import GPUS, check_gpu, find_gpu
from nvlm_trt.terminal import scaled

if TYPE_CHECKING:
    from nvlm_trt.backends.spec import BackendSpec
    from nvlm_trt.limits import EngineLimits
    from nvlm_trt.model.config import NvlmConfig
    from nvlm_trt.planner.gpus import Gpu
    from nvlm_trt.planner.memory import EnginePlan
    from nvlm_trt.planner.roofline import Work

_LEAST_RATE, _MOST_RATE = 1e-6, 1e9
_PRESET_TAG_LENGTH = 1  # a tile tag is one token of the tokenizer that `nvlm-trt init-checkpoint` writes


def plan(
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint directory in HF layout.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Instead of a checkpoint: {', '.join(PRESET_NAMES)}.")] = None,
    backend: Annotated[str, typer.Option(help=f"{' or '.join(backend_names())}.")] = DEFAULT_BACKEND,
    precision: Annotated[str | None, typer.Option(help=f"As for `nvlm-trt build` [{default_precisions()}].")] = None,
    max_slots: Annotated[int | None, typer.Option(min=1, help="Requests decoded at once [8].")] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer in the LLM [4096].")
    ] = None,
    max_image_tokens: Annotated[
        int | None, typer.Option(min=0, help="Cross-attended tokens per request (X, H) [four images' worth].")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Text tokens of the prompt.")] = 128,
    tiles: Annotated[
        int | None,
        typer.Option(min=0, help="Tiles of the prompt's image, thumbnail included [the most that fit]; 0: no image."),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Memory bandwidth in GB/s; with --tflops: shows the least times.")
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="10^12 operations per second in this precision.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help=f"Instead of --bandwidth and --tflops, a GPU's data sheet: {', '.join(GPUS)}."),
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="GPUs that share every layer (tensorrt-llm) [1].")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline stages (tensorrt-llm) [1].")] = None,
    memory_share: Annotated[
        float | None, typer.Option(help="Share of a GPU's memory for the engine (tensorrt-llm) [0.9].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Plan an engine before it is built: its memory, and the least time of a prompt and of a token.

    Example: nvlm-trt plan --preset nvlm-d-72b --backend tensorrt --precision fp8 --gpu h200
    """
    if (checkpoint is None) == (preset is None):
        raise NvlmError(f"name either a checkpoint or a preset: --checkpoint DIR, or --preset {PRESET_NAMES[0]}")
    spec = find_backend(backend)
    precision = precision or spec.precisions.default
    device = _device(gpu, spec)
    _check_rates(bandwidth, tflops, gpu)
    from nvlm_trt.planner.fleet import splits
    from nvlm_trt.planner.limits import engine_limits
    from nvlm_trt.planner.memory import plan_engine
    from nvlm_trt.planner.roofline import Roofline
    from nvlm_trt.prompt.image_tokens import count_image_tokens

    split = splits(spec)
    _check_fleet_options(spec, split, {"--tp": tp, "--pp": pp, "--memory-share": memory_share}, bandwidth)
    precisions = spec.precisions.parse(precision)
    config, tag_length, checkpoint_bytes = _model(checkpoint, preset)
    if device is not None:
        check_gpu(device, precisions, split, crosses=bool(config.cross_layers))
    chosen = {"max_slots": max_slots, "max_seq_len": max_seq_len, "max_image_tokens": max_image_tokens}
    given = {name: value for name, value in chosen.items() if value is not None}
    limits = engine_limits(config, tag_length, given)
    tiles = _tiles(config, limits, tag_length, text_tokens, tiles)
    planned = plan_engine(config, limits, precisions, spec, tag_length, checkpoint_bytes)
    roofline = Roofline(config, limits, precisions, spec, tag_length)
    prefill = roofline.prefill(text_tokens, tiles)
    in_llm, cross = count_image_tokens(config, tiles, tag_length)
    decode = roofline.decode(1, text_tokens + in_llm + 1, cross)
    works = {**{f"prefill {stage}": work for stage, work in prefill.items()}, "decode": decode}
    one = None if split else device
    times = {name: _seconds(name, work, precisions, bandwidth, tflops, one) for name, work in works.items()}
    title = f"{config.name}, {precision}, {backend}: {_shown(limits)}"
    fleet = None
    if split:
        from nvlm_trt.commands.plan_fleet import FleetReport

        fleet = FleetReport.make(
            config, limits, precisions, spec, tag_length, tp or 1, pp or 1, device, memory_share, text_tokens, tiles
        )
    if as_json:
        print(
            json.dumps(
                {
                    "model": config.name,
                    "backend": backend,
                    "precision": precisions,
                    "limits": limits.model_dump(),
                    "memory": asdict(planned),
                    "prompt": {"text_tokens": text_tokens, "tiles": tiles},
                    "roofline": {name: {**asdict(work), "seconds": times[name]} for name, work in works.items()},
                    **({"gpu": _gpu_record(device)} if device else {}),
                    **({"fleet": fleet.to_dict()} if fleet else {}),
                },
                indent=2,
                allow_nan=False,
            )
        )
    elif fleet:
        fleet.show(title)
    else:
        _print_table(title, planned, works, times, f"{text_tokens} text tokens, {tiles} tiles")
        if spec.memory.whole_cross_cache and config.cross_layers:
            _, image = count_image_tokens(config, config.tiles_per_image, tag_length)
            terminal.note(
                f"{spec.name} reads all {limits.max_image_tokens} cross-attended tokens of a slot at every token, used "
                f"or not; an image has at most {image}: choose --max-image-tokens for the images of one request"
            )


def _device(name: str | None, spec: BackendSpec) -> Gpu | None:
    if name is None:
        return None
    if spec.memory.device != "gpu":
        raise NvlmError(f"the backend {spec.name} runs on the CPU; leave out --gpu, or choose another --backend")
    return find_gpu(name)


def _check_rates(bandwidth: float | None, tflops: float | None, gpu: str | None) -> None:
    rates = [rate for rate in (bandwidth, tflops) if rate is not None]
    if gpu is not None and rates:
        raise NvlmError("--gpu has a bandwidth and rates of its own; give it, or --bandwidth and --tflops")
    if len(rates) == 1 or not all(_LEAST_RATE <= rate <= _MOST_RATE for rate in rates):
        raise NvlmError(
            f"a time follows from both --bandwidth and --tflops, above 0 ({_LEAST_RATE:g} to {_MOST_RATE:g}); give "
            "both or none"
        )


def _check_fleet_options(
    spec: BackendSpec, split: bool, options: dict[str, float | None], bandwidth: float | None
) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given and not split:
        raise NvlmError(f"{given[0]}: an engine of {spec.name} runs on one device; leave it out")
    if split and bandwidth is not None:
        raise NvlmError(f"the times of {spec.name} depend on the links between GPUs too; give --gpu instead")
    share = options["--memory-share"]
    if share is not None and not 0 < share <= 1:
        raise NvlmError(f"--memory-share {share:g} is not a share of the memory; give a number above 0, at most 1")


def _seconds(
    name: str, work: Work, precisions: dict[str, str], bandwidth: float | None, tflops: float | None, gpu: Gpu | None
) -> float | None:
    """Compute the least time of the work of this name at a data sheet's rates, or at the user's. None: unknown."""
    if gpu is not None:
        components = {"prefill vision_encoder": "vision_encoder", "prefill cross_kv": "cross_attention"}
        return work.seconds(gpu.bandwidth.value, gpu.rate(precisions[components.get(name, "decoder")]))
    return work.seconds(bandwidth * 1e9, tflops * 1e12) if bandwidth and tflops else None


def _gpu_record(gpu: Gpu) -> dict[str, object]:
    return {"name": gpu.name, "title": gpu.title, **{name: asdict(figure) for name, figure in gpu.figures.items()}}


def _model(checkpoint: Path | None, preset: str | None) -> tuple[NvlmConfig, int, int | None]:
    """Return the config, the tokens of a tile tag, and the bytes of the checkpoint's weight files (None: a preset)."""
    if preset is not None:
        from nvlm_trt.model.presets import find_preset

        return find_preset(preset), _PRESET_TAG_LENGTH, None
    from nvlm_trt.checkpoint.reader import Checkpoint
    from nvlm_trt.prompt.encoder import PromptEncoder
    from nvlm_trt.prompt.tokenizer import Tokenizer

    assert checkpoint is not None
    with Checkpoint.open(checkpoint) as opened:
        tag_length = PromptEncoder(opened.config, Tokenizer.from_directory(checkpoint)).tag_length
        return opened.config, tag_length, sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def _tiles(config: NvlmConfig, limits: EngineLimits, tag_length: int, text_tokens: int, tiles: int | None) -> int:
    """Return the tiles of the prompt's image: `tiles`, or as many as fit. Raises EngineError for a prompt that the
    engine does not hold."""
    from nvlm_trt.prompt.image_tokens import count_image_tokens

    if tiles is not None and tiles > config.tiles_per_image:
        raise EngineError(f"an image has at most {config.tiles_per_image} tiles, not {tiles}; lower --tiles")
    for count in range(config.tiles_per_image, -1, -1) if tiles is None else [tiles]:
        in_llm, cross = count_image_tokens(config, count, tag_length)
        if text_tokens + in_llm < limits.max_seq_len and cross <= limits.max_image_tokens:
            return count
    if cross > limits.max_image_tokens:
        raise EngineError(
            f"{count} tiles have {cross} cross-attended tokens, the engine would hold {limits.max_image_tokens}; lower "
            "--tiles, or raise --max-image-tokens"
        )
    raise EngineError(
        f"a prompt of {text_tokens} text tokens and {count} tiles has {text_tokens + in_llm} tokens in the LLM, the "
        f"engine would hold {limits.max_seq_len} with the answer; lower --text-tokens or --tiles, or raise "
        "--max-seq-len"
    )


def _shown(limits: EngineLimits) -> str:
    return " ".join(f"{name}={value}" for name, value in limits.model_dump().items())


def _print_table(
    title: str, planned: EnginePlan, works: dict[str, Work], times: dict[str, float | None], prompt: str
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("", "bytes", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in _memory_rows(planned):
        table.add_row(*row)
    table.add_section()
    for name, work in works.items():
        seconds = times[name]
        shown = "" if seconds is None else f"{1e3 * seconds:.2f} ms"
        table.add_row(name, scaled(work.flops, "FLOP"), scaled(work.nbytes, "B"), shown)
    table.caption = f"{prompt}, then one token; activations and peaks are estimates"
    table.caption_justify = "left"
    Console(highlight=False).print(table)


def _memory_rows(planned: EnginePlan) -> Iterator[tuple[str, ...]]:
    for component, nbytes in planned.weights.items():
        parameters = planned.parameters.get(component)
        yield f"{component} weights", scaled(parameters, " parameters") if parameters else "", scaled(nbytes, "B")
    rows = {
        "KV cache": planned.self_cache,
        "cross-attention cache": planned.cross_cache,
        "activations": sum(stage.activations for stage in planned.stages.values()),
        "image cache, at most": planned.image_cache,
        "peak while serving": planned.peak_running,
        "peak while building": planned.peak_building,
        "host memory while building": planned.host_building,
        "checkpoint": planned.checkpoint,
    }
    for name, nbytes in rows.items():
        if nbytes:
            yield name, "", scaled(nbytes, "B")
