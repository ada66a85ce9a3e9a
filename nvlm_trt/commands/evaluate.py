"""Implements `nvlm-trt eval`: asks an engine, a server or the PyTorch reference questions with known answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from nvlm_trt import terminal
from nvlm_trt.bounds import MAX_COUNT
from nvlm_trt.commands.decode_budget import DecodeMemoryOption, DecodeSecondsOption, image_limits
from nvlm_trt.commands.shared_options import JsonOption
from nvlm_trt.errors import NvlmError, RequestError
from nvlm_trt.extras import require

if TYPE_CHECKING:
    from nvlm_trt.evaluation.answerers import Answerer
    from nvlm_trt.evaluation.results import Header, SavedResults
    from nvlm_trt.evaluation.samples import Sample
    from nvlm_trt.image.decoding import ImageLimits
    from nvlm_trt.progress import Progress

_TINYDOCS_COUNT = 200
_MOST_TOLERANCE = 1e6
_NAMED_DIFFERENCES = 5
# answers of two runs are comparable if these parts of their headers are equal; the models may differ
_COMPARABLE = ("schema_version", "samples", "options")


def evaluate(
    engine: Annotated[Path | None, typer.Option(help="Engine directory, run in this process.")] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A running server: grpc://host:port, or the http:// address of an OpenAI endpoint."),
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="Checkpoint, run by the PyTorch reference.")] = None,
    lora: Annotated[
        Path | None, typer.Option(help="LoRA adapter of PEFT, merged into the weights of --reference.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="JSONL of {image, prompt, answer}; default: TinyDocs, drawn here.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of TinyDocs: train, validation or test [test].")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks: a,b,c.")] = None,
    count: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Samples per task [TinyDocs 200, of --samples all].")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="For lines of --samples that name none: exact, contains, anls or numeric [exact]."),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Relative, for the metric numeric; 0.05 as ChartQA.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Most tokens of an answer.")] = 32,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help="Samples asked at once [the engine's slots, a server 8, the reference one per core].",
        ),
    ] = None,
    max_decode_seconds: DecodeSecondsOption = None,
    max_decode_memory: DecodeMemoryOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Results as JSON; an interrupted run of the same command goes on.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 if the mean over all tasks is below.")
    ] = None,
    agree_with: Annotated[
        Path | None, typer.Option(help="Results of another run; exit with 1 unless every answer is the same.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask questions with known answers, score by task with 95 % intervals, text-only tasks apart.

    Example: nvlm-trt eval --engine engines/nvlm-h --samples invoices.jsonl --metric anls --output results.json
    """
    require("eval", "evaluating")
    from nvlm_trt.evaluation import accuracy
    from nvlm_trt.evaluation.results import ResultsFile, read_results
    from nvlm_trt.evaluation.samples import digest_of

    if not (math.isfinite(tolerance) and tolerance <= _MOST_TOLERANCE):
        raise NvlmError(
            f"--tolerance {tolerance} is not a finite number up to {_MOST_TOLERANCE:g}; 0.05 allows 5 % to either side"
        )
    options = accuracy.EvalOptions(max_tokens, tolerance)
    limits = image_limits(max_decode_seconds, max_decode_memory)
    other = read_results(agree_with) if agree_with else None
    with terminal.progress() as progress:
        chosen = _samples(samples, split, tasks, count, metric, progress)
        digest = digest_of(chosen, progress, limits)
        answerer = _answerer(engine, url, reference, lora, max_tokens, concurrency, limits)
        header = accuracy.run_header(digest, len(chosen), answerer, options)
        if other:
            _check_comparable(other, header)
        with ResultsFile(output, header, [sample.name for sample in chosen]) as results:
            try:
                summary = accuracy.evaluate(chosen, answerer, results, options, progress)
            except KeyboardInterrupt:
                terminal.note(f"interrupted ({accuracy.kept(results, len(chosen))})")
                raise
            document = accuracy.document(chosen, results, summary, options)
            results.publish(document)
    if as_json:
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        terminal.accuracy_table(summary, str(answerer.identity))
    failed = False
    if other:
        same = accuracy.agreement(results.answers, other.answers)
        terminal.note(f"{same.equal} of {same.total} answers equal those in {agree_with}")
        if same.differing:
            terminal.note(f"different: {_few(same.differing)}")
            failed = True
    # in floating point a mean of 0.9 may come out as 0.8999999999999999
    if min_score is not None and summary.overall.score < min_score - 1e-9:
        terminal.note(f"the mean over all tasks is {summary.overall.score:.4f}, below --min-score {min_score}")
        failed = True
    if failed:
        raise typer.Exit(1)


