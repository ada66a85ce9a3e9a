"""Prints for people: progress bars, tables, error lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table

from nvlm_trt.progress import Bytes, Progress

if TYPE_CHECKING:
    from nvlm_trt.evaluation.accuracy import GroupScore, Summary, TaskScore
    from nvlm_trt.evaluation.parity_report import ParityReport


_stderr = Console(stderr=True, highlight=False)
_SPEED_SECONDS = 3600.0  # over which a bar's speed is measured: one sample of a calibration may take minutes


def error(message: str) -> None:
    _stderr.print(f"error: {message}", markup=False, soft_wrap=True)


def note(message: str) -> None:
    _stderr.print(message, markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Yields a callback `(description, done, total)` that draws a bar per description, if stderr is a terminal.

    A bar shows the time that has passed and the time left, and what is done of a total of Bytes."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left{task.fields[nbytes]}")),
    )
    bars = ProgressBars(
        *columns, console=_stderr, disable=not _stderr.is_terminal, speed_estimate_period=_SPEED_SECONDS
    )
    with bars:
        tasks: dict[str, TaskID] = {}

        def report(description: str, done: float, total: float) -> None:
            nbytes = f", {done / 1e9:.2f} of {total / 1e9:.2f} GB" if isinstance(total, Bytes) else ""
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total, nbytes=nbytes)
            bars.update(tasks[description], completed=done, total=total, nbytes=nbytes)

        yield report


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
        table.add_row(printable(name), kind, metric, str(row.count), f"{row.score:.3f}", interval)

    for task in summary.tasks:
        add(escape(task.task), task.kind, task.metric, task)
    table.add_section()
    image, text = summary.group("image"), summary.group("text")
    groups = [("image tasks", image), ("text-only tasks", text), ("all tasks", summary.overall)]
    for name, group in groups if image and text else groups[:2]:
        if group is not None:
            add(name, "", f"mean of {group.tasks}", group)
    Console(highlight=False).print(table)


def printable(text: str) -> str:
    """Replaces control characters by U+FFFD: an answer must not steer the terminal that shows it."""
    return "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)


def scaled(number: float, unit: str) -> str:
    """Writes a number with a prefix: 12300000, "B" -> 12.30 MB."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {prefix}{unit}"
    return f"{number / 1e3:.2f} k{unit}"
