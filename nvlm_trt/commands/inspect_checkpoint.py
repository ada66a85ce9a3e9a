"""Implements `nvlm-trt inspect`: shows what a checkpoint directory holds, and what to do next."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nvlm_trt import terminal
from nvlm_trt.commands.shared_options import JsonOption

if TYPE_CHECKING:
    from nvlm_trt.checkpoint.inspection import Inspection

_HUB_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")
_FILES_SHOWN = 8


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory in HF layout.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds and lacks, by its headers; reads no weights. Exit status 1: it cannot be built.

    Example: nvlm-trt inspect checkpoints/nvlm-h
    """
    from nvlm_trt.checkpoint.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(checkpoint)
    steps = _next_steps(inspection)
    if as_json:
        print(json.dumps({**inspection.model_dump(), "next": steps}, indent=2, allow_nan=False))
    else:
        _print(inspection, steps)
    if inspection.faults:
        raise typer.Exit(1)


def _next_steps(inspection: Inspection) -> list[str]:
    """List the commands that make sense next."""
    directory = inspection.directory
    if not inspection.faults:
        name = Path(directory).resolve().name
        return [
            f"nvlm-trt plan --checkpoint {directory}",
            f"nvlm-trt build --checkpoint {directory} --output engines/{name}",
            f"nvlm-trt verify engines/{name} --checkpoint {directory}",
        ]
    steps = []
    if any(shard.state == "pointer" for shard in inspection.shards):
        steps.append(f"git -C {directory} lfs pull")
    broken = [shard.name for shard in inspection.shards if shard.state in ("missing", "cut off", "damaged")]
    if broken:
        cached = _HUB_CACHE.search(str(Path(directory).absolute()))
        if cached:
            steps.append(f"hf download {cached['owner']}/{cached['name']} {' '.join(broken)}")
        else:
            steps.append(f"hf download OWNER/NAME {' '.join(broken)} --local-dir {directory}")
    return [*steps, f"nvlm-trt inspect {directory}"] if steps else []


def _print(inspection: Inspection, steps: list[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(_title(inspection)), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("part", no_wrap=True)
    for heading in ("tensors", "parameters", "bytes", "stored as"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, part in inspection.parts.items():
        nbytes = sum(part.nbytes.values())
        dtypes = " ".join(sorted(part.nbytes))
        table.add_row(
            name, str(part.tensors), terminal.scaled(part.parameters, ""), terminal.scaled(nbytes, "B"), dtypes
        )
    console = Console(highlight=False, soft_wrap=True)
    if inspection.parts:
        console.print(table)
    for line in _lines(inspection):
        console.print(line, markup=False)
    for fault in inspection.faults:
        console.print(f"fault: {fault}", markup=False)
    for step in steps:
        console.print(f"next: {step}", markup=False)


def _title(inspection: Inspection) -> str:
    if inspection.model is None:
        return inspection.directory
    return f"{inspection.directory}: NVLM-{inspection.model['architecture']}, {_sizes(inspection.model)}"


def _sizes(model: dict[str, Any]) -> str:
    crossed = f", {model['cross_attention_layers']} cross-attention" if model["cross_attention_layers"] else ""
    return (
        f"{model['vision_layers']} vision layers of {model['vision_hidden_size']}, {model['llm_layers']} "
        f"{model['llm']} layers of {model['llm_hidden_size']}{crossed}, vocabulary {model['vocab_size']}"
    )


def _lines(inspection: Inspection) -> list[str]:
    shards = inspection.shards
    whole = sum(shard.state == "whole" for shard in shards)
    listed = terminal.scaled(inspection.nbytes, "B")
    lines = [f"weight files: {whole} of {len(shards)} whole, their headers list {listed} of tensors"] if shards else []
    broken = [shard for shard in shards if shard.state != "whole"]
    lines += [f"  {shard.name}: {shard.state}" for shard in broken[:_FILES_SHOWN]]
    if len(broken) > _FILES_SHOWN:
        lines.append(f"  and {len(broken) - _FILES_SHOWN} more")
    if inspection.quantised is not None:
        lines.append(
            f"quantised: {inspection.quantised}; fp8 takes its numbers over, other precisions weight times scale"
        )
    if inspection.tokenizer is not None:
        found = inspection.tokenizer
        template = f"chat template in {found.chat_template}" if found.chat_template else "no chat template"
        lines.append(f"tokenizer: {found.ids} ids, {template}; answers end at {' '.join(found.stop_tokens)}")
    if inspection.skipped:
        lines.append(f"skipped on purpose: {len(inspection.skipped)} tensors, the first is {inspection.skipped[0]}")
    return lines
