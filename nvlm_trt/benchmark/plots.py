"""Draws results as PNG images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nvlm_trt.benchmark.latency_parts import TITLES
from nvlm_trt.benchmark.load import describe
from nvlm_trt.benchmark.results_document import Document

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_PANELS = (
    ("ttft_s", "Time to first token"),
    ("e2e_s", "End to end"),
    ("itl_s", "Inter-token latency, of every token"),
    ("tpot_s", "Time per output token, mean of a request"),
)
_MODES = (("closed", "tab:blue"), ("open", "tab:orange"))
_PERCENTILES = (("p50", "o", "-"), ("p90", "^", "--"), ("p99", "s", ":"))
# from waiting to outside; the parts of image encoding share one hue
_PART_COLOURS = ("#b9b9b9", "#9ecae1", "#3182bd", "#08519c", "#fdae6b", "#74c476", "#e8e8e8")


def latency_plot(document: Document) -> bytes | None:
    """Draws latency against throughput, a panel for each latency. Returns None if nothing was measured."""
    points = [point for point in document["points"] if point["metrics"]["output_tokens_per_s"]]
    if not points:
        return None
    figure, panels = _figure(2, 2, (11, 8.5))
    for panel, (name, title) in zip(panels, _PANELS, strict=True):
        for mode, colour in _MODES:
            series = [p for p in points if p["load"]["mode"] == mode and p["metrics"][name]]
            if series:
                _draw_series(panel, series, name, mode, colour)
        panel.set_title(title)
        panel.set_xlabel("output tokens/s")
        panel.set_ylabel("ms")
        panel.margins(x=0.12, y=0.14)
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    # collects from all panels: answers of one token have no inter-token latency, so a panel may lack a series
    legend = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(
        legend.values(),
        legend.keys(),
        title="at each load: requests at once (closed loop), requests per second (open loop)",
        loc="outside lower center",
        ncols=len(legend),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    figure.suptitle(f"{_subject(document)}: latency against throughput\n{_workload(document)}", fontsize=11)
    return _png(figure)


def latency_parts_plot(document: Document) -> bytes | None:
    """Draws a bar per load: the parts of a mean request's latency. Returns None if nothing was measured."""
    points = [point for point in document["points"] if point["stages"]]
    if not points:
        return None
    figure, (panel,) = _figure(1, 1, (11, 2.4 + 0.5 * len(points)))
    rows = range(len(points))
    left = [0.0] * len(points)
    for (name, title), colour in zip(TITLES.items(), _PART_COLOURS, strict=True):
        widths = [max(point["stages"][name], 0.0) * 1e3 for point in points]
        if any(widths):
            panel.barh(rows, widths, left=left, color=colour, label=title, edgecolor="white", linewidth=0.5)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in zip(rows, left, strict=True):
        panel.annotate(f"{total:,.0f} ms", (total, row), xytext=(4, 0), textcoords="offset points", va="center")
    panel.set_yticks(rows, [describe(point["load"]) for point in points])
    panel.set_ylabel("load")
    panel.invert_yaxis()
    panel.set_xlabel("ms of a mean request, end to end")
    panel.margins(x=0.1)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(TITLES), frameon=False, fontsize=9)
    figure.suptitle(f"{_subject(document)}: stages\n{_workload(document)}", fontsize=11)
    return _png(figure)


def _draw_series(panel: Axes, points: Sequence[Mapping[str, Any]], name: str, mode: str, colour: str) -> None:
    """Draws one line per percentile through the loads in the order of their measurement.

    Names each load at the upper left of its highest mark: a curve that rises with the load does not pass there.
    """
    throughput = [point["metrics"]["output_tokens_per_s"] for point in points]
    for percentile, marker, line in _PERCENTILES:
        values = [point["metrics"][name][percentile] * 1e3 for point in points]
        label = f"{mode} loop {percentile}"
        panel.plot(throughput, values, color=colour, marker=marker, linestyle=line, markersize=5, label=label)
    for x, point in zip(throughput, points, strict=True):
        load = point["load"]
        text = f"{load['concurrency']}" if mode == "closed" else f"{load['rate']:g}/s"  # at once, or per second
        top = point["metrics"][name]["p99"] * 1e3
        panel.annotate(
            text,
            (x, top),
            xytext=(-6, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=colour,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Makes a figure without pyplot, which has global state and may ask for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _png(figure: Figure) -> bytes:
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=_DPI)
    return encoded.getvalue()


def _subject(document: Document) -> str:
    server = document["server"]
    return str(server.get("model") or server.get("engine") or server.get("url"))


def _workload(document: Document) -> str:
    workload = document["workload"]
    text = f"{workload['prompt_tokens']} prompt and {workload['output_tokens']} output tokens"
    if workload["images"]:
        kind = "repeated" if workload["repeat_images"] else "new"
        noun = "image" if workload["images"] == 1 else "images"
        text += f", {workload['images']} {kind} {noun} of {' or '.join(workload['image_sizes'])}"
    return f"{text}, {workload['requests']} requests per load"
