"""Prints results as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nvlm_trt.benchmark.compare import Comparison
from nvlm_trt.benchmark.latency_parts import TITLES
from nvlm_trt.benchmark.load import describe
from nvlm_trt.benchmark.results_document import Document

_LATENCIES = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
_STYLE = {"better": "green", "worse": "red", "equal": "default"}


def print_results(document: Document) -> None:
    """Prints latencies, throughput and the parts of the latency, each with a row per load."""
    points = document["points"]
    if not points:
        return
    _show(_latency_table(points))
    _show(_throughput_table(points, document["slo"]))
    if any(point["stages"] for point in points):
        _show(_latency_parts_table(points))


def print_comparison(comparison: Comparison) -> None:
    """Prints one row per number of each load."""
    table = _table(f"B = {comparison.b} against A = {comparison.a}", ["load", "metric", "A", "B", "B / A", "B is"])
    last = None
    for row in comparison.rows:
        if last not in (None, row.load):
            table.add_section()
        scale, unit = (1e3, "ms") if row.better == "lower" else (1.0, "/s")
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        style = _STYLE[row.verdict]
        table.add_row(
            row.load if row.load != last else "",
            f"{_metric_title(row.metric)}, {unit}",
            _number(row.a * scale),
            _number(row.b * scale),
            ratio,
            f"[{style}]{row.verdict}[/{style}]",
        )
        last = row.load
    _show(table)


def _latency_table(points: Iterable[Mapping[str, Any]]) -> Table:
    parts = ("p50", "p90", "p99")
    names = [f"{title}\n{part}" for title in ("TTFT", "ITL", "TPOT", "e2e") for part in parts]
    table = _table("Latency, ms", ["load", "requests", *names])
    for point in points:
        metrics = point["metrics"]
        values = [(metrics[name] or {}).get(part) for name in _LATENCIES for part in parts]
        table.add_row(describe(point["load"]), str(metrics["ok"]), *map(_milliseconds, values))
    return table


def _throughput_table(points: Iterable[Mapping[str, Any]], slo: Mapping[str, float | None]) -> Table:
    bounds = [f"{name[:-2].upper()} <= {bound * 1e3:g} ms" for name, bound in slo.items() if bound is not None]
    title = "Throughput, per second" + (f"; SLO {', '.join(bounds)}" if bounds else "")
    names = ["tokens", "requests", "good", "images", "tiles", "cached\nimages", "errors", "can-\ncelled", "client\nCPU"]
    table = _table(title, ["load", *names])
    for point in points:
        metrics, client = point["metrics"], point["client"]
        rates = ("output_tokens", "requests", "goodput", "images", "tiles")
        table.add_row(
            describe(point["load"]),
            *(_number(metrics[f"{rate}_per_s"]) for rate in rates),
            f"{metrics['cached_images']}/{metrics['images']}",
            str(metrics["rejected"] + metrics["failed"] + metrics["refused"]),
            str(metrics["cancelled"]),
            f"{client['share']:.0%}" if client else "-",
        )
    return table


def _latency_parts_table(points: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("Where a mean request's time went, ms", ["load", *(t.replace(" ", "\n") for t in TITLES.values())])
    for point in points:
        if point["stages"]:
            table.add_row(describe(point["load"]), *(_milliseconds(point["stages"][name]) for name in TITLES))
    return table


def _table(title: str, headings: Iterable[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("load", "metric") else "right", no_wrap=True)
    return table


def _show(table: Table) -> None:
    """Prints a table at its full width: a narrower terminal wraps lines but cuts nothing off."""
    console = Console(highlight=False)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def _metric_title(metric: str) -> str:
    name, _, part = metric.partition(".")
    title = {"ttft_s": "TTFT", "itl_s": "ITL", "tpot_s": "TPOT"}.get(name) or name.removesuffix("_per_s").removesuffix(
        "_s"
    )
    return f"{title.replace('_', ' ')} {part}".strip()


def _milliseconds(seconds: float | None) -> str:
    return _number(None if seconds is None else seconds * 1e3)


def _number(value: float | None) -> str:
    """Formats with three significant digits and no exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
