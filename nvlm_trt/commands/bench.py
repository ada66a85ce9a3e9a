"""Implements `nvlm-trt bench`: measures latency and throughput of a server under load, and compares two runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_trt import terminal
from nvlm_trt.bounds import MAX_SEED, MAX_TILES
from nvlm_trt.commands.shared_options import JsonOption
from nvlm_trt.errors import NvlmError, RequestError
from nvlm_trt.extras import require

if TYPE_CHECKING:
    from nvlm_trt.benchmark.load import Load
    from nvlm_trt.benchmark.report import Report
    from nvlm_trt.benchmark.results_document import Document
    from nvlm_trt.benchmark.runner import Outcome
    from nvlm_trt.benchmark.target import Target
    from nvlm_trt.benchmark.triton_metrics import TritonMetrics

_CONCURRENCY = "1,2,4,8"
_MOST_LOADS = 100
_MOST_MILLISECONDS = 1e9

bench = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@bench.callback()
def measure(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="The running server, grpc://host:port.")] = None,
    metrics_url: Annotated[
        str | None,
        typer.Option(help="The server's metrics, http://host:port/metrics [port 8002 for a server at port 8001]."),
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help=f"Closed loop: requests at once, one load per number [{_CONCURRENCY}].")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loop: requests per second, one load per number: 0.5,1,2.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="Measured requests per load.")] = 64,
    warmup: Annotated[
        int | None,
        typer.Option(min=0, max=1_000_000, help="Unmeasured requests first [the load's concurrency; with --rate 8]."),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="Tokens of the question's text: 64, or 16:128 for any from 16 to 128.")
    ] = "64",
    output_tokens: Annotated[str, typer.Option(help="Tokens of every answer: 64, or 16:128.")] = "64",
    images: Annotated[int, typer.Option(min=0, max=1_000_000, help="Images per request.")] = 1,
    image_size: Annotated[str, typer.Option(help="Pixels; of several, 448x448,1344x896, each image draws one.")] = (
        "1344x896"
    ),
    repeat_images: Annotated[
        bool,
        typer.Option("--repeat-images", help="Same images in all requests: the server's cache holds them."),
    ] = False,
    max_tiles: Annotated[
        int | None, typer.Option(min=1, max=MAX_TILES, help="Most tiles per image, thumbnail not counted.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of texts, lengths, sizes and arrivals.")] = 0,
    slo_ttft: Annotated[float | None, typer.Option(help="Goodput: most milliseconds to the first token.")] = None,
    slo_itl: Annotated[float | None, typer.Option(help="Goodput: most milliseconds per later token.")] = None,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Client processes that share the load.")] = 1,
    timeout: Annotated[
        float, typer.Option(min=0.001, max=1e7, help="Seconds after which a request has failed.")
    ] = 1800,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory with the model's tokenizer.json [the engine's, if it is here].")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results, rewritten after every load.")] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file of the results, a row per load.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for latency.png and stages.png.")] = None,
    records: Annotated[bool, typer.Option("--records", help="Put every request's timestamps into the JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files of these names.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a running server under load, or compare two such measurements.

    Example: nvlm-trt bench --url grpc://127.0.0.1:8001 --concurrency 1,4,8 --output a.json --plots plots
    """
    if context.invoked_subcommand:
        _no_options_before(context)
        return
    if url is None:
        raise NvlmError("no server is named; pass --url grpc://host:port of a running `nvlm-trt serve`")
    from nvlm_trt.benchmark.plan import Plan
    from nvlm_trt.benchmark.prompts import PromptWriter
    from nvlm_trt.benchmark.report import Report
    from nvlm_trt.benchmark.results_csv import to_csv
    from nvlm_trt.benchmark.results_document import write_whole
    from nvlm_trt.benchmark.runner import run
    from nvlm_trt.benchmark.slo import Slo
    from nvlm_trt.benchmark.target import Target
    from nvlm_trt.benchmark.workload import ImageSize, Lengths, Workload

    workload = Workload(
        prompt_tokens=Lengths.parse(prompt_tokens, "--prompt-tokens"),
        output_tokens=Lengths.parse(output_tokens, "--output-tokens"),
        images=images,
        image_sizes=tuple(ImageSize.parse(size, "--image-size") for size in image_size.split(",")),
        repeat_images=repeat_images,
        max_tiles=max_tiles,
        requests=requests,
        warmup=warmup,
        seed=seed,
    )
    slo = Slo(_seconds(slo_ttft, "--slo-ttft"), _seconds(slo_itl, "--slo-itl"))
    loads = _loads(concurrency, rate, requests, seed)
    if plots:
        require("bench", "drawing --plots")
    _check_outputs({"--output": output, "--csv": csv}, plots, overwrite)
    target = Target.connect(url)
    prompts = PromptWriter(target.tokenizer(tokenizer))
    if target.replaced:
        terminal.note(
            f"note: {target.engine} was replaced since the server loaded it; measured is the engine that was loaded "
            f"(digest {str(target.digest)[:12]}); restart the server to measure the new one"
        )
    plan = Plan(url, workload, loads, processes, timeout, _server_metrics(target, metrics_url))
    report = Report(plan, target, slo, output, records)
    report.publish(overwrite)  # fails now, before anything is measured, if the file cannot be written
    with terminal.progress() as progress:
        outcome = run(plan, prompts, report.add, progress)
    report.finish(outcome)
    _print(report.document, as_json)
    if csv:
        write_whole(csv, to_csv(report.document), overwrite)
    if plots:
        _plot(report.document, plots, overwrite)
    _end(report, outcome)


