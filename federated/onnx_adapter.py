"""Adapters as ``.onnx_adapter`` files, which onnxruntime reads: the only writer and reader of the format here.

The format has names, tensors and two numbers, and no room for texts: which adapter a file holds is a tensor of bytes,
see `federated.onnx_layout`. The numbers repeat a part of it for programs that look at nothing else.

Needs the ``onnx`` extra. Called by `federated.release.export_onnx` and `federated.device.backends.onnx`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxruntime import AdapterFormat, OrtValue

from federated.errors import ModelError
from federated.onnx_layout import RECORD, AdapterRecord

__all__ = ["read_adapter", "write_adapter"]

Array = npt.NDArray[np.float32]
_BITS = 31


def write_adapter(path: Path, record: AdapterRecord, parameters: Mapping[str, Array], *, counter: int = 0) -> None:
    """Write a file.

    Args:
        path: where to.
        record: which adapter it is.
        parameters: what it sets, by slot (`federated.onnx_layout.fold`).
        counter: the version's release counter: the file's ``adapter_version``. Its ``model_version`` is made of the
            base digest's first bits.

    Raises:
        ModelError: if it cannot be written.
    """
    # onnxruntime points at the arrays: they live until the file is written
    arrays: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.uint8]] = dict(sorted(parameters.items()))
    arrays[RECORD] = np.frombuffer(record.to_bytes(), np.uint8)
    made = AdapterFormat()
    made.set_adapter_version(counter % 2**_BITS)
    made.set_model_version(int(record.base_digest[:8], 16) % 2**_BITS)
    made.set_parameters({name: OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()})
    try:
        made.export_adapter(str(path))
    except Exception as error:  # onnxruntime raises nearly anything
        raise ModelError(f"{path} cannot be written: {str(error)[:200]}") from error


def read_adapter(path: Path) -> tuple[AdapterRecord, dict[str, Array]]:
    """Which adapter a file holds, and copies of what it sets.

    Raises:
        ModelError: if it is no such file, or has no record.
    """
    try:
        parameters = {
            name: np.array(value.numpy())
            for name, value in AdapterFormat.read_adapter(str(path)).get_parameters().items()
        }
    except Exception as error:  # onnxruntime raises nearly anything
        raise ModelError(f"{path} is no .onnx_adapter file: {str(error)[:200]}") from error
    record = parameters.pop(RECORD, None)
    if record is None or record.dtype != np.uint8:
        raise ModelError(f"{path} does not say which adapter it is; expected a file that federated-peft exported")
    return AdapterRecord.from_bytes(record.tobytes()), parameters
