"""Implements `nvlm-trt tinydocs`: writes samples of the built-in document tasks, to look at or evaluate elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_trt import terminal
from nvlm_trt.commands.shared_options import OverwriteOption
from nvlm_trt.errors import NvlmError

if TYPE_CHECKING:
    from nvlm_trt.evaluation.samples import Sample

SAMPLES_FILE = "samples.jsonl"


def tinydocs(
    output: Annotated[Path, typer.Option(help="Directory to write images and samples.jsonl to.")],
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="Samples per task.")] = 20,
    split: Annotated[str, typer.Option(help="train, validation or test: they differ in seed and fonts.")] = "test",
    tasks: Annotated[str | None, typer.Option(help="Only these tasks: a,b,c.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write images of small documents with questions and answers, ready for `nvlm-trt eval --samples`.

    Example: nvlm-trt tinydocs --count 20 --output tinydocs
    """
    from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS, generate
    from nvlm_trt.staging import published_directory

    output = output.absolute()
    _check_output(output, overwrite)
    chosen = [task.strip() for task in tasks.split(",")] if tasks is not None else [*TASKS, *TEXT_TASKS]
    samples = generate(split, chosen, count)  # type: ignore[arg-type]  # it checks split and tasks
    total = len(chosen) * count
    publishing = published_directory(output, lambda: _check_output(output, overwrite), overwrite)
    with publishing as staging, terminal.progress() as progress:
        (staging / "images").mkdir()
        with (staging / SAMPLES_FILE).open("w", encoding="utf-8") as file:
            for done, sample in enumerate(samples, start=1):
                file.write(json.dumps(_write_images(sample, staging), allow_nan=False) + "\n")
                progress("drawing samples", done, total)
    terminal.note(f"wrote {output} ({total} samples of {len(chosen)} tasks, split {split})")


def _check_output(output: Path, overwrite: bool) -> None:
    from nvlm_trt.staging import is_replaceable

    if not os.path.lexists(output):
        return
    if not overwrite:
        raise NvlmError(f"{output} exists; choose another directory or pass --overwrite")
    if not is_replaceable(output, SAMPLES_FILE):
        raise NvlmError(f"{output} holds no {SAMPLES_FILE}, so it is not overwritten; choose another directory")


def _write_images(sample: Sample, directory: Path) -> dict[str, object]:
    """Writes the images of a sample; returns its line of JSONL."""
    paths = []
    for number, image in enumerate(sample.images, start=1):
        paths.append(f"images/{sample.name}-{number}.png" if len(sample.images) > 1 else f"images/{sample.name}.png")
        (directory / paths[-1]).write_bytes(image)
    image_keys = {"images": paths} if len(paths) > 1 else {"image": paths[0]} if paths else {}
    return {
        "name": sample.name,
        "task": sample.task,
        **image_keys,
        "prompt": sample.prompt,
        "answer": sample.answer,
        "metric": sample.metric,
    }