@bench.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Results that `nvlm-trt bench --output` wrote.")],
    b: Annotated[Path, typer.Argument(help="Results of the same workload.")],
    as_json: JsonOption = False,
) -> None:
    """Show two measurements of one workload side by side.

    Example: nvlm-trt bench compare fp32.json int8.json
    """
    from nvlm_trt.benchmark.compare import compare as compare_results
    from nvlm_trt.benchmark.tables import print_comparison

    comparison = compare_results(a, b)
    if as_json:
        print(json.dumps(comparison.to_dict(), indent=2, allow_nan=False))
        return
    print_comparison(comparison)
    for note in comparison.notes:
        terminal.note(f"note: {note}")


def _no_options_before(context: typer.Context) -> None:
    """Refuses `bench --url X compare A B`: it would not measure anything."""
    # compares names: typer uses click or its own copy of click, whose enums differ
    sources = {name: getattr(context.get_parameter_source(name), "name", "") for name in context.params}
    given = [name for name, source in sources.items() if source == "COMMANDLINE"]
    if given:
        option = "json" if given[0] == "as_json" else given[0].replace("_", "-")
        raise RequestError(
            f"--{option} is for measuring, not for `bench {context.invoked_subcommand}`; leave it out, or put it last"
        )


def _seconds(milliseconds: float | None, option: str) -> float | None:
    if milliseconds is not None and not 0 < milliseconds <= _MOST_MILLISECONDS:
        raise RequestError(f"{option} {milliseconds:g} is not a positive number of milliseconds up to 1e9; write 500")
    return None if milliseconds is None else milliseconds / 1e3


def _loads(concurrency: str | None, rate: str | None, requests: int, seed: int) -> list[Load]:
    """Parses the loads: closed loops, then open ones."""
    from nvlm_trt.benchmark.load import ClosedLoop, OpenLoop

    if concurrency is None and rate is None:
        concurrency = ",".join(n for n in _CONCURRENCY.split(",") if int(n) <= requests)
    loads: list[Load] = []
    for number in _numbers(concurrency, "--concurrency", "1,2,4"):
        if number != int(number):
            raise RequestError(f"--concurrency {number:g} is not a whole number; write 1,2,4")
        if number > requests:
            raise RequestError(
                f"--concurrency {number:g} is more than the {requests} requests of a load, so fewer would run "
                "at once; raise --requests, to eight times the concurrency or more"
            )
        loads.append(ClosedLoop(int(number)))
    loads += [OpenLoop(number, seed) for number in _numbers(rate, "--rate", "0.5,1,2")]
    if len(set(loads)) < len(loads):
        raise RequestError("a load is named twice; name each concurrency and each rate once")
    if len(loads) > _MOST_LOADS:
        raise RequestError(f"{len(loads)} loads are too many; name at most {_MOST_LOADS}")
    return loads


