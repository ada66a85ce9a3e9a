"""The arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EngineArgument = Annotated[Path, typer.Argument(help="Engine directory that `nvlm-trt build` made.")]
CheckpointOption = Annotated[Path, typer.Option(help="Checkpoint directory in HF layout.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing directory of that name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=4096, help="CPU threads per engine; default: all usable cores.")
]
