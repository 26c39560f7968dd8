"""The attack as one SVG: what was written, what is read of it, and how much is read under which defence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from federated.plots import Series, grouped_bars
from simulations.attacks.settings import Setting

__all__ = ["picture"]

_WIDTH, _CHART_HEIGHT, _LINE, _INDENT = 920, 310, 21, 285
_RED, _INK, _PALE = "#c53030", "#3e4c59", "#9aa5b1"
_FONT = "system-ui, Helvetica, Arial, sans-serif"


def picture(
    truth: Sequence[str], found: Mapping[str, Sequence[str]], shares: Mapping[Setting, tuple[float, float]]
) -> str:
    """Draw it.

    Args:
        truth: the client's messages, tokens with a space between them.
        found: what is read of them, by what was done; none where nothing can be.
        shares: of the words read, and read by chance, by setting; those without a bar's name are left out.

    Returns:
        An SVG document without scripts.
    """
    rows = [_row("on the client", truth, truth, _INK)]
    rows += [_row(label, messages or ["nothing"] * len(truth), truth, _RED) for label, messages in found.items()]
    height = _LINE + sum(_LINE * len(row) + 8 for row in rows)
    text, y = [], float(_LINE)
    for row in rows:
        for line in row:
            text.append(f'<text y="{y:g}">{line}</text>')
            y += _LINE
        y += 8
    chart = _bars(shares).replace("<svg ", f'<svg y="{height}" width="{_WIDTH}" height="{_CHART_HEIGHT}" ', 1)
    box = f'viewBox="0 0 {_WIDTH} {height + _CHART_HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="{_FONT}" font-size="15">'
    return "\n".join(['<?xml version="1.0" encoding="utf-8"?>', head, *text, chart, "</svg>", ""])


def _row(label: str, messages: Sequence[str], truth: Sequence[str], color: str) -> list[str]:
    """The lines of one row: words that are right in its colour, others pale."""
    lines = []
    for number, (message, wanted) in enumerate(zip(messages, truth, strict=True)):
        head = f'<tspan x="10" fill="{_INK}" font-weight="bold">{escape(label)}</tspan>' if number == 0 else ""
        words = zip(message.split(" "), (wanted + " " * 20).split(" "), strict=False)
        spans = [f'<tspan fill="{color if word == right else _PALE}">{escape(word)} </tspan>' for word, right in words]
        lines.append(f'{head}<tspan x="{_INDENT}">{"".join(spans)}</tspan>')
    return lines


def _bars(shares: Mapping[Setting, tuple[float, float]]) -> str:
    drawn = {setting.bar: pair for setting, pair in shares.items() if setting.bar}
    words, chance = (dict(enumerate(pair[number] for pair in drawn.values())) for number in (0, 1))
    bars = [Series("words read", words, _RED), Series("by chance", chance, _PALE)]
    names = [f"{bar}: {share:.0%}" for bar, (share, _) in drawn.items()]
    return grouped_bars(bars, names, ylabel="share of the words", percent=True)