def _numbers(text: str | None, option: str, example: str) -> list[float]:
    if text is None:
        return []
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{option} {text!r} is not a list of numbers; write {example}") from None
    if not all(0 < number < float("inf") for number in numbers):
        raise RequestError(f"{option} {text!r}: every number must be positive; write {example}")
    return numbers


def _check_outputs(files: dict[str, Path | None], plots: Path | None, overwrite: bool) -> None:
    """Refuses outputs that could not be written after the measurement."""
    named = {option: path for option, path in files.items() if path is not None}
    if plots is not None:
        if plots.exists() and not plots.is_dir():
            raise RequestError(f"--plots {plots} is not a directory; name one")
        named |= {"--plots": plots / "latency.png", "--plots ": plots / "stages.png"}
    for option, path in named.items():
        if not path.parent.is_dir() and not option.startswith("--plots"):
            raise RequestError(f"{path.parent} is not a directory; create it or choose another {option}")
        if path.is_dir():
            raise RequestError(f"{path} is a directory; name a file with {option.strip()}")
        if os.path.lexists(path) and not overwrite:
            raise RequestError(f"{path} exists; choose another {option.strip()} or pass --overwrite")
    if len({path.absolute() for path in named.values()}) < len(named):
        raise RequestError("two outputs have the same name; choose another --csv")
    if plots is not None:
        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot create {plots} ({error.strerror}); choose another --plots") from None


def _server_metrics(target: Target, url: str | None) -> TritonMetrics | None:
    """Opens the metrics page of the server. A page that the user names must answer.

    If the user names no page, tries the default port. Returns None if nothing answers: the port may be another.
    """
    from nvlm_trt.benchmark.triton_metrics import TritonMetrics

    metrics = TritonMetrics(url) if url else None
    if metrics is None and target.default_metrics_url:
        metrics = TritonMetrics(target.default_metrics_url)
        try:
            metrics.read()
        except NvlmError:
            metrics = None
    if metrics is None:
        terminal.note("note: without the server's own metrics; pass the --metrics-url that `nvlm-trt serve` prints")
        return None
    metrics.read()
    return metrics


def _print(document: Document, as_json: bool) -> None:
    from nvlm_trt.benchmark.load import describe
    from nvlm_trt.benchmark.tables import print_results

    if as_json:
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        print_results(document)
    for point in document["points"]:
        for caveat in point["caveats"]:
            terminal.note(f"note: {describe(point['load'])}: {caveat}")
        for error in point["errors"] if point["status"] == "complete" else ():
            terminal.note(f"note: {describe(point['load'])}: {error['count']} x {error['status']}: {error['error']}")


def _plot(document: Document, directory: Path, overwrite: bool) -> None:
    from nvlm_trt.benchmark.plots import latency_parts_plot, latency_plot
    from nvlm_trt.benchmark.results_document import write_whole

    for name, draw in (("latency.png", latency_plot), ("stages.png", latency_parts_plot)):
        plot = draw(document)
        if plot is not None:
            write_whole(directory / name, plot, overwrite)


def _end(report: Report, outcome: Outcome) -> None:
    """Says where the results are; raises if the run failed or was interrupted."""
    measured = sum(point["metrics"]["ok"] for point in report.document["points"])
    kept = f"{measured} measured requests are {f'kept in {report.path}' if report.path else 'reported above'}"
    if outcome.failure:
        raise type(outcome.failure)(f"{outcome.failure} ({kept})")
    if outcome.status == "interrupted":
        terminal.note(f"interrupted ({kept})")
        raise KeyboardInterrupt
