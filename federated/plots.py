"""Line and bar charts as inline SVG: the only importer of pygal.

A chart is one element without scripts, links or fonts of its own, about a phone's width, so that its text stays
readable when a page shows it at full width there. The same data give the same text.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["Series", "bar_chart", "line_chart"]

_Place = TypeVar("_Place", int, float)
_WIDTH, _HEIGHT = 460, 310
_INK, _GRID = "#3e4c59", "#e4e7eb"
_LEGEND_FONT, _LEGEND_COLUMNS = 11, 2
_FONT = "system-ui, Helvetica, Arial, sans-serif"
_DASHES = ("6, 4", "9, 3, 2, 3", "2, 3")


@dataclass(frozen=True)
class Series:
    """One named line or set of bars.

    Args:
        label: for the legend.
        points: x, a whole number or not, to y; missing values are left out by the caller.
        color: any CSS colour.
    """

    label: str
    points: Mapping[Any, float]
    color: str


def line_chart(
    series: Sequence[Series],
    *,
    ylabel: str,
    levels: Sequence[Series] = (),
    percent: bool = False,
    xlabel: str = "round",
) -> str:
    """Draw lines over rounds, with ``levels`` as dashed horizontal lines (their one point's y).

    Args:
        series: the lines; empty ones are left out.
        ylabel: what stands on the y axis.
        levels: reference values, such as baselines.
        percent: show y as percent of 1.
        xlabel: what stands on the x axis.

    Returns:
        An ``<svg>`` element without prolog, scalable by CSS.
    """
    lines = [line for line in series if line.points]
    rounds = sorted({x for line in lines for x in line.points})
    chart = _pygal().XY(**{**_look([*lines, *levels], ylabel, percent=percent), "x_title": xlabel})
    chart.x_labels = _ticks(rounds)
    for line in lines:
        chart.add(line.label, sorted(line.points.items()), stroke_style={"width": 2})
    ends = (rounds[0], rounds[-1]) if rounds else (0, 1)
    for index, level in enumerate(levels):
        y = next(iter(level.points.values()))
        style = {"width": 1.5, "dasharray": _DASHES[index % len(_DASHES)]}
        chart.add(level.label, [(x, y) for x in ends], show_dots=False, stroke_style=style)
    return _svg(chart)


def bar_chart(series: Sequence[Series], *, ylabel: str) -> str:
    """Draw one group of bars per round.

    Returns:
        An ``<svg>`` element without prolog.
    """
    rounds = sorted({x for bars in series for x in bars.points})
    chart = _pygal().Bar(**_look(series, ylabel, percent=False), zero=0, include_x_axis=True)
    chart.x_labels = [str(x) for x in rounds]
    chart.x_labels_major = [str(x) for x in _ticks(rounds)]
    chart.show_minor_x_labels = False
    for bars in series:
        chart.add(bars.label, [bars.points.get(x) for x in rounds])
    return _svg(chart)


def _pygal() -> Any:
    """The library, loaded at the first chart, without the old-style import hook that it leaves (Python warns of it)."""
    import pygal

    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]
    return pygal


def _look(series: Sequence[Series], ylabel: str, *, percent: bool) -> dict[str, Any]:
    from pygal.style import Style

    style = Style(
        background="transparent",
        plot_background="transparent",
        foreground=_INK,
        foreground_strong=_INK,
        foreground_subtle=_GRID,
        guide_stroke_color=_GRID,
        major_guide_stroke_color=_GRID,
        guide_stroke_dasharray="none",
        major_guide_stroke_dasharray="none",
        opacity=1,
        colors=tuple(line.color for line in series) or (_INK,),
        font_family=_FONT,
        label_font_size=11,
        major_label_font_size=11,
        legend_font_size=_LEGEND_FONT,
        title_font_size=12,
        no_data_font_size=14,
    )
    return {
        "style": style,
        "js": [],
        "width": _WIDTH,
        "height": _HEIGHT,
        "margin": 6,
        "margin_left": 14,
        "margin_bottom": 10 + 2 * _LEGEND_FONT * (len(series) % _LEGEND_COLUMNS),  # pygal forgets a last, short row
        "spacing": 8,
        "x_title": "round",
        "y_title": ylabel,
        "legend_at_bottom": True,
        "legend_at_bottom_columns": _LEGEND_COLUMNS,
        "legend_box_size": 9,
        "truncate_legend": -1,
        "dots_size": 3,
        "max_scale": 6,
        "show_x_guides": False,
        "x_value_formatter": lambda value: f"{value:g}",
        "value_formatter": _percent_of(series) if percent else _plain,
    }


def _percent_of(series: Sequence[Series]) -> Callable[[float], str]:
    """Percent with as many decimals as tell the axis' labels apart."""
    values = [y for line in series for y in line.points.values()] or [0.0]
    step = (max(values) - min(values)) / 5  # about so many labels
    decimals = max(0, math.ceil(-math.log10(step)) - 2) if step > 1e-8 else 0
    return lambda value: f"{value:.{decimals}%}"


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _ticks(rounds: Sequence[_Place], most: int = 8) -> list[_Place]:
    """At most ``most`` of them, evenly spaced and with the first."""
    step = -(-len(rounds) // most) or 1
    return list(rounds[::step])


def _svg(chart: Any) -> str:
    chart.uuid = hashlib.sha256(repr(chart.raw_series).encode()).hexdigest()[:12]  # pygal's own is random
    chart.add_xml_filter(_still)
    return str(chart.render(is_unicode=True, disable_xml_declaration=True))


def _still(root: Any) -> Any:
    """The picture without pygal's scripts and comments (they hold today's date)."""
    for parent in list(root.iter()):
        for child in list(parent):
            if not isinstance(child.tag, str) or child.tag == "script":
                parent.remove(child)
    return root