def _samples(
    path: Path | None, split: str | None, tasks: str | None, count: int | None, metric: str | None, progress: Progress
) -> list[Sample]:
    wanted = None if tasks is None else [task.strip() for task in tasks.split(",") if task.strip()]
    if wanted == []:
        raise RequestError(f"--tasks {tasks!r} names no task; separate names by commas")
    if path is None:
        if metric is not None:
            raise RequestError("--metric is for --samples; the tasks of TinyDocs have their own")
        return _draw_tinydocs(split or "test", wanted, count or _TINYDOCS_COUNT, progress)
    if split is not None:
        raise RequestError("--split is for TinyDocs; a file of --samples is one split")
    from nvlm_trt.evaluation.samples import read_samples
    from nvlm_trt.evaluation.scoring import Metric

    if metric is not None and metric not in get_args(Metric):
        raise RequestError(f"--metric {metric!r} is not one of {', '.join(get_args(Metric))}")
    samples = read_samples(path, metric or "exact")  # type: ignore[arg-type]
    known = dict.fromkeys(sample.task for sample in samples)
    for task in wanted or ():
        if task not in known:
            raise RequestError(f"{path} has no task {task!r}; it has {', '.join(known)}")
    return _first_of_each_task([s for s in samples if wanted is None or s.task in wanted], count)


def _draw_tinydocs(split: str, tasks: Sequence[str] | None, count: int, progress: Progress) -> list[Sample]:
    from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS, generate

    tasks = list(dict.fromkeys(tasks or (*TASKS, *TEXT_TASKS)))
    samples: list[Sample] = []
    for sample in generate(split, tasks, count):  # type: ignore[arg-type]  # it checks split and tasks
        samples.append(sample)
        progress("drawing samples", len(samples), len(tasks) * count)
    return samples


def _first_of_each_task(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    taken: dict[str, int] = {}
    first = []
    for sample in samples:
        taken[sample.task] = taken.get(sample.task, 0) + 1
        if count is None or taken[sample.task] <= count:
            first.append(sample)
    return first


def _answerer(
    engine: Path | None,
    url: str | None,
    reference: Path | None,
    lora: Path | None,
    max_tokens: int,
    concurrency: int | None,
    limits: ImageLimits,
) -> Answerer:
    if sum(source is not None for source in (engine, url, reference)) != 1:
        raise NvlmError("name who answers: pass one of --engine DIR, --url grpc://host:port and --reference CHECKPOINT")
    if lora is not None and reference is None:
        raise NvlmError("--lora is for --reference; an engine has its adapter from `nvlm-trt build --lora`")
    if url is not None and url.startswith(("http://", "https://")):
        from nvlm_trt.serving.openai_answerer import OpenAiAnswerer

        return OpenAiAnswerer(url, max_tokens, concurrency)
    if url is not None:
        from nvlm_trt.serving.server_answerer import ServerAnswerer

        return ServerAnswerer(url, max_tokens, concurrency)
    from nvlm_trt.evaluation.answerers import EngineAnswerer, ReferenceAnswerer

    if engine is not None:
        return EngineAnswerer(engine, max_tokens, concurrency, limits)
    assert reference is not None
    return ReferenceAnswerer(reference, max_tokens, concurrency, lora)


def _check_comparable(other: SavedResults, header: Header) -> None:
    other.check(header, _COMPARABLE, "compare runs of the same samples and options")


def _few(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_DIFFERENCES
    return ", ".join(names[:_NAMED_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
