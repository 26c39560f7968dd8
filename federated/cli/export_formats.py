"""The formats of ``fedpeft registry export --as``: a name, and how to come by the function that writes it.

What a format needs (torch, peft, gguf, onnx ...) is imported when it is asked for, never before. A new format is one
module ``federated/release/export_NAME.py`` with an `Exporter`, and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from federated.errors import ConfigError

if TYPE_CHECKING:
    from federated.release.exportable import Exporter

__all__ = ["EXPORTERS", "LINEAGE", "exporter_of", "format_names"]

LINEAGE = "lineage"
"""The version with all its ancestors, for another registry: the registry writes it itself, without a base model."""


def _peft() -> Exporter:
    from federated.release.export_peft import export_peft

    return export_peft


def _gguf(kind: str) -> Exporter:
    from federated.release.export_gguf import exporter

    return exporter(kind)


def _onnx() -> Exporter:
    from federated.release.export_onnx import export_onnx

    return export_onnx


def _onnx_base() -> Exporter:
    from federated.release.export_onnx import export_onnx_base

    return export_onnx_base


EXPORTERS: dict[str, Callable[[], Exporter]] = {
    "peft": _peft,
    "gguf": lambda: _gguf("f32"),
    "gguf-f16": lambda: _gguf("f16"),
    "gguf-q8_0": lambda: _gguf("q8_0"),
    "onnx": _onnx,
    "onnx-base": _onnx_base,
}
"""By name; each loads its format when it is called."""


def format_names(exporters: Mapping[str, object] = EXPORTERS) -> str:
    """All names, for people."""
    return ", ".join([LINEAGE, *exporters])


def exporter_of(name: str) -> Exporter:
    """The function that writes a format.

    Raises:
        ConfigError: if there is no such format.
    """
    if name not in EXPORTERS:
        raise ConfigError(f"--as {name}: no such format; expected one of {format_names()}")
    return EXPORTERS[name]()
