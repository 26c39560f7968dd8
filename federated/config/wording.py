"""A validation error in the house's words: one line with the key, what was found and what is expected.

Called by `federated.config.experiment` and by the reader of a client's own file, which shows no values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from federated.config import parts

__all__ = ["expectation", "one_line"]

_EXAMPLES = {
    "task.labels": "[bad,good]",
    "adapter.target_modules": "[query,value]",
    "train.scheduler_args": "{gamma: 0.9}",
}
_ONE = {
    "string_type": "one text",
    "int_type": "one whole number",
    "float_type": "one number",
    "bool_type": "true or false",
}


def one_line(error: ValidationError) -> str:
    """Say the first fault in one line: the key, the value found and what is expected."""
    faults = _telling(error.errors(include_url=False))
    first, key = faults[0], _key(faults[0])
    same = [fault for fault in faults if _key(fault) == key]
    found = "" if first["type"] == "value_error" else f" = {_short(repr(first['input']))}"
    more = f" (and {len(faults) - len(same)} more)" if len(faults) > len(same) else ""
    prefix = "" if first["type"] == "value_error" and key == "config" else f"{key}{found}: "
    return f"{prefix}{expectation(same)}{more}"


def expectation(faults: Sequence[Mapping[str, Any]]) -> str:
    """What is expected in place of a value, from all of pydantic's faults with it; the value itself is not shown.

    A list or a mapping where one value belongs, and the reverse, is said in our words; the rest in pydantic's.
    """
    first, texts = faults[0], list(dict.fromkeys(_expected(fault) for fault in faults))
    if not any(text.startswith("expected ") for text in texts):
        return texts[0]
    kind = _kind(first["input"])
    found = f"found {kind}, " if kind and first["type"] not in ("tuple_type", "dict_type", "dataclass_type") else ""
    return found + ", or ".join([texts[0], *(text.removeprefix("expected ") for text in texts[1:])])


def _expected(fault: Mapping[str, Any]) -> str:
    kind, key = fault["type"], _key(fault)
    if kind == "unexpected_keyword_argument":
        return "unknown key"
    if kind == "tuple_type":
        return f"expected a list, such as {_EXAMPLES.get(key, '[one,two]')}"
    if kind == "dict_type":
        return f"expected a mapping, such as {_EXAMPLES.get(key, '{key: value}')}"
    if kind == "dataclass_type":
        return _section(key, fault["ctx"]["class_name"])
    if _kind(fault["input"]) and (kind in _ONE or kind == "literal_error"):
        return f"expected {_ONE.get(kind) or fault['ctx']['expected']}"
    return str(fault["msg"]).removeprefix("Value error, ")


def _section(key: str, record: str) -> str:
    known = getattr(parts, record, None)
    if known is None:
        return "expected a mapping of keys to values"
    names = [field.name for field in fields(known)]
    return f"expected a section: {key}.KEY, where KEY is one of {', '.join(names)}"


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list | tuple) else "a mapping" if isinstance(value, Mapping) else ""


def _telling(faults: Sequence[Any]) -> Sequence[Any]:
    """Of a value that is a list or one of some words, and was given as a list, only what is wrong with the list."""
    rest = [fault for fault in faults if not (_branch(fault, "literal[") and isinstance(fault["input"], list | tuple))]
    return rest or faults


def _branch(fault: Mapping[str, Any], name: str) -> bool:
    return any(str(part).startswith(name) for part in fault["loc"])


def _key(fault: Mapping[str, Any]) -> str:
    """The key with its dots; without the branches of a union, which pydantic counts in."""
    named = (str(part) for part in fault["loc"] if not str(part).startswith(("literal[", "tuple[")))
    return _short(".".join(named)) or "config"


def _short(text: str, limit: int = 200) -> str:
    """In one line of bounded length, whatever somebody wrote as a key or value."""
    flat = "".join(letter if letter.isprintable() else "?" for letter in text)
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."
