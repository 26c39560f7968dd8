"""Tables on the terminal: texts as they are, without markup, and wide enough in a pipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["as_json", "cell", "console", "fill", "number", "say"]

_WIDE = 200  # columns when stdout is no terminal, so that nothing is cut in a pipe


def console() -> Console:
    """Standard output."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDE)


def say(text: object, *, stderr: bool = False) -> None:
    """One line, never folded or coloured."""
    Console(stderr=stderr, soft_wrap=True, highlight=False).print(cell(text))


def cell(value: object) -> Text:
    """Text without markup; control characters, which a stored record may carry, made visible."""
    text = str(value)
    return Text("".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text))


def fill(table: Table, rows: Iterable[Sequence[object]]) -> None:
    """Add rows."""
    for row in rows:
        table.add_row(*map(cell, row))


def number(value: Any) -> str:
    """Four digits of a float; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_json(value: Any) -> str:
    """Plain data for people."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
