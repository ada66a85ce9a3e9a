"""Implements `nvlm-trt verify`: every stage of an engine beside the PyTorch reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nvlm_trt import terminal
from nvlm_trt.bounds import MAX_TOKENS
from nvlm_trt.commands.shared_options import CheckpointOption, EngineArgument, JsonOption


def verify(
    engine: EngineArgument,
    checkpoint: CheckpointOption,
    lora: Annotated[Path | None, typer.Option(help="The adapter that the engine was built with.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Greedy tokens to compare.")] = 64,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e6,
            help="Largest absolute difference allowed; default: 0.001, and a share of the largest value for image "
            "tokens in bf16.",
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image to compare on; default: one drawn for the purpose.")] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e6,
            help="GB that an engine on the CPU may take; one that needs more runs a layer at a time [what is free].",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every stage of an engine with the PyTorch reference (needs the extra `reference`).

    The reference is read a layer at a time. A comparison that was killed goes on where it was.

    Example: nvlm-trt verify engines/nvlm-h --checkpoint checkpoints/nvlm-h
    """
    from nvlm_trt.evaluation.parity import verify_engine

    with terminal.progress() as progress:
        bound = None if memory is None else memory * 1e9
        report = verify_engine(engine, checkpoint, image, tokens, tolerance, progress, lora, bound)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        terminal.parity_table(report)
    if not report.passed:
        raise typer.Exit(1)
