"""JSON from strangers: one object, no duplicate keys, no NaN, no deep nesting.

Python's parser keeps the last of two equal keys, accepts ``NaN`` and recurses as deep as the text asks. A digest over
such text would name several meanings; this reader refuses it. It interprets no field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from federated.errors import WireError

__all__ = ["MAX_DEPTH", "parse_object", "shown"]

MAX_DEPTH = 16
"""Deepest nesting of objects and arrays."""

# A string (to its end, or to the end of the text when nothing closes it) or one bracket. The optional last quote keeps
# the scan linear: a string that never closes is consumed once and not tried again from each quote inside it.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def shown(value: Any) -> str:
    r"""A stranger's value for a message: ASCII, at most 80 characters, control and direction marks escaped.

    >>> shown("a\u202eb")
    "'a\\u202eb'"
    """
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Read one JSON object.

    Args:
        data: UTF-8 text; its length must already be bounded by the caller.
        what: names the text in messages, such as ``"packet header"``.

    Raises:
        WireError: for bad UTF-8 or JSON, a value that is no object, duplicate keys, NaN or infinity literals, or
            nesting deeper than `MAX_DEPTH`.
    """
    try:
        text = data.decode("utf-8")
        _check_depth(text, what)
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not strict JSON ({shown(str(error))}); expected what this library writes") from None
    if type(value) is not dict:
        raise WireError(f"{what} is a JSON {type(value).__name__}; expected an object")
    return value


def _check_depth(text: str, what: str) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        mark = match.group()
        if mark in ("[", "{"):
            depth += 1
        elif mark in ("]", "}"):
            depth -= 1
        if depth > MAX_DEPTH:
            raise WireError(f"{what} nests deeper than {MAX_DEPTH} levels")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"duplicate key {shown(key)}")
        made[key] = value
    return made


def _no_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not allowed")
