"""Line and bar charts as inline SVG: the only importer of matplotlib.

Figures are made without pyplot, so there is no display, no global state and no thread. They are small (about a
phone's width) so that their text stays readable when a page shows them at full width there.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Series", "bar_chart", "line_chart"]

_SIZE = (4.6, 3.1)  # inches at 72 points
_INK = "#1f2933"
_GRID = "#e4e7eb"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Series:
    """One named line or set of bars.

    Args:
        label: for the legend.
        points: x to y; missing values are left out by the caller.
        color: any CSS colour.
    """

    label: str
    points: Mapping[int, float]
    color: str


def line_chart(series: Sequence[Series], *, ylabel: str, levels: Sequence[Series] = (), percent: bool = False) -> str:
    """Draw lines over rounds, with ``levels`` as dashed horizontal lines (their one point's y).

    Args:
        series: the lines; empty ones are left out.
        ylabel: what stands on the y axis.
        levels: reference values, such as baselines.
        percent: show y as percent of 1.

    Returns:
        An ``<svg>`` element without prolog, scalable by CSS.
    """
    from matplotlib.ticker import PercentFormatter

    figure, axes = _axes(ylabel)
    for line in series:
        if line.points:
            x, y = zip(*sorted(line.points.items()), strict=True)
            axes.plot(x, y, color=line.color, label=line.label, marker="o", markersize=4, linewidth=2)
    for level, style in zip(levels, _DASHES * len(levels), strict=False):
        axes.axhline(next(iter(level.points.values())), color=level.color, label=level.label, linestyle=style)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return _finish(figure, axes, salt=ylabel)


def bar_chart(series: Sequence[Series], *, ylabel: str) -> str:
    """Draw one group of bars per round.

    Returns:
        An ``<svg>`` element without prolog.
    """
    figure, axes = _axes(ylabel)
    width = 0.8 / max(1, len(series))
    for index, bars in enumerate(series):
        x = [number + (index - (len(series) - 1) / 2) * width for number in bars.points]
        axes.bar(x, list(bars.points.values()), width=width * 0.92, color=bars.color, label=bars.label)
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, salt=ylabel)


_DASHES = ("--", "-.", ":")


def _axes(ylabel: str) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
    axes.set_xlabel("round")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Any, axes: Any, *, salt: str) -> str:
    import matplotlib as mpl

    handles, _ = axes.get_legend_handles_labels()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        if handles:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.8, columnspacing=1.2)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
