"""Implements `nvlm-trt init-checkpoint`: a checkpoint with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvlm_trt import terminal
from nvlm_trt.bounds import MAX_SEED
from nvlm_trt.commands.shared_options import OverwriteOption
from nvlm_trt.extras import require
from nvlm_trt.model.preset_names import PRESET_NAMES


def init_checkpoint(
    directory: Annotated[Path, typer.Argument(help="Directory to write.")],
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESET_NAMES)}.")],
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the random weights.")] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a valid checkpoint with random weights, config and tokenizer.

    Example: nvlm-trt init-checkpoint --preset nvlm-h-tiny --seed 0 checkpoints/nvlm-h
    """
    require("build", "writing a checkpoint")
    from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint as write

    with terminal.progress() as progress:
        write(directory, preset, seed=seed, overwrite=overwrite, progress=progress)
    terminal.note(f"wrote {directory} (random weights of {preset}, seed {seed})")
