"""Prints for people: progress bars, the streamed answer with its statistics, tables, error lines."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table

from nvlm_trt.progress import Progress

if TYPE_CHECKING:
    from nvlm_trt.api import Delta, Usage
    from nvlm_trt.evaluation.accuracy import GroupScore, Summary, TaskScore
    from nvlm_trt.evaluation.parity import ParityReport


_stderr = Console(stderr=True, highlight=False)


def error(message: str) -> None:
    _stderr.print(f"error: {message}", markup=False, soft_wrap=True)


def note(message: str) -> None:
    _stderr.print(message, markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Yields a callback `(description, done, total)` that draws a bar per description, if stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with ProgressBars(*columns, console=_stderr, disable=not _stderr.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(description: str, done: float, total: float) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done, total=total)

        yield report


def print_answer(stream: Iterable[Delta], stats: bool, as_json: bool) -> None:
    """Streams an answer to stdout as it arrives; `stats` go to stderr, so that stdout holds the answer alone."""
    started = time.perf_counter()
    ttft_s = None  # measured here, so the way to a server and back is included
    deltas = []
    for delta in stream:
        deltas.append(delta)
        if delta.token_ids and ttft_s is None:
            ttft_s = time.perf_counter() - started
        if delta.text and not as_json:
            sys.stdout.write(_printable(delta.text))
            sys.stdout.flush()
    usage = deltas[-1].usage if deltas else None
    if as_json:
        answer = {
            "text": "".join(delta.text for delta in deltas),
            "token_ids": [token for delta in deltas for token in delta.token_ids],
            "finish_reason": deltas[-1].finish_reason if deltas else None,
            "usage": asdict(usage) if usage else None,
            "ttft_s": ttft_s,
        }
        print(json.dumps(answer, indent=2, allow_nan=False))
        return
    print(flush=True)
    if stats and usage is not None:
        note(f"[{' | '.join(_statistics(usage, ttft_s))}]")


def _statistics(usage: Usage, ttft_s: float | None) -> Iterator[str]:
    yield f"{usage.image_tiles} tiles{' from cache' if usage.cached_images else ''}"
    yield f"{usage.prompt_tokens} prompt tokens"
    if usage.cross_tokens:
        yield f"{usage.cross_tokens} cross-attended"
    yield f"{usage.completion_tokens} tokens"
    if ttft_s is not None:
        yield f"first token after {ttft_s * 1e3:.0f} ms"
    # prefill makes the first token; the backend times the others, of which several may arrive here at once
    if usage.ttft_s is not None and usage.completion_tokens > 1:
        yield f"{(usage.completion_tokens - 1) / (usage.total_s - usage.ttft_s):.1f} tokens/s"


def parity_table(report: ParityReport) -> None:
    """Prints a line per stage: its output's shape, the difference, and whether that is within the tolerance."""
    table = Table(title=f"{report.title}, tolerance {report.tolerance:.0e}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("stage", "shape", "max abs diff", "cosine", ""):
        table.add_column(heading, justify="left" if heading in ("stage", "shape") else "right", no_wrap=True)
    for stage in report.stages:
        mark = "[green]ok[/green]" if stage.passed else "[red]FAIL[/red]"
        table.add_row(stage.name, stage.shape, stage.difference, stage.cosine, mark)
    Console(highlight=False).print(table)


def accuracy_table(summary: Summary, title: str) -> None:
    """Prints a line per task, then the means: tasks with images, text-only tasks, all."""
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    for heading in ("task", "", "metric", "n", "score", "95 % interval"):
        table.add_column(heading, justify="right" if heading in ("n", "score", "95 % interval") else "left")

    def add(name: str, kind: str, metric: str, row: TaskScore | GroupScore) -> None:
        interval = f"{row.low:.3f} .. {row.high:.3f}"
        table.add_row(_printable(name), kind, metric, str(row.count), f"{row.score:.3f}", interval)

    for task in summary.tasks:
        add(escape(task.task), task.kind, task.metric, task)
    table.add_section()
    image, text = summary.group("image"), summary.group("text")
    groups = [("image tasks", image), ("text-only tasks", text), ("all tasks", summary.overall)]
    for name, group in groups if image and text else groups[:2]:
        if group is not None:
            add(name, "", f"mean of {group.tasks}", group)
    Console(highlight=False).print(table)


def _printable(text: str) -> str:
    """Replaces control characters by U+FFFD: an answer must not steer the terminal that shows it."""
    return "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)
