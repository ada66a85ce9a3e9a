"""Draws measured values as bars: medians with their lowest and highest, a panel for each metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.spread import Spread, short

OURS, THEIRS = "#76b900", "#9aa0a6"
COLUMNS = 2


@dataclass(frozen=True)
class Panel:
    """One metric: a bar for each name. The first word of the first name says whose bars are green."""

    title: str
    bars: Mapping[str, Spread]


def draw(panels: Sequence[Panel], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // COLUMNS)
    height = max(len(panel.bars) for panel in panels) * 0.34 + 0.9
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(11, rows * height), squeeze=False, layout="constrained")
    for panel, axis in zip(panels, axes.flat, strict=False):
        names, spreads = list(panel.bars), list(panel.bars.values())
        ours = names[0].split()[0]
        medians = [spread.median for spread in spreads]
        below = [spread.median - spread.lowest for spread in spreads]
        above = [spread.highest - spread.median for spread in spreads]
        colours = [OURS if name.startswith(ours) else THEIRS for name in names]
        axis.barh(names, medians, color=colours, xerr=(below, above), ecolor="#444444", capsize=2)
        for row, spread in enumerate(spreads):
            axis.annotate(
                short(spread.median), (spread.highest, row), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
