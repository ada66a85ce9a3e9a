"""Draws the learning curves of a work directory: `python -m training.plot --work DIR --output FILE.png`."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

_TITLES = {
    "vision": "vision encoder: labels per patch, held-out fonts",
    "language": "language model: texts and spelled pages",
    "tune-d": "NVLM-D: exact answers, held-out fonts",
    "tune-x": "NVLM-X",
    "tune-h": "NVLM-H",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    stages = [stage for stage in _TITLES if (options.work / stage / "evaluation.csv").exists()]
    if not stages:
        raise SystemExit(f"error: {options.work} has no evaluation.csv yet; train first: python -m training --work DIR")
    figure, axes = pyplot.subplots(1, len(stages), figsize=(4.2 * len(stages), 3.6), sharey=True, squeeze=False)
    for stage, axis in zip(stages, axes[0], strict=True):
        draw_stage(axis, options.work / stage / "evaluation.csv", _TITLES[stage])
    axes[0][0].set_ylabel("share right")
    figure.tight_layout()
    figure.savefig(options.output, dpi=110)


def draw_stage(axis: Axes, path: Path, title: str) -> None:
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    steps = [int(row[0]) for row in rows]
    for column, name in enumerate(header[1:], start=1):
        style = "-" if column <= 10 else "--"  # matplotlib has ten colours
        axis.plot(steps, [float(row[column]) for row in rows], style, marker=".", label=name)
    axis.set(title=title, xlabel="step", ylim=(-0.02, 1.02))
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, ncols=2, loc="lower right")


if __name__ == "__main__":
    main()
