"""A version for onnxruntime: its adapter as ``adapter.onnx_adapter``, or its base model with slots for adapters.

The base is exported once and serves every version whose layers it has slots for, of any rank; an adapter's file is a
copy of its tensors. Both come from here because most failures elsewhere are an adapter and a base that were exported by
different recipes: names differ, nothing is set, and the base answers.

Needs the ``onnx`` extra. Called by ``fedpeft registry export``.
"""

from __future__ import annotations

from pathlib import Path

from federated.onnx_adapter import write_adapter
from federated.onnx_layout import AdapterRecord, fold
from federated.release.exportable import Exportable
from federated.wire import decode_tensors

__all__ = ["ADAPTER_FILE", "export_onnx", "export_onnx_base"]

ADAPTER_FILE = "adapter.onnx_adapter"


def export_onnx(subject: Exportable, folder: Path) -> None:
    """Write a version's adapter as ``adapter.onnx_adapter``, for the base of `export_onnx_base`.

    Args:
        subject: the version.
        folder: empty.

    Raises:
        ModelError: for a kind of adapter that cannot be expressed, or tensors that are not the spec's.
        WireError: if the weights are no tensors.
    """
    manifest = subject.manifest
    parameters = fold(manifest.spec, decode_tensors(subject.artefact.weights))
    record = AdapterRecord(manifest.base_digest, manifest.weights_digest, manifest.version_id)
    write_adapter(folder / ADAPTER_FILE, record, parameters, counter=manifest.release_counter)


def export_onnx_base(subject: Exportable, folder: Path) -> None:
    """Write a version's base model as ``base.onnx`` with slots for adapters like the version's, and its tokenizer.

    Args:
        subject: the version; its layers get slots.
        folder: empty.

    Raises:
        ModelError: for a kind of adapter that cannot be expressed, or a base that cannot be exported.
    """
    from federated.adapters.onnx_base import write_onnx_base

    write_onnx_base(subject.base, subject.manifest.spec, subject.task, folder)
